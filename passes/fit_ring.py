"""Streamed rows are cut where the staging ring ends, so that no bytes of it are lost there.

Why: slots follow each other around the ring, and one that does not fit before its end begins at its start again. With
slots of a quarter of the ring that costs up to a quarter of the link's lead in every lap. And offsets are the same in
every step: the first slot lies at 0, so the last one should end where the ring does. The part of the ring that is used
is therefore as long as the streamed bytes make full laps of it, unless that leaves too much unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from torch import fx

from hetegen_compile.cost_model import row_granularity
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.operands import weight_of
from hetegen_compile.passes.choose_residency import SLOT_ALIGNMENT, aligned
from hetegen_compile.passes.choose_splits import chunk_bytes, slice_bytes
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.plans import LinearPlan, Splits

LEAST_USED = 0.75
"""Share of the ring that has to be used: with less the link cannot run ahead far enough."""
_LEAST_SLOT = 0.125  # of a chunk: a smaller slot costs more issue than its bytes are worth


def fit_ring(module: fx.GraphModule, splits: Splits, context: Context, chunks: int | None = None) -> Splits:
    """The same rows, those that are streamed cut anew into chunks that tile the ring.

    ``chunks``: how many of the longest the ring holds, if another number than residency has chosen.
    """
    linears = [node for node in module.graph.find_nodes(op="call_function", target=LINEAR)]
    plans = [(node, splits[info(node).position]) for node in linears]
    total = sum(plan.streamed_rows * slice_bytes(weight_of(node), plan.axis) for node, plan in plans)
    if not total:
        return splits
    granule = max(row_granularity(plan.rows) * slice_bytes(weight_of(node), plan.axis) for node, plan in plans)
    residency = require(context.residency, "choose_residency")
    cutter = _Cutter(_used_bytes(total, residency.ring_bytes, granule))
    if chunks is not None:
        chunk = residency.ring_bytes // chunks // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        context = replace(context, residency=replace(residency, chunk_bytes=chunk))
    return {**splits, **{info(node).position: _fitted(node, plan, cutter, context) for node, plan in plans}}


def _fitted(linear: fx.Node, plan: LinearPlan, cutter: _Cutter, context: Context) -> LinearPlan:
    weight = weight_of(linear)
    most = chunk_bytes(weight, context)
    if plan.lines:
        line_bytes = plan.streamed_rows * int(info(weight).value.element_size())
        lines = plan.lines[-1][1]
        return replace(plan, lines=tuple(cutter.cut(0, lines, line_bytes, most, row_granularity(lines))))
    row_bytes = slice_bytes(weight, plan.axis)
    step = row_granularity(plan.rows // plan.ways)
    ranges = [cutter.cut(lo, hi, row_bytes, most, step) for lo, hi in _whole_ranges(plan)]
    return replace(plan, streamed=tuple(chain.from_iterable(ranges)))


def _whole_ranges(plan: LinearPlan) -> list[tuple[int, int]]:
    """What is streamed in one piece each: behind the host's part of each way up to the resident rows."""
    if not plan.streamed:
        return []
    if plan.ways == 1:
        return [(plan.streamed[0][0], plan.streamed[-1][1])]
    width, host = plan.rows // plan.ways, plan.host // plan.ways
    return [(way * width + host, (way + 1) * width) for way in range(plan.ways)]


def _used_bytes(total: int, ring_bytes: int, granule: int) -> int:
    """How much of the ring is used by ``total`` streamed bytes, cut to multiples of up to ``granule``."""
    laps = -(-total // ring_bytes)
    used = min(ring_bytes, -(-total // laps) + granule)
    return used if used >= LEAST_USED * ring_bytes or laps == 1 else ring_bytes


class _Cutter:
    """Cuts rows one plan after the other; ``head`` is where the next slot begins."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._head = 0

    def cut(self, lo: int, end: int, row_bytes: int, chunk: int, step: int) -> Iterator[tuple[int, int]]:
        while lo < end:
            rows = min(end - lo, self._rows(end - lo, row_bytes, chunk, step))
            yield lo, lo + rows
            lo += rows
            self._head += aligned(rows * row_bytes)

    def _rows(self, left: int, row_bytes: int, chunk: int, step: int) -> int:
        """Rows of the next chunk: an equal part of those that are left, less what is beyond the end of the ring."""
        most = max(step, chunk // row_bytes // step * step)
        pieces = -(-left // most)
        rows = min(most, -(-left // pieces // step) * step)
        room = (self._length - self._head) // row_bytes // step * step
        if rows <= room:
            return rows
        if room < step or room * row_bytes < _LEAST_SLOT * chunk:
            self._head = 0
            return rows
        return room


__all__ = ["fit_ring"]
