"""Streamed rows are cut where the staging ring ends, so that no bytes of it are lost there.

Why: slots follow each other around the ring, and one that does not fit before its end begins at its start again. With
slots of a quarter of the ring that costs up to a quarter of the link's lead in every lap. And offsets are the same in
every step: the first slot lies at 0, so the last one should end where the ring does. The part of the ring that is used
is therefore as long as the streamed bytes make full laps of it, unless that leaves too much unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from hetegen_compile.cost_model import row_granularity
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.choose_residency import SLOT_ALIGNMENT
from hetegen_compile.passes.choose_splits import chunk_bytes, slice_bytes
from hetegen_compile.passes.context import Context, LinearPlan, Splits, require

LEAST_USED = 0.75
"""Share of the ring that has to be used: with less the link cannot run ahead far enough."""
_LEAST_SLOT = 0.125  # of a chunk: a smaller slot costs more issue than its bytes are worth


def fit_ring(module: fx.GraphModule, splits: Splits, context: Context) -> Splits:
    """The same rows, those that are streamed cut anew into chunks that tile the ring.

    Chunks of a block cover several ranges at once and stay as they are.
    """
    linears = [node for node in module.graph.find_nodes(op="call_function", target=LINEAR)]
    plans = [(node, splits[info(node).position]) for node in linears]
    total = sum(plan.streamed_rows * _row_bytes(node, plan) for node, plan in plans)
    if not total:
        return splits
    granule = max(row_granularity(plan.rows) * _row_bytes(node, plan) for node, plan in plans)
    cutter = _Cutter(used_bytes(total, require(context.residency, "choose_residency").ring_bytes, granule))
    return {info(node).position: _fitted(node, plan, cutter, context) for node, plan in plans}


def _fitted(linear: fx.Node, plan: LinearPlan, cutter: _Cutter, context: Context) -> LinearPlan:
    row_bytes = _row_bytes(linear, plan)
    if plan.block is not None:
        cutter.leave(plan, row_bytes)
        return plan
    most = chunk_bytes(linear.args[1], context)  # type: ignore[arg-type]
    return replace(plan, streamed=tuple(cutter.cut(plan, row_bytes, most)))


def _row_bytes(linear: fx.Node, plan: LinearPlan) -> int:
    return slice_bytes(linear.args[1], plan.axis)  # type: ignore[arg-type]


def used_bytes(total: int, ring_bytes: int, granule: int = 0) -> int:
    """How much of the ring is used by ``total`` streamed bytes, cut to multiples of up to ``granule``."""
    laps = -(-total // ring_bytes)
    used = min(ring_bytes, -(-total // laps) + granule)
    return used if used >= LEAST_USED * ring_bytes or laps == 1 else ring_bytes


class _Cutter:
    """Cuts rows one plan after the other; ``head`` is where the next slot begins."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._head = 0

    def cut(self, plan: LinearPlan, row_bytes: int, chunk: int) -> Iterator[tuple[int, int]]:
        step = row_granularity(plan.rows)
        lo, end = plan.host, plan.host + plan.streamed_rows
        while lo < end:
            rows = min(end - lo, self._rows(end - lo, row_bytes, chunk, step))
            yield lo, lo + rows
            lo += rows
            self._head += -(-rows * row_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    def leave(self, plan: LinearPlan, row_bytes: int) -> None:
        """Go on behind the slots of a plan that is not cut anew."""
        slots = len(plan.lines) or len(plan.streamed)
        for _ in range(slots):
            nbytes = plan.streamed_rows * row_bytes // slots
            self._head = (0 if self._head + nbytes > self._length else self._head) + nbytes

    def _rows(self, left: int, row_bytes: int, chunk: int, step: int) -> int:
        """Rows of the next chunk: an equal part of those that are left, less what is beyond the end of the ring."""
        most = max(step, chunk // row_bytes // step * step)
        pieces = -(-left // most)
        rows = min(most, -(-left // pieces // step) * step)
        room = (self._length - self._head) // row_bytes // step * step
        if rows <= room or left <= room:
            return rows
        if room * row_bytes < _LEAST_SLOT * chunk:
            self._head = 0
            return rows
        return max(step, room)


__all__ = ["fit_ring", "used_bytes"]
