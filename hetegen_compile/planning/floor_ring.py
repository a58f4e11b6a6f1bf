"""The path of a step beside a link that can run ahead by the staging ring only, for the step's floor.

Behind a gate (``floor_path``) lie the Linears that need an activation which all others are needed for. When that
activation is there, no row of these has been used, so what the link has brought of them lies in the ring; the rest of
those that are streamed has to come afterwards, while host and accelerator work on the rest of the path. Before the gate
lies the path up to it, each trip at the shares that are best for it alone, and all that has to be issued up to there.
Inside of a block that may be cut as one is no such place (its Linears are one trip): the accelerator's part of the
intermediate is there before the host's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from hetegen_compile.cost_model import Chain, Trip, relax
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.predict_step import issue_s
from hetegen_compile.planning.floor_path import Blocks, Order, Stretch, chain_of

_GATES = 8  # at the end of the path, and as many spread over the rest: each is a balance more


def short_ring_s(
    path: Sequence[Stretch], linears: Mapping[fx.Node, Trip], blocks: Blocks, order: Order, context: Context
) -> float:
    """The longest that the path takes to a gate and, with one ring of rows ahead, from there to the end, in seconds.

    0 where the ring holds all that is offloaded.
    """
    ring_s = _ring_s(linears, context)
    links_s = [sum(trip.link_s for trip in one.trips) for one in path]
    gates = [i for i in range(1, len(path)) if sum(links_s[i:]) > ring_s > 0]
    some = [*gates[: -_GATES : max(1, len(gates) // _GATES)], *gates[-_GATES:]]
    issued_s = {node: _least_issue_s(node, blocks, context) for node in order.nodes}
    issued_s = {node: seconds for node, seconds in issued_s.items() if seconds}
    issuing = order.bits(issued_s)

    def until_s(i: int) -> float:
        gate = path[i].begin
        needed = order.those_of(order.needed_for(gate) & issuing) if gate is not None else ()
        issuing_s = sum(issued_s[node] for node in needed)
        return max(issuing_s, sum(one.least_s for one in path[:i]))

    return max((until_s(i) + relax(_behind(path[i:]), ring_s).bound_s for i in some), default=0.0)


def _behind(path: Sequence[Stretch]) -> Chain:
    """The rest of a path; what its host parts read may cost the link time before it, so none of that counts."""
    chain = chain_of(path)
    return replace(chain, trips=tuple(replace(trip, lost_s=0.0) for trip in chain.trips))


def _ring_s(linears: Mapping[fx.Node, Trip], context: Context) -> float:
    """The most seconds of the link that what the staging ring holds can have taken; 0 without one."""
    ring_bytes = require(context.residency, "choose_residency").ring_bytes
    plans, costs = require(context.splits, "choose_splits"), require(context.costs, "annotate_costs")
    offloaded = [(node, plans[info(node).position]) for node in linears]
    byte_s = [
        linears[node].link_s / (costs[info(node).position].weight_bytes * (1.0 - plan.resident_rows / plan.rows))
        for node, plan in offloaded
        if plan.resident_rows < plan.rows
    ]
    return ring_bytes * max(byte_s, default=0.0)


def _least_issue_s(node: fx.Node, blocks: Blocks, context: Context) -> float:
    """What the host's thread issues of a node whatever the shares: segments, and Linears with resident rows."""
    if node.target == LINEAR:
        there = require(context.splits, "choose_splits")[info(node).position].resident_rows > 0
        return context.profile.accelerator.issuing_s(segment=False) if there else 0.0
    return issue_s(node, context) if node.op == "call_module" and node not in blocks.segments else 0.0


__all__ = ["short_ring_s"]
