"""The trips of a grouped graph to the host and back: as a chain for the balance, and as rows of its Linears."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

from torch import fx

from hetegen_compile.cost_model import Chain, Trip, row_granularity
from hetegen_compile.ir import GROUPED, info
from hetegen_compile.operands import weight_of, x_of
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.choose_splits import (
    block_splits,
    feed_s,
    linears_of,
    lines_s,
    lost_feed_s,
    nearest_rows,
    slice_bytes,
    with_host_rows,
)
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import Block
from hetegen_compile.passes.node_work import node_work, trip_s
from hetegen_compile.passes.plans import LinearPlan, Splits
from hetegen_compile.passes.stream_experts import cost_of, grouped_nodes, with_host_experts


@dataclass(frozen=True)
class Group:
    """Linears that share a trip: those that read one activation, or those of a block that is cut as one."""

    linears: tuple[fx.Node, ...]
    block: Block | None = None


Trips = list[Group]


def trips_of(module: fx.GraphModule, blocks: Sequence[Block] = ()) -> Trips:
    """Linears that read the same activation, in program order; those of ``blocks`` at the place of their first one.

    A product with streamed experts is a trip of its own.
    """
    linears = dict(sorted({**linears_of(module), **grouped_nodes(module)}.items()))
    block_of = {position: block for block in blocks for position in block.linears}
    groups: dict[object, Group] = {}
    for position, node in linears.items():
        block = block_of.get(position)
        key: object = (GROUPED, node) if node.target == GROUPED else block or x_of(node)  # which may be a product
        others = groups[key].linears if key in groups else ()
        groups[key] = Group((*others, node), block)
    return list(groups.values())


def step_chain(module: fx.GraphModule, trips: Trips, context: Context) -> Chain:
    """A grouped graph as a chain of trips and the accelerator's segments between them.

    What the accelerator does before it needs the host's part of a trip (attention beside an MLP that reads the same
    input) is its own work of that trip.
    """
    nodes = list(module.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    serial_s = {node: node_work(node, context).seconds for node in nodes if node.op == "call_module"}
    own = [_trip(group, context) for group in trips]
    place = {node: index for index, group in enumerate(trips) for node in group.linears}
    offloaded = {node for node, index in place.items() if own[index].link_s}
    alone_s = {node: cost_of(node, context).accelerator_s for node in place if node not in offloaded}
    for index, group in enumerate(trips):
        if not own[index].link_s:
            continue
        begin = group.linears[-1] if group.block is None else x_of(group.linears[0])
        for node in _beside(islice(nodes, position[begin] + 1, None), group, offloaded, context):
            linear_s = alone_s.pop(node, 0.0)
            if linear_s:
                own[place[node]] = _with_beside(own[place[node]], -linear_s)
            own[index] = _with_beside(own[index], serial_s.pop(node, 0.0) + linear_s)
    return Chain(tuple(own), sum(serial_s.values()))


def _beside(
    following: Iterable[fx.Node], group: Group, offloaded: Collection[fx.Node], context: Context
) -> Iterator[fx.Node]:
    """Of what follows, all up to the first reader of a result of the trip that is not all resident, less its own.

    And up to the next Linear that the host may have a part of. The result of a block that is cut as one is that of its
    last Linear.
    """
    linears = group.linears if group.block is None else group.linears[-1:]
    results = {node for node in linears if _offloaded_bytes(node, context)}
    for node in following:
        if node in group.linears:
            continue
        if node in offloaded or not results.isdisjoint(node.all_input_nodes):
            return
        yield node


def _with_beside(trip: Trip, seconds: float) -> Trip:
    return replace(trip, accelerator_s=trip.accelerator_s + seconds)


def _trip(group: Group, context: Context) -> Trip:
    costs = require(context.costs, "annotate_costs")
    host_s = link_s = lost_s = accelerator_s = saved_s = 0.0
    for node in group.linears:
        cost, offloaded = cost_of(node, context), _offloaded_share(node, context)
        host_s += offloaded * cost.host_s
        link_s += offloaded * feed_s(node, cost, context)
        lost_s += offloaded * lost_feed_s(node, cost, context)
        accelerator_s += cost.accelerator_s
        saved_s += offloaded * cost.accelerator_s
    launch_s = context.profile.accelerator.launch_s
    fixed_s = trip_s(group.linears[0], context) + 2 * launch_s  # issuing the way up, and a join
    if group.block is not None:
        link_s += lines_s(group.block, {info(node).position: node for node in group.linears}, context)
        fixed_s += sum(costs[position].host_s for position in group.block.region)
    return Trip(host_s, link_s, accelerator_s, saved_s, fixed_s, lost_s)


def with_shares(trips: Trips, shares: Sequence[float], context: Context) -> Splits:
    """The rows of every Linear with a share of each trip's offloaded rows on the host, to the nearest granule."""
    splits: dict[int, LinearPlan] = {}
    for group, share in zip(trips, shares, strict=True):
        linears = {info(node).position: node for node in group.linears}
        if group.block is not None:
            columns = nearest_rows(share, group.block.columns, row_granularity(group.block.columns))
            splits |= block_splits(group.block, linears, columns, context)
        elif group.linears[0].target == GROUPED:
            splits |= _experts(*linears.items(), share=share, context=context)
        else:
            splits |= _one_after_the_other(linears, share, context)
    return splits


def whole_shares(trips: Trips, context: Context) -> list[tuple[float, ...]]:
    """For each trip the shares at which none of its Linears, which go to the host in order, is in two places."""
    return [_whole_shares(group, context) for group in trips]


def _whole_shares(group: Group, context: Context) -> tuple[float, ...]:
    if group.block is not None:
        return 0.0, 1.0
    ends = [0, *accumulate(_offloaded_bytes(node, context) for node in group.linears)]
    return tuple(end / ends[-1] for end in ends) if ends[-1] else (0.0,)


def _experts(product: tuple[int, fx.Node], *, share: float, context: Context) -> Splits:
    """A share of the experts of a product on the host, to the nearest one."""
    position, node = product
    stack = weight_of(node)
    host = round(share * int(info(stack).value.shape[0]))
    return {position: with_host_experts(stack, host, require(context.residency, "choose_residency"))}


def _offloaded_share(node: fx.Node, context: Context) -> float:
    if node.target == GROUPED:
        return 1.0
    plan = with_host_rows(node, 0, context)
    return 1.0 - plan.resident_rows / plan.rows


def _offloaded_bytes(node: fx.Node, context: Context) -> int:
    weight = weight_of(node)
    if node.target == GROUPED:
        return value_bytes(weight, context)
    residency = require(context.residency, "choose_residency")
    first_resident = residency.weights.get(weight.name, int(info(weight).value.shape[0]))
    return first_resident * slice_bytes(weight, 0)


def _one_after_the_other(linears: Mapping[int, fx.Node], share: float, context: Context) -> Splits:
    """A share of the offloaded bytes of Linears that share a trip on the host: of the first ones all of their rows.

    At most one of them is in two places then. The same share of each would cost a prefetch, a product and a join more
    for each of them.
    """
    offloaded = [_offloaded_bytes(node, context) for node in linears.values()]
    left = share * sum(offloaded)
    splits: dict[int, LinearPlan] = {}
    for (position, node), nbytes in zip(linears.items(), offloaded, strict=True):
        weight = weight_of(node)
        row_bytes = slice_bytes(weight, 0)
        part = min(1.0, max(0.0, left / nbytes)) if nbytes else 0.0
        step = row_granularity(int(info(weight).value.shape[0]))
        host = nearest_rows(part, nbytes // row_bytes, step) if nbytes else 0
        left -= host * row_bytes
        splits[position] = with_host_rows(node, host, context)
    return splits
