"""Calls of a graph that were propagated before, on operands of the same geometry: layers are alike.

Why: the layers of a deep model run the same operations on tensors of the same shapes, and a call on fake tensors takes
a few hundred microseconds, mostly in torch's decompositions. What a call makes of operands of the same dtypes, sizes
and strides is another tensor of the same geometry, as long as it only reads them and makes new memory. Everything else
(writes, random numbers, what depends on data, and views, which only torch's own dispatch marks as such) is propagated
each time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hetegen_compile.geometry import storage_id
from hetegen_compile.passes.fake_inputs import another_fake
from hetegen_compile.passes.tensors import to_expr

_PLAIN = (
    int, float, bool, str, type(None), EllipsisType, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class _NotComparable(Exception):
    """An operand of which two that look the same may differ in more than their values."""


@dataclass(frozen=True)
class _Call:
    """What a call made, and what was listened to meanwhile."""

    result: Tensor
    heard: dict[str, Any]


class EqualCalls:
    """What has been propagated in a fake mode, by operation and operands."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._calls: dict[Hashable, _Call] = {}
        self._seen: set[int] = set()  # storages of operands and results, all of them alive

    def key(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Hashable | None:
        """What the result's geometry depends on; None if that cannot be said."""
        if node.op not in ("call_function", "call_method"):
            return None
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        try:
            return node.op, node.target, autocast, _key(list(args)), _key(kwargs)
        except _NotComparable:
            return None

    def again(self, key: Hashable | None) -> _Call | None:
        """A new result as the call with this key has made, and what it does; None if there was none."""
        known = self._calls.get(key)
        return None if known is None else _Call(another_fake(known.result, self._mode), dict(known.heard))

    def note(self, key: Hashable | None, result: Any, heard: dict[str, Any], operands: Sequence[Tensor]) -> None:
        """Keep a call that was propagated, if another one would be the same."""
        self._seen.update(map(storage_id, operands))
        if key is not None and type(result) is FakeTensor and self._is_new(result) and not _does_more(heard):
            self._calls[key] = _Call(result, dict(heard))
        if isinstance(result, Tensor):
            self._seen.add(storage_id(result))

    def _is_new(self, result: FakeTensor) -> bool:
        """Whether it lies in memory of its own, all of which it shows."""
        if storage_id(result) in self._seen or result.constant is not None or not _is_ordinary(result):
            return False
        return bool(_storage_bytes(another_fake(result, self._mode)) == _storage_bytes(result))


def _does_more(heard: dict[str, Any]) -> bool:
    """Whether a call does more than to read its operands and to make its result."""
    return bool(heard["writes"] or heard["random"] or heard["data_dependent"])


def _storage_bytes(tensor: Tensor) -> sympy.Expr:
    return to_expr(tensor.untyped_storage().nbytes())


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether dtype, sizes and strides say all about its geometry."""
    strange = tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
    return tensor.layout == torch.strided and not strange


def _key(value: Any) -> Hashable:
    """A nest of operands as something that is equal for operands of the same geometry."""
    if isinstance(value, Tensor):
        return _tensor_key(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in value.items())
    if isinstance(value, torch.SymInt):
        return torch.SymInt, to_expr(value)
    if isinstance(value, slice):
        return slice, _key(value.start), _key(value.stop), _key(value.step)
    raise _NotComparable


def _tensor_key(tensor: Tensor) -> Hashable:
    if not isinstance(tensor, FakeTensor) or tensor.constant is not None or not _is_ordinary(tensor):
        raise _NotComparable
    sizes = [*tensor.shape, *tensor.stride(), tensor.storage_offset()]
    geometry = tuple(size if type(size) is int else to_expr(size) for size in sizes)
    return type(tensor), tensor.dtype, tensor.device, tensor.is_inference(), geometry


__all__ = ["EqualCalls"]
