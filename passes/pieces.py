"""Pieces of memory of a schedule: which of its values lie in one, and which in none of the accelerator's.

A join of one part is that part, parts of streamed experts are written into those before them, and what goes up in a
small transfer is read where it lies in host memory.
"""

from __future__ import annotations

from collections.abc import Container

import sympy
from torch import Tensor, fx

from hetegen_compile import ir
from hetegen_compile.ir import info
from hetegen_compile.operands import grouped_part
from hetegen_compile.passes.tensors import tensors_in, to_expr


def passed_on(node: fx.Node, written: Container[int]) -> fx.Node | None:
    """The part that a join of one part is, or those that a part of experts is written into.

    None of anything else, and of a copy, which a join makes of what is ``written`` later (storages).
    """
    if node.target == ir.PARTIAL_GROUPED:
        others: fx.Node | None = grouped_part(node).others
        return others
    if node.target != ir.JOIN or any(key in written for key in info(node).storages):
        return None
    parts = node.all_input_nodes
    return parts[0] if len(parts) == 1 and len(node.args[0]) == 1 else None  # type: ignore[arg-type]


def sent_bytes(transfer: fx.Node) -> sympy.Expr:
    """Bytes that a transfer up sends: from the first to the last of each tensor, gaps between elements included."""
    return sympy.Add(*map(_span_bytes, tensors_in(info(transfer).value)))


def taken_by(transfer: fx.Node, size: sympy.Expr) -> sympy.Expr:
    """Bytes of the accelerator's that ``size`` bytes which a transfer brings take: none if it is read in place."""
    beyond = sent_bytes(transfer) - ir.VIEWED_UPLOAD_BYTES
    return size * sympy.Min(1, sympy.Max(0, beyond))


def _span_bytes(tensor: Tensor) -> sympy.Expr:
    steps = zip(map(to_expr, tensor.shape), map(to_expr, tensor.stride()), strict=True)
    return (sympy.Add(*((size - 1) * step for size, step in steps)) + 1) * tensor.element_size()


__all__ = ["passed_on", "sent_bytes", "taken_by"]
