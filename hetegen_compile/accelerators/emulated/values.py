"""What a schedule holds for the emulated accelerator: futures of device tensors, transfers, slots, tokens.

All of them refuse to be used as tensors: whatever torch function touches one is a missing wait, and the error
names the node that produces the value and the function that wanted it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from hetegen_compile.accelerators.emulated.clocks import Access, Clock
from hetegen_compile.accelerators.promises import Promise
from hetegen_compile.accelerators.ring import Slot
from hetegen_compile.errors import MissingWaitError, ScheduleError


class Deferred:
    """A thing that has a producing node and no bytes for the host to see."""

    node: str

    def refuse(self, user: str) -> NoReturn:
        """Raise the error of using this without the wait that the schedule owes."""
        raise MissingWaitError(
            f"{user} uses {self.node} without the wait it owes: a host operation needs "
            f"to_host + wait_host, an accelerator operation needs wait"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        """Any torch function that meets a deferred value refuses it."""
        user = f"torch function {getattr(func, '__name__', repr(func))!r}"
        for value in deferred_in((args, dict(kwargs or {}))):
            value.refuse(user)
        raise TypeError(f"{user} met a deferred value in an argument that cannot be searched")

    def __getattr__(self, name: str) -> Any:
        """Tensor attributes (``shape``, ``cpu``, ...) of a deferred value are refused, too."""
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.refuse(f"attribute {name!r}")


def deferred_in(argument: object) -> Iterator[Deferred]:
    """Every deferred value in an argument, also inside lists, tuples, dicts and slices."""
    if isinstance(argument, Deferred):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from deferred_in(item)
    elif isinstance(argument, dict):
        for item in argument.values():
            yield from deferred_in(item)
    elif isinstance(argument, slice):
        yield from deferred_in((argument.start, argument.stop, argument.step))


class HostPromise(Promise, Deferred):
    """A promise of the worker, which is no tensor yet."""


UNFINISHED = object()
"""The data of a value whose stream did not get there yet."""


class Occupancy:
    """The time from filling a part of a ring (the staging ring, the pinned ring) to its release."""

    __slots__ = ("end", "node", "released", "start")

    def __init__(self, node: str, start: int, nbytes: int) -> None:
        self.node = node
        self.start = start
        self.end = start + nbytes
        self.released: Access | None = None

    def overlaps(self, other: Occupancy) -> bool:
        """Whether the two share bytes of the ring."""
        return self.start < other.end and other.start < self.end


class Staged(NamedTuple):
    """Where a stage puts its rows: a slot of the pinned ring, and the time for which it holds them."""

    slot: Slot
    occupancy: Occupancy


class DeviceTensor(Deferred):
    """The future of one device tensor.

    Attributes:
        node: name of the node that produces it.
        writer: its last write.
        readers: downloads that may still be reading it.
        occupancy: the ring bytes it lies in, if it was prefetched.
        borrowed: it is a view of a host tensor, which nothing may write.
        arrived: its transfer, if it has one, has been waited for (also where there is nothing to wait for).
        data: the tensor, ``UNFINISHED`` until the stream got there.
    """

    def __init__(
        self, writer: Access, *, occupancy: Occupancy | None = None, borrowed: bool = False, arrived: bool = True
    ) -> None:
        self.node = writer.node
        self.writer = writer
        self.readers: list[Access] = []
        self.occupancy = occupancy
        self.borrowed = borrowed
        self.arrived = arrived
        self.data: Any = UNFINISHED

    def tensor(self) -> torch.Tensor:
        """The finished tensor; for the stream that computes with it."""
        if self.data is UNFINISHED:
            raise ScheduleError(f"{self.node} has no tensor: the step that makes it failed")
        if not isinstance(self.data, torch.Tensor):
            raise ScheduleError(f"{self.node} has no tensor: it returned {self.data!r}")
        return self.data

    def __repr__(self) -> str:
        return f"DeviceTensor({self.node!r})"


@dataclass(eq=False)
class Transfer(Deferred):
    """A started copy: ``wait`` gives its device value, ``wait_host`` its host tensor, a prefetch reads a stage.

    ``done`` is None where nothing has to be waited for; ``value`` is None for downloads, whose task keeps the
    value alive until it is copied, for stages, whose ``staged`` says where in the pinned ring they copy to, and for
    uploads of activations, which have a list of ``values``.
    ``failure`` is what a prefetch for the next step raised.
    """

    node: str
    kind: str
    access: Access
    clock: Clock
    value: DeviceTensor | None = None
    done: threading.Event | None = None
    host_tensors: list[torch.Tensor] | None = None
    single: bool = True
    staged: Staged | None = None
    carried: bool = False
    failure: BaseException | None = None
    values: Sequence[DeviceTensor] = ()

    def fail(self, error: BaseException) -> None:
        """Keep what the copy raised for whoever waits for it."""
        self.failure = error

    def check(self) -> None:
        """Raise what the copy raised."""
        if self.failure is not None:
            raise self.failure


@dataclass(eq=False)
class Token(Deferred):
    """What ``release`` leaves behind: the clock and the event of compute at that point."""

    node: str
    clock: Clock
    done: threading.Event = field(repr=False)
