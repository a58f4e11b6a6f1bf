"""What comes over the link for one part: a stage where the weight is not pinned, a prefetch, its wait and release."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import NodeInfo

UNASSIGNED = -1
"""Offset of a prefetch whose slot the scheduler has not assigned yet."""

Call = Callable[..., fx.Node]
"""Makes a node of (target, arguments, notes); ``side`` may be said to be another than that of the notes."""


def of_slot(
    call: Call, weight: fx.Node, ranges: list[int], dim: int, notes: NodeInfo, staged: Collection[str],
    part: Callable[[fx.Node], fx.Node],
) -> fx.Node:  # fmt: skip
    """What ``part`` makes of the ranges of a weight that a prefetch brings; their slot is free behind it.

    Args:
        call: makes the nodes.
        weight: the placeholder.
        ranges, dim: what of it, as ``ir.PREFETCH`` has them.
        notes: on what the prefetch brings.
        staged: names of the placeholders that go through the pinned ring.
        part: reads what has come.
    """
    source: Any = weight
    if weight.name in staged:
        source = call(ir.STAGE, (weight, ranges, dim, UNASSIGNED, []), notes, side=None)
        ranges, dim = [0, int(notes.value.shape[0])], 0
    transfer = call(ir.PREFETCH, (source, ranges, dim, UNASSIGNED, []), notes)
    found = part(call(ir.WAIT, (transfer,), notes))
    call(ir.RELEASE, (transfer,), notes)
    return found


__all__ = ["UNASSIGNED", "Call", "of_slot"]
