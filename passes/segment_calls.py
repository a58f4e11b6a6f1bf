"""Calls of compiled segments: through torch's layers or past them, with results that lie as the graph says.

Why: of a small segment's call on the host thread half is spent around its code, in what AOTAutograd may have to do
before and behind it. ``hetegen_compile/steps/segments.py`` knows for which segments it has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor
from torch.fx.experimental.proxy_tensor import py_sym_types

from hetegen_compile.passes.tensors import to_expr

BoxedCode = Callable[[list[Any]], Any]
"""Compiled code; takes the inputs in a list, which it empties."""


@dataclass(frozen=True)
class CompiledCall:
    """A compiled segment around whose code torch has nothing to do.

    Attributes:
        function: takes the segment's inputs one by one. It owns the code: ``boxed`` must not outlive it.
        boxed: the code without what torch does around it (its records for the profiler, too). Gradients have to be off,
            as they are in a step.
    """

    function: Callable[..., Any]
    boxed: BoxedCode

    def __call__(self, *args: Any) -> Any:
        """All of it, for the first call of a place in a graph: torch ends there what its compilation had begun."""
        return self.function(*args)


def with_declared_strides(function: Callable[..., Any], outputs: Sequence[Tensor]) -> Callable[..., Any]:
    """``function`` with each output laid out in memory as the graph's fake values say.

    Inductor's decompositions may change an output's strides (``cat`` of one tensor that is not empty becomes a
    clone of its layout), but the next segment and the host's twin count on eager's. Which outputs need a copy
    is found at the first call: code and layouts do not change between calls. A ``CompiledCall`` is boxed from then on.
    """
    orders = [_memory_order(output) for output in outputs]
    wrong: list[int] | None = None
    boxed: BoxedCode | None = None

    def call(*args: Any) -> Any:
        nonlocal wrong, boxed
        results = function(*args) if boxed is None else boxed(list(args))
        if wrong is None:
            wrong = [i for i, order in enumerate(orders) if order is not None and not _has_order(results[i], order)]
            boxed = function.boxed if isinstance(function, CompiledCall) else None
        if not wrong:
            return results
        return [_laid_out(r, orders[i]) if i in wrong else r for i, r in enumerate(results)]

    return call


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions from the slowest to the fastest of a dense tensor; None for one with gaps or overlaps.

    Dense at every size: what is cut from something longer has gaps except where the graph was captured, perhaps.
    """
    order = sorted(range(tensor.dim()), key=lambda d: (-_hint(tensor.stride(d)), d))
    expected = sympy.Integer(1)
    for d in reversed(order):
        size = to_expr(tensor.shape[d])
        if size != 1 and sympy.expand(to_expr(tensor.stride(d)) - expected) != 0:
            return None
        expected *= size
    return tuple(order)


def _hint(value: Any) -> int:
    return int(value.node.hint) if isinstance(value, py_sym_types) else int(value)


def _has_order(tensor: Tensor, order: tuple[int, ...]) -> bool:
    return tensor.permute(order).is_contiguous()


def _laid_out(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    if order is None:
        return tensor
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


__all__ = ["BoxedCode", "CompiledCall", "with_declared_strides"]
