"""What a worker will have computed, for whoever gives it more to do: promises and items of them."""

from __future__ import annotations

from typing import Any, Self

import torch

from hetegen_compile.errors import ScheduleError

_NOTHING = object()


class Promise:
    """The result of an operation of the worker, named by its node; or an item of one, which is a list by then."""

    def __init__(self, node: str, source: Promise | None = None, index: int = 0) -> None:
        self.node = node
        self._source = source
        self._index = index
        self._value: Any = _NOTHING

    def __getitem__(self, index: int) -> Self:
        return type(self)(self.node, self, index)

    def place_in(self, source: Promise) -> int | None:
        """Which item of ``source`` it is; None: it is none."""
        return self._index if self._source is source else None

    @property
    def known(self) -> bool:
        """Whether ``kept`` has an answer by now."""
        return self._value is not _NOTHING if self._source is None else self._source.known

    def keep(self, value: Any) -> None:
        """The worker has computed it, or will have filled it."""
        self._value = value

    def kept(self) -> Any:
        """The value. The worker asks for what it did before; whoever prepares its work asks where it will lie."""
        if self._source is not None:
            return self._source.kept()[self._index]
        assert self._value is not _NOTHING, f"{self.node} is done before whatever reads it"
        return self._value


def kept_in(argument: Any) -> Any:
    """An argument with the values of all promises in it, also in lists, tuples, dicts and slices."""
    if isinstance(argument, Promise):
        return argument.kept()
    if isinstance(argument, list) or type(argument) is tuple:
        return type(argument)(map(kept_in, argument))
    if isinstance(argument, slice):
        return slice(kept_in(argument.start), kept_in(argument.stop), kept_in(argument.step))
    if isinstance(argument, dict):
        return {key: kept_in(value) for key, value in argument.items()}
    return argument


def as_promised(node: str, tensor: object, like: torch.Tensor) -> torch.Tensor:
    """A result that goes up as it was said to be, or ScheduleError."""
    if not isinstance(tensor, torch.Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ScheduleError(f"{node} sends {tensor!r:.80} up in the place of {tuple(like.shape)} {like.dtype}")
    return tensor


__all__ = ["Promise", "as_promised", "kept_in"]
