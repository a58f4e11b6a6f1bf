"""What each operation of a schedule, or of a grouped graph, keeps busy, for how long, and what a trip costs.

Why: the simulated step, the scheduler's choices, the balance and the floor all ask for the same seconds.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

from torch import fx

from hetegen_compile import ir
from hetegen_compile.cost_model import (
    accelerator_linear_s,
    accelerator_op_s,
    download_s,
    host_linear_s,
    link_lost_s,
    read_up_s,
    upload_s,
)
from hetegen_compile.ir import info
from hetegen_compile.operands import HostGroups, LinearPart, grouped_part, host_groups, linear_part
from hetegen_compile.passes.annotate_costs import dtype_name, host_operation_s, host_traffic_bytes, value_bytes
from hetegen_compile.passes.aten_listener import FREE_ATEN
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.findings import Work
from hetegen_compile.passes.grouped_products import (
    GroupedProduct,
    expected_groups,
    expected_of_part,
    grouped_on_accelerator_s,
    grouped_on_host_s,
    issuing_groups_s,
)
from hetegen_compile.passes.issue_ahead import issues_ahead
from hetegen_compile.passes.tensors import to_expr

WORKER = "worker"
"""The resource of what the host's worker does: it does not keep the issuing thread."""

_COMPUTES = {ir.PARTIAL_LINEAR, ir.JOIN, ir.PAD}
"""What is launched by torch's own operations; copies are issued by less."""

_FREE = {ir.MIRROR, ir.RESIDENT, ir.TWIN, ir.WAIT, ir.WAIT_ACCELERATOR, ir.RELEASE, operator.getitem}


def node_work(node: fx.Node, context: Context) -> Work:
    """The resource that a node occupies and for how long, by the context's hardware profile."""
    if info(node).ahead:
        return Work(WORKER, _worker_s(node, context))
    work = _on_resource(node, context)
    if _opens_ahead(node):
        return Work("accelerator", _up(value_bytes(node, context), context).seconds, context.profile.accelerator.gate_s)
    if work.resource == "host" or node.target in _FREE or _is_no_join(node):
        return work
    return Work(work.resource, work.seconds, issue_s(node, context))


def _is_no_join(node: fx.Node) -> bool:
    """Whether a join is of one part only: nothing is issued then."""
    return node.target == ir.JOIN and len(node.args[0]) == 1  # type: ignore[arg-type]


def _opens_ahead(node: fx.Node) -> bool:
    """Whether a node waits behind a gate for what the worker sends up."""
    return node.target == ir.WAIT_ACCELERATOR and info(node.all_input_nodes[0]).ahead


def _worker_s(node: fx.Node, context: Context) -> float:
    """What the worker takes for a node: as the host's thread would; what it sends up lies where it is read."""
    return 0.0 if node.target == ir.TO_ACCELERATOR else _on_resource(node, context).seconds


def issue_s(node: fx.Node, context: Context) -> float:
    """What issuing a node costs the host thread. Matrix products and attention are launched beside a segment's own."""
    accelerator = context.profile.accelerator
    if node.op == "call_module":
        products = context.number(info(node).flops) > 0
        return accelerator.issuing_s(segment=True) + (accelerator.issuing_s(segment=False) if products else 0.0)
    if node.target == ir.PARTIAL_GROUPED:
        return issuing_groups_s(expected_of_part(grouped_part(node), context), context)
    return accelerator.issuing_s(segment=False) if node.target in _COMPUTES else accelerator.launch_s


def _on_resource(node: fx.Node, context: Context) -> Work:
    profile = context.profile
    if node.target in _FREE:
        return Work("host" if info(node).side == "host" else "accelerator", 0.0)
    if node.target == ir.STAGE:
        return Work("pin", value_bytes(node, context) / profile.pin_bytes_per_s)
    if node.target in (ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED):
        return Work("up", upload_s(profile, value_bytes(node, context), line_bytes=_line_bytes(node)))
    if node.target == ir.TO_HOST:
        return Work("down", download_s(profile, value_bytes(node, context)))
    if node.target in (ir.WAIT_HOST, ir.CAUGHT_UP):
        return Work("host", profile.synchronise_s)
    if node.target == ir.TO_ACCELERATOR:
        return _up(value_bytes(node, context), context)
    if node.target in (ir.HOST_LINEAR, ir.PARTIAL_LINEAR):
        return _linear_work(node, context)
    if node.target == ir.PARTIAL_GROUPED:
        return _grouped_work(node, context)
    if node.target == ir.HOST_GROUPED:
        return _host_groups_work(node, context)
    return _other_work(node, context)


def _up(nbytes: float, context: Context) -> Work:
    """What of this size goes up: read by a kernel, or queued behind prefetches."""
    if nbytes <= ir.SMALL_UPLOAD_BYTES:
        return Work("accelerator", read_up_s(context.profile, nbytes))
    return Work("up", upload_s(context.profile, nbytes))


def up_s(nbytes: float, context: Context) -> float:
    """Seconds of one transfer up of a value that the host has made."""
    return _up(nbytes, context).seconds


def _linear_work(node: fx.Node, context: Context) -> Work:
    part = linear_part(node)
    value, rows = info(part.x).value, info(part.weight).value
    tokens = max(1, round(context.number(to_expr(value.numel())) / max(1, int(value.shape[-1]))))
    nbytes = _part_bytes(part)
    flops = context.number(info(node).flops)
    dtype = dtype_name(rows)
    if node.target == ir.PARTIAL_LINEAR:
        return Work("accelerator", accelerator_linear_s(context.profile, dtype, tokens, nbytes, flops))
    seconds = host_linear_s(context.profile, dtype, tokens, nbytes, flops)
    return Work("host", seconds + (untold_trip_s(context) if _ends_trip(node) else 0.0))


def _grouped_work(partial: fx.Node, context: Context) -> Work:
    groups = expected_of_part(grouped_part(partial), context)
    flops, dtype = context.number(info(partial).flops), dtype_name(info(partial).value)
    return Work("accelerator", grouped_on_accelerator_s(groups, dtype, flops, context))


def _host_groups_work(node: fx.Node, context: Context) -> Work:
    part = host_groups(node)
    product, share = GroupedProduct(part.x, part.stack, part.ends, part.dim), _share_of(part)
    flops, dtype = context.number(info(node).flops), dtype_name(info(part.stack).value)
    seconds = grouped_on_host_s(product, dtype, flops, context, share, contended=True)
    return Work("host", seconds + (untold_trip_s(context) if _ends_trip(node) else 0.0))


def _share_of(part: HostGroups) -> float:
    return part.hi / int(info(part.stack).value.shape[0])


def lost_s(node: fx.Node, context: Context) -> float:
    """What the link loses while the host reads a part's weights."""
    if node.target == ir.HOST_GROUPED:
        some = host_groups(node)
        groups = expected_groups(GroupedProduct(some.x, some.stack), context, _share_of(some))
        return link_lost_s(context.profile, dtype_name(info(some.stack).value), groups.read * groups.nbytes)
    part = linear_part(node)
    return link_lost_s(context.profile, dtype_name(info(part.weight).value), _part_bytes(part))


def _part_bytes(part: LinearPart) -> int:
    rows = info(part.weight).value
    return (part.hi - part.lo) * int(rows.shape[1 - part.axis]) * int(rows.element_size())


def _ends_trip(part: fx.Node) -> bool:
    """Whether it is the last of those whose results go up in one transfer: their trip costs its fixed time once."""
    return any(user.target == ir.TO_ACCELERATOR and user.args[0][-1] is part for user in part.users)  # type: ignore[index]


def transfer_up_s(context: Context) -> float:
    """What one more transfer of host parts' results costs the host thread."""
    return context.profile.accelerator.launch_s + untold_trip_s(context)


def _line_bytes(prefetch: fx.Node) -> int | None:
    """Bytes that lie together in what a prefetch of columns reads; None for one of rows."""
    source, _, dim = prefetch.args[:3]
    value = info(prefetch).value
    if dim == 0 or source.target == ir.STAGE:  # type: ignore[union-attr]
        return None
    return int(value.shape[1]) * int(value.element_size())


def trip_s(linear: fx.Node, context: Context) -> float:
    """What a trip of a Linear's activation to the host and of a result back costs beside the host's work."""
    return _down_s(linear, context) + _up(value_bytes(linear, context), context).seconds + untold_trip_s(context)


def _down_s(linear: fx.Node, context: Context) -> float:
    """The way down of what a Linear reads, until the host's thread has it."""
    return download_s(context.profile, value_bytes(linear.all_input_nodes[0], context)) + context.profile.synchronise_s


def least_trip_s(linears: Sequence[fx.Node], context: Context, consumers: Collection[fx.Node] = ()) -> float:
    """The least that a trip of some of these Linears costs; no way down for what lies on the host.

    They read one activation, and ``consumers`` among them what others make of it: what goes down may be what any of
    them reads, and what goes up is of those that read one activation, or of the consumers alone. It is issued when the
    host has it, unless a worker computes, and is read in place where it is small. What only the caller reads may go any
    way.
    """
    down_s, up_s = least_ways_s(linears, context, consumers)
    return down_s + untold_trip_s(context) + up_s


def least_ways_s(
    linears: Sequence[fx.Node], context: Context, consumers: Collection[fx.Node] = ()
) -> tuple[float, float]:
    """Of ``least_trip_s`` the way down and the way up."""
    link, profile = context.profile.link, context.profile
    ups = []
    for group in _read_together(linears, consumers):
        up_s = least_read_s(group, context) or min(link.view_s, link.up.latency_s)
        issued = _go_up(group) and not issues_ahead(context)
        ups.append(up_s + (profile.accelerator.launch_s if issued else 0.0))
    there = any(map(lies_on_host, linears))
    down_s = 0.0 if there else min(_down_s(linear, context) for linear in linears)
    return down_s, min(ups)


def least_read_s(linears: Sequence[fx.Node], context: Context, consumers: Collection[fx.Node] = ()) -> float:
    """What reading the host's results of some Linears keeps the accelerator at least (see ``least_trip_s``).

    0 where they may be large enough for a transfer, or are not read there.
    """
    return min(_read_s(group, context) for group in _read_together(linears, consumers))


def _read_together(linears: Sequence[fx.Node], consumers: Collection[fx.Node]) -> list[list[fx.Node]]:
    """Those of the Linears that read one activation, and the others each by itself."""
    first = [linear for linear in linears if linear not in consumers]
    return [*([first] if first else []), *([linear] for linear in linears if linear in consumers)]


def _read_s(linears: Sequence[fx.Node], context: Context) -> float:
    largest = sum(value_bytes(linear, context) for linear in linears)
    return context.profile.link.view_s if _go_up(linears) and largest <= ir.SMALL_UPLOAD_BYTES else 0.0


def _go_up(linears: Sequence[fx.Node]) -> bool:
    """Whether the results of each are read by more than the caller."""
    return all(any(user.op != "output" for user in linear.users) for linear in linears)


def least_thread_s(linear: fx.Node, context: Context) -> float:
    """The part of ``least_trip_s`` that keeps the host's threads, issuing the way down and, unless a worker computes,
    the way up included."""
    launch_s, wait_s = context.profile.accelerator.launch_s, context.profile.synchronise_s
    down_s = 0.0 if lies_on_host(linear) else launch_s + wait_s
    return down_s + untold_trip_s(context) + (0.0 if issues_ahead(context) else launch_s)


def lies_on_host(linear: fx.Node) -> bool:
    """Whether the host has what a Linear reads without a way down: its own results, and what the caller gives."""
    read = linear.all_input_nodes[0]
    return info(read).side != "accelerator" or read.op in ir.INPUT_OPS or read.target == ir.MIRROR


def untold_trip_s(context: Context) -> float:
    """What a trip's measured fixed cost holds beyond its own tasks: latencies, and work of the host thread."""
    profile = context.profile
    told = profile.link.down.latency_s + profile.synchronise_s + profile.link.view_s
    return max(0.0, profile.fixed_s_per_split - told)


def _other_work(node: fx.Node, context: Context) -> Work:
    flops, traffic = context.number(info(node).flops), context.number(info(node).traffic_bytes)
    dtype = dtype_name(info(node).value)
    if node.target in (ir.JOIN, ir.PAD):
        single = _is_no_join(node)
        traffic = 0.0 if single else 2.0 * value_bytes(node, context)
        return Work("accelerator", 0.0 if single else accelerator_op_s(context.profile, dtype, 0.0, traffic))
    if info(node).side == "accelerator":
        return Work("accelerator", accelerator_op_s(context.profile, dtype, flops, traffic))
    free = FREE_ATEN.issuperset(info(node).aten)
    traffic = host_traffic_bytes(node, traffic, context)
    return Work("host", 0.0 if free else host_operation_s(node, traffic, context))


__all__ = [
    "WORKER", "issue_s", "least_read_s", "least_thread_s", "least_trip_s", "least_ways_s", "lost_s", "node_work",
    "transfer_up_s", "trip_s", "untold_trip_s", "up_s",
]  # fmt: skip
