"""The path of a step beside a link that can run ahead by the staging ring only, for the step's floor.

When the activation of one of its trips is there, no row of the Linears that read it, or of any behind them, has been
used. So what the link has brought of them lies in the ring (``cost_model.lead``), and the rest of those that are
streamed has to come afterwards, while host and accelerator work on the rest of the path. Inside of a block that may be
cut as one is no such place (its Linears are one trip): the accelerator's part of the intermediate is there before the
host's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from hetegen_compile.cost_model import Leg, Trip, least_step_s
from hetegen_compile.ir import GROUPED, info
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.schedule import PINNED_WINDOW
from hetegen_compile.passes.stream_experts import cost_of
from hetegen_compile.planning.floor_path import Stretch


def short_ring_s(path: Sequence[Stretch], linears: Mapping[fx.Node, Trip], context: Context) -> float:
    """The least seconds of the path with no more than a ring of rows ahead; 0 where a ring holds all of them.

    What host parts read may cost the link time before it, so none of that counts.
    """
    ring_s = _ring_s(linears, context)
    legs = _with_rows(path)
    return least_step_s(legs, ring_s) if sum(leg.trip.link_s for leg in legs) > ring_s > 0 else 0.0


def offloaded_share(node: fx.Node, context: Context) -> float:
    """The share of a Linear's rows that is not resident; streamed experts are not."""
    if node.target == GROUPED:
        return 1.0
    plan = require(context.splits, "choose_splits")[info(node).position]
    return 1.0 - plan.resident_rows / plan.rows


def _with_rows(path: Sequence[Stretch]) -> list[Leg]:
    """The path's trips that rows are offloaded of, with all that comes before the next one.

    A step follows the other: what comes before the first of them follows on the last.
    """
    trips: list[Trip] = []
    after_s = [0.0]
    for stretch in path:
        after_s[-1] += stretch.before_s
        for leg in stretch.legs:
            if leg.trip.link_s > 0:
                trips.append(replace(leg.trip, lost_s=0.0))
                after_s.append(leg.after_s)
            else:
                after_s[-1] += leg.trip.least_s + leg.after_s
    first_s, *others_s = after_s
    if others_s:
        others_s[-1] += first_s
    return [Leg(trip, seconds) for trip, seconds in zip(trips, others_s, strict=True)]


def _ring_s(linears: Mapping[fx.Node, Trip], context: Context) -> float:
    """The most seconds of the link that what the staging ring holds can have taken; 0 without one.

    Where weights go through the pinned ring, its slots as well: none is longer than the staging ring.
    """
    ring_bytes = require(context.residency, "choose_residency").ring_bytes
    byte_s = [
        linears[node].link_s / (cost_of(node, context).weight_bytes * share)
        for node in linears
        if (share := offloaded_share(node, context)) > 0.0
    ]
    return ring_bytes * (1 + PINNED_WINDOW * bool(context.staged)) * max(byte_s, default=0.0)


__all__ = ["offloaded_share", "short_ring_s"]
