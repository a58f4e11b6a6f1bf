"""Peak bytes of values that are alive at once: in program order, and in a schedule's issue order."""

from __future__ import annotations

from itertools import accumulate

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import info
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.capture import storage_id, tensor_bytes, tensors_in
from hetegen_compile.passes.context import Context


def activation_peak_bytes(module: fx.GraphModule, context: Context) -> int:
    """Most bytes that values made by the graph occupy at one time, views and in-place results counted once.

    A value lives from the node that makes its storage to the last node that reads or writes that storage.
    Inputs are not counted.
    """
    nodes = list(module.graph.nodes)
    inputs = frozenset[int]().union(*(info(n).storages for n in nodes if n.op in ("placeholder", "get_attr")))
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    size: dict[int, int] = {}
    for position, node in enumerate(nodes):
        for tensor in tensors_in(info(node).value):
            key = storage_id(tensor)
            born.setdefault(key, position)
            size[key] = max(size.get(key, 0), int(context.number(tensor_bytes(tensor))))
        for key in info(node).storages | info(node).reads:
            dies[key] = position
    return _peak([(born[key], dies[key], size[key]) for key in born.keys() - inputs])


def scheduled_peak_bytes(graph: fx.Graph, context: Context) -> int:
    """Most bytes that values on the accelerator occupy at one time in issue order.

    Slots, mirrors and resident weights are not counted. What a download reads lives until the host has waited
    for it; what becomes a mirror lives to the end. The largest value counts once more: the host runs ahead of
    the streams, so a value may be made before the one that it replaces is gone.
    """
    place = {node: position for position, node in enumerate(graph.nodes)}
    mirrored = frozenset[int]().union(*(info(node).storages for node in graph.nodes if node.target == ir.MIRROR))
    own: dict[object, tuple[int, int, int]] = {}
    for node in graph.nodes:
        if info(node).side != "accelerator" or node.op == "call_module" or node.target in _NOT_VALUES:
            continue
        keys = info(node).storages
        if keys & mirrored:
            continue
        key: object = keys if keys else node
        born, dies, size = own.get(key, (place[node], 0, 0))
        own[key] = (born, max(dies, _last_use(node, place)), max(size, value_bytes(node, context)))
    return _peak(list(own.values())) + max((size for _, _, size in own.values()), default=0)


def segment_workspace_bytes(module: fx.GraphModule, context: Context) -> int:
    """Most bytes that one segment's inner values occupy beside its outputs.

    An upper bound for compiled code, which fuses many of them away.
    """
    segments = [module.get_submodule(str(call.target)) for call in module.graph.find_nodes(op="call_module")]
    return max((_workspace_bytes(one, context) for one in segments if isinstance(one, fx.GraphModule)), default=0)


def _workspace_bytes(segment: fx.GraphModule, context: Context) -> int:
    output = next(iter(reversed(segment.graph.nodes)))
    outputs = sum(value_bytes(node, context) for node in output.all_input_nodes)
    return max(0, activation_peak_bytes(segment, context) - outputs)


_NOT_VALUES = (
    ir.MIRROR, ir.RESIDENT, ir.STAGE, ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED, ir.WAIT, ir.RELEASE,
)


def _last_use(node: fx.Node, place: dict[fx.Node, int]) -> int:
    last = place[node]
    for user in node.users:
        until = [user, *user.users] if user.target in (ir.TO_HOST, ir.WAIT) else [user]
        last = max(last, *(len(place) if reader.target == ir.TWIN else place[reader] for reader in until))
    return last


def _peak(lives: list[tuple[int, int, int]]) -> int:
    """Largest sum of sizes of (born, dies, size) at one position, both ends included."""
    change: dict[int, int] = {}
    for born, dies, size in lives:
        change[born] = change.get(born, 0) + size
        change[dies + 1] = change.get(dies + 1, 0) - size
    return max(accumulate(change[position] for position in sorted(change)), default=0)


__all__ = ["activation_peak_bytes", "scheduled_peak_bytes", "segment_workspace_bytes"]
