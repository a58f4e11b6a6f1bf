"""Peak bytes of values that are alive at once, in program order."""

from __future__ import annotations

from torch import fx

from hetegen_compile.ir import info
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
    change = [0] * (len(nodes) + 2)
    for key in born.keys() - inputs:
        change[born[key]] += size[key]
        change[dies[key] + 1] -= size[key]
    peak = alive = 0
    for step in change:
        alive += step
        peak = max(peak, alive)
    return peak


__all__ = ["activation_peak_bytes"]
