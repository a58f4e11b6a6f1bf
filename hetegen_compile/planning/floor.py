"""The floor of a step: seconds that no schedule of this work on this hardware comes below, whatever it does.

It is the largest of four bounds. The simulation charges the same rates, so no simulated step is below it:

- **bytes**: host and link share the offloaded bytes of all Linears and of streamed experts, both at work all the time
  at the rates of the profile's tables for these tokens and sizes, each beside the other: what the host reads costs the
  link some of its time (``cost_model.link_lost_s``). For one rate each this is S / (V_link + V_cpu) for S offloaded
  bytes.
- **accelerator**: its segments, and its part of the Linears with as few rows as residency allows. It reads what the
  host makes of the others, or has all of their rows itself.
- **path** (``floor_path``): the longest chain of trips and segments of which each needs the results of the one before,
  at the best shares that the link's own work allows (``cost_model.relax``), with what the accelerator does beside it,
  and with no more of the link's work ahead of a trip than the staging ring holds (``floor_ring``).
- **thread**: what the host's thread does one after the other, at the best shares: its parts of Linears, its other
  operations (appending to a cache that the caller gets back), waits, and issuing segments, Linears and one prefetch of
  each that is streamed. Where a worker computes the host's parts (``issue_ahead``) the larger of the two threads' work
  counts; the one that issues has to issue a product of each Linear with resident rows, and of the others a prefetch and
  a product, or one way down for all that share a trip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from hetegen_compile.cost_model import Chain, Trip, host_linear_s, item_bytes, relax, upload_s
from hetegen_compile.ir import GROUPED, info
from hetegen_compile.operands import weight_of, x_of
from hetegen_compile.passes.annotate_costs import dtype_name, value_bytes
from hetegen_compile.passes.choose_splits import linears_of, pairable_blocks
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import NodeCost
from hetegen_compile.passes.issue_ahead import issues_ahead
from hetegen_compile.passes.node_work import (
    issue_s,
    least_read_s,
    least_thread_s,
    lies_on_host,
    node_work,
    untold_trip_s,
)
from hetegen_compile.passes.stream_experts import cost_of, grouped_nodes
from hetegen_compile.planning.floor_path import (
    Blocks,
    Order,
    Stretch,
    by_trip,
    chain_of,
    longest_path,
    with_both_ways,
)
from hetegen_compile.planning.floor_ring import offloaded_share, short_ring_s


@dataclass(frozen=True)
class Floor:
    """The four bounds, in seconds; see the module."""

    bytes_s: float
    accelerator_s: float
    path_s: float
    thread_s: float

    @property
    def seconds(self) -> float:
        """The largest of them."""
        return max(self.bytes_s, self.accelerator_s, self.path_s, self.thread_s)

    @property
    def bound(self) -> str:
        """The name of the largest: "bytes", "accelerator", "path" or "thread"; of equal ones the first."""
        named = {"bytes": self.bytes_s, "accelerator": self.accelerator_s, "path": self.path_s, "thread": self.thread_s}
        return max(named, key=named.__getitem__)


def floor_s(module: fx.GraphModule, context: Context) -> float:
    """Seconds below which no schedule of a grouped graph comes at the context's residency and sizes."""
    return floor(module, context).seconds


def floor(module: fx.GraphModule, context: Context) -> Floor:
    """The bounds of a step of a grouped graph at the context's residency and sizes."""
    parts = sorted((*linears_of(module).items(), *grouped_nodes(module).items()))
    linears = {node: _alone(node, context) for _, node in parts}
    order = Order(module.graph)
    blocks = _blocks(module, order, context)
    others = {node: _seconds(node, "accelerator", context) for node in module.graph.nodes if node not in linears}
    beside = {node: seconds for node, seconds in others.items() if seconds > 0 and node not in blocks.segments}
    on_host = {node: _seconds(node, "host", context) for node in module.graph.nodes if node not in linears}
    on_host = {node: seconds for node, seconds in on_host.items() if seconds > 0}
    path = longest_path(linears, beside, on_host, blocks, order, context)
    paths = [path, with_both_ways(path)] if any(one.shared for one in path) else [path]
    return Floor(
        bytes_s=relax(Chain(tuple(map(_bytes_only, linears.values())), 0.0)).bound_s,
        accelerator_s=sum(beside.values()) + _linears_s(linears, blocks, context),
        path_s=max(_path_s(one, linears, context) for one in paths),
        thread_s=_threads_s(module, linears, on_host, blocks, context),
    )


def _path_s(path: Sequence[Stretch], linears: Mapping[fx.Node, Trip], context: Context) -> float:
    return max(relax(chain_of(path)).bound_s, short_ring_s(path, linears, context))


def offloaded_together_s(module: fx.GraphModule, context: Context) -> float:
    """S / (V_link + V_cpu): the offloaded bytes of all Linears with the same share of each on the host."""
    linears = [_alone(node, context) for node in linears_of(module).values()]
    host_s, link_s = sum(trip.host_s for trip in linears), sum(trip.link_s for trip in linears)
    return host_s * link_s / (host_s + sum(trip.link_saved_s for trip in linears)) if link_s else 0.0


def _blocks(module: fx.GraphModule, order: Order, context: Context) -> Blocks:
    linears = linears_of(module)
    found = pairable_blocks(linears, context) if context.options.pair_mlp is not False else []
    segments = frozenset(
        segment
        for segment in module.graph.find_nodes(op="call_module")
        for block in found
        if order.needs(linears[block.consumer], segment)
        and any(order.needs(segment, linears[sibling]) for sibling in block.siblings)
    )
    reads = {linears[block.consumer]: x_of(linears[block.siblings[0]]) for block in found}
    return Blocks(reads, segments)


def _bytes_only(trip: Trip) -> Trip:
    return replace(trip, accelerator_s=0.0, accelerator_saved_s=0.0)


def _seconds(node: fx.Node, resource: str, context: Context) -> float:
    if node.op not in ("call_function", "call_method", "call_module"):
        return 0.0
    work = node_work(node, context)
    return work.seconds if work.resource == resource else 0.0


def _alone(node: fx.Node, context: Context) -> Trip:
    """A Linear at the best rates that any part of its rows could have; the trip itself is not in it.

    Or a product with streamed experts, computed in one piece.
    """
    if node.target == GROUPED:
        return _experts_alone(node, context)
    cost = require(context.costs, "annotate_costs")[info(node).position]
    offloaded = offloaded_share(node, context)
    launch_s = context.profile.accelerator.launch_s if 0.0 < offloaded < 1.0 else 0.0
    return Trip(
        host_s=offloaded * _least_host_s(node, cost, context),
        link_s=offloaded * _least_feed_s(node, cost, context),
        accelerator_s=cost.accelerator_s + 2 * launch_s,  # a product more, if any rows are streamed, and the join
        accelerator_saved_s=offloaded * cost.accelerator_s + launch_s,
        lost_s=0.0 if _is_staged(node, context) else offloaded * cost.link_lost_s,  # the pin thread may be slower
    )


def _experts_alone(node: fx.Node, context: Context) -> Trip:
    stack = weight_of(node)
    cost, nbytes = cost_of(node, context), value_bytes(stack, context)
    accelerator_s = node_work(node, context).seconds
    lost_s = 0.0 if _is_staged(node, context) else cost.link_lost_s
    return Trip(cost.host_s, _moving_s(nbytes, stack, context) * nbytes, accelerator_s, accelerator_s, lost_s=lost_s)


def _linears_s(linears: Mapping[fx.Node, Trip], blocks: Blocks, context: Context) -> float:
    """What the accelerator does at least of the Linears."""
    seconds = sum(trip.accelerator_s - trip.accelerator_saved_s for trip in linears.values())
    for group in by_trip(linears, blocks).values():
        offloaded_s = sum(linears[node].accelerator_saved_s for node in group)
        seconds += min(offloaded_s, least_read_s(group, context, blocks.consumers))
    return seconds


def _least_host_s(node: fx.Node, cost: NodeCost, context: Context) -> float:
    """The host computing all rows in parts of whatever size is read fastest."""
    weight = weight_of(node)
    dtype = dtype_name(info(weight).value)
    tables = context.profile.host.linear_bytes_per_s.values()
    widths = {1.0, min(1.0, item_bytes(dtype) / 4.0)}
    sizes = {size * width for table in tables for size, _ in table.curves for width in widths}
    return min(
        host_linear_s(context.profile, dtype, cost.tokens, size, cost.flops * size / cost.weight_bytes) / size
        for size in _up_to(sizes, cost.weight_bytes)
    ) * cost.weight_bytes  # fmt: skip


def _least_feed_s(node: fx.Node, cost: NodeCost, context: Context) -> float:
    """The link bringing all rows in parts of whatever size moves fastest, by way of the pinned ring if staged."""
    return _moving_s(cost.weight_bytes, weight_of(node), context) * cost.weight_bytes


def _moving_s(nbytes: int, weight: fx.Node, context: Context) -> float:
    """Seconds of each of a weight's bytes over the link."""
    sizes = {size for size, _ in context.profile.link.up.pinned.points}
    byte_s = min(upload_s(context.profile, size) / size for size in _up_to(sizes, nbytes))
    staged = weight.name in context.staged
    return max(byte_s, 1.0 / context.profile.pin_bytes_per_s) if staged else byte_s


def _is_staged(node: fx.Node, context: Context) -> bool:
    return weight_of(node).name in context.staged


def _up_to(sizes: Iterable[float], nbytes: int) -> set[float]:
    """The sizes below a weight's, and its own."""
    return {float(nbytes), *(size for size in sizes if size < nbytes)}


def _threads_s(
    module: fx.GraphModule, linears: Mapping[fx.Node, Trip], on_host: Mapping[fx.Node, float], blocks: Blocks,
    context: Context,
) -> float:  # fmt: skip
    """What the host's thread does at least: its operations, issuing segments and Linears, and its parts.

    Beside a worker, which may do its operations, too, there are two such threads: the busier one has half of it all.
    The parts are computed one at a time, whichever thread has them.
    """
    segments = module.graph.find_nodes(op="call_module")
    own_s = sum(on_host.values())
    issuing_s = _ends_s(module, linears, context)
    issuing_s += sum(issue_s(segment, context) for segment in segments if segment not in blocks.segments)
    groups = by_trip(linears, blocks).values()
    trips = _host_trips(groups, linears, [min(least_thread_s(node, context) for node in group) for group in groups])
    if issues_ahead(context):
        parts = _host_trips(groups, linears, [untold_trip_s(context)] * len(groups))
        halves = (replace(trip, host_s=trip.host_s / 2, fixed_s=trip.fixed_s / 2) for trip in trips.values())
        chains = Chain(tuple(parts.values()), 0.0), Chain(tuple(halves), (own_s + issuing_s) / 2)
        products_s = sum(_issued_ahead_s(group, context) for group in groups)
        return max(issuing_s + products_s, *(relax(chain).bound_s for chain in chains))
    issued = {node: _issued_s(node, context) for node in linears}
    less = [_with_less_issued(trip, issued[node][1]) for node, trip in trips.items()]
    serial_s = own_s + issuing_s + sum(all_s for all_s, _ in issued.values()) - sum(gained_s for _, gained_s in less)
    return relax(Chain(tuple(trip for trip, _ in less), serial_s)).bound_s


def _with_less_issued(trip: Trip, saved_s: float) -> tuple[Trip, float]:
    """What a trip costs the thread beyond what falls away with its last row on the host, and what is gained instead."""
    host_s = max(0.0, trip.host_s - saved_s)
    saved_s -= trip.host_s - host_s
    fixed_s = max(0.0, trip.fixed_s - saved_s)
    return replace(trip, host_s=host_s, fixed_s=fixed_s), saved_s - (trip.fixed_s - fixed_s)


def _ends_s(module: fx.GraphModule, linears: Mapping[fx.Node, Trip], context: Context) -> float:
    """Issuing the way up of what the host makes, once, and the way down of what the caller gets, with its wait."""
    nodes = [node for node in module.graph.nodes if node.op in ("call_function", "call_method")]
    made = [node for node in nodes if node not in linears and info(node).side == "host"]
    up = any(info(user).side == "accelerator" for node in made for user in node.users)
    values = module.graph.output_node().all_input_nodes
    down = any(info(value).side == "accelerator" and value not in linears for value in values)
    launch_s, wait_s = context.profile.accelerator.launch_s, context.profile.synchronise_s
    return up * launch_s + down * (launch_s + wait_s)


def _host_trips(
    groups: Iterable[Sequence[fx.Node]], linears: Mapping[fx.Node, Trip], fixed_s: Sequence[float]
) -> dict[fx.Node, Trip]:
    """The host's parts of offloaded Linears. A trip of each group is paid once, so each bears a share of it."""
    trips = {}
    for group, once_s in zip(groups, fixed_s, strict=True):
        link_s = sum(linears[node].link_s for node in group)
        for node in group:
            if linears[node].link_s > 0:
                part_s = once_s * linears[node].link_s / link_s
                trips[node] = replace(linears[node], accelerator_s=0.0, accelerator_saved_s=0.0, fixed_s=part_s)
    return trips


def _issued_s(linear: fx.Node, context: Context) -> tuple[float, float]:
    """Issuing a Linear, with a prefetch if it is offloaded; and what falls away of that with the last of its rows on
    the host."""
    linear_s, prefetch_s = context.profile.accelerator.issuing_s(segment=False), context.profile.accelerator.launch_s
    offloaded = offloaded_share(linear, context)
    saved_s = (linear_s + prefetch_s) * (offloaded > 0.0)
    there_s = linear_s * (1 + (offloaded > 0.0)) if offloaded < 1.0 else 0.0
    return saved_s + there_s, saved_s


def _issued_ahead_s(group: Sequence[fx.Node], context: Context) -> float:
    """Issuing Linears that may share a trip, whose parts on the host a worker computes."""
    linear_s, launch_s = context.profile.accelerator.issuing_s(segment=False), context.profile.accelerator.launch_s
    whole = sum(offloaded_share(linear, context) >= 1.0 for linear in group)
    down_s = 0.0 if any(map(lies_on_host, group)) else launch_s
    return (len(group) - whole) * linear_s + min(whole * (linear_s + launch_s), down_s)


__all__ = ["Floor", "floor", "floor_s", "offloaded_together_s"]
