"""Peak memory of planned forwards, item by item in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from hetegen_compile import ir
from hetegen_compile.dry_run.planning import PlannedGraph, weight_bytes
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.schedule import pinned_ring_bytes
from hetegen_compile.passes.tensors import tensors_in


def accelerator_items(forwards: Sequence[Sequence[PlannedGraph]]) -> dict[str, int]:
    """The items of the budget of the graph that needs most."""
    planned = [one for forward in forwards for one in forward]
    heaviest = max(planned, key=lambda one: sum(one.residency.budget.values()))
    return dict(heaviest.residency.budget)


def host_items(model: nn.Module, planned: Sequence[PlannedGraph]) -> dict[str, int]:
    """What a forward holds in host memory: the weights, and what comes in and goes out (caches in both forms)."""
    moving = max(_inputs_and_outputs(one) for one in planned)
    ring = max(pinned_ring_bytes(one.step.module.graph) for one in planned)
    items = {"weights and buffers": weight_bytes(model), "inputs, outputs and caches": moving}
    return {**items, "pinned ring": ring} if ring else items


def pinned_bytes(planned: Iterable[PlannedGraph]) -> int:
    """Bytes of the weights that prefetches read: they are pinned where they lie, whole."""
    pinned: dict[int, int] = {}
    for one in planned:
        graph = one.step.module.graph
        prefetches = graph.find_nodes(op="call_function", target=ir.PREFETCH)
        for node in prefetches + graph.find_nodes(op="call_function", target=ir.CARRIED):
            weight = one.graph.weights.get(node.args[0].name)
            if weight is None:
                continue  # its rows come by way of the pinned ring
            pinned[id(weight)] = int(weight.numel()) * weight.element_size()
    return sum(pinned.values())


def _inputs_and_outputs(one: PlannedGraph) -> int:
    context = one.base.context
    nodes = [n for n in one.graph.module.graph.nodes if n.op in ("placeholder", "output")]
    moving = [node for node in nodes if node.name not in one.graph.weights and tensors_in(ir.info(node).value)]
    return sum(value_bytes(node, context) for node in moving)
