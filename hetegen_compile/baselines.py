"""What a step would take done otherwise, on the same hardware profile, and the bound that none can beat."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from hetegen_compile.balance import simulated_step_s
from hetegen_compile.cost_model import upload_s
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.context import Context, LinearPlan, NodeCost, Residency, require
from hetegen_compile.passes.predict_step import node_work


def floor_s(module: fx.GraphModule, context: Context) -> float:
    """The bound of a step: S / (V_link + V_cpu) for S bytes of offloaded weights, or the accelerator's work.

    The rates are those at which each consumes these weights at this number of tokens; staged weights come no faster
    than the pin thread copies them.
    """
    splits, costs = require(context.splits, "choose_splits"), require(context.costs, "annotate_costs")
    nodes = module.graph.find_nodes(op="call_function", target=LINEAR)
    offloaded = [node for node in nodes if splits[info(node).position].resident is None]
    link_s = sum(_feed_s(node, costs[info(node).position], context) for node in offloaded)
    host_s = sum(costs[info(node).position].host_s for node in offloaded)
    together = link_s * host_s / (link_s + host_s) if link_s + host_s > 0 else 0.0
    return max(together, _accelerator_s(module, context))


def _feed_s(linear: fx.Node, cost: NodeCost, context: Context) -> float:
    """Seconds to bring a Linear's whole weight over the link, by way of the pinned ring if it is staged."""
    weight: fx.Node = linear.args[1]  # type: ignore[assignment]
    if weight.name not in context.staged:
        return cost.link_s
    return max(cost.link_s, cost.weight_bytes / context.profile.pin_bytes_per_s)


def baselines(module: fx.GraphModule, context: Context) -> dict[str, float | None]:
    """Seconds of a step done otherwise.

    ``streamed``: the same residency, everything else streamed with prefetch. ``per_module``: no weight
    resident, each module's weights copied from pageable memory when it is called and waited for.
    ``host_only``: every Linear on the host. ``resident``: everything on the accelerator, None if that does
    not fit its memory.
    """
    if require(context.residency, "choose_residency").whole_graph:
        return {"resident": _accelerator_s(module, context)}  # nothing is offloaded: there is nothing to compare
    return {
        "streamed": _predicted(module, context, 0.0),
        "per_module": _per_module_s(module, context),
        "host_only": _predicted(module, replace(context, residency=_nothing_resident(context)), 1.0),
        "resident": _resident_s(module, context),
    }


def _predicted(module: fx.GraphModule, context: Context, split: float) -> float:
    """The simulated step with another split, through the same passes."""
    context = replace(context, options=replace(context.options, split=split))
    return simulated_step_s(module, context, choose_splits(module, context))


def _nothing_resident(context: Context) -> Residency:
    return replace(require(context.residency, "choose_residency"), weights={})


def _per_module_s(module: fx.GraphModule, context: Context) -> float:
    copies = sum(
        upload_s(context.profile, cost.weight_bytes, pinned=False) + context.profile.synchronise_s
        for _, cost in _linears(module, context)
    )
    return copies + _accelerator_s(module, context)


def _resident_s(module: fx.GraphModule, context: Context) -> float | None:
    weights = sum(cost.weight_bytes for _, cost in _linears(module, context))
    fits = weights <= context.profile.accelerator.memory_bytes
    return _accelerator_s(module, context) if fits else None


def _accelerator_s(module: fx.GraphModule, context: Context) -> float:
    """Seconds of the accelerator's own work with every weight at hand."""
    segments = sum(node_work(node, context).seconds for node in module.graph.find_nodes(op="call_module"))
    return segments + sum(cost.accelerator_s for _, cost in _linears(module, context))


def _linears(module: fx.GraphModule, context: Context) -> list[tuple[LinearPlan, NodeCost]]:
    splits, costs = require(context.splits, "choose_splits"), require(context.costs, "annotate_costs")
    nodes = module.graph.find_nodes(op="call_function", target=LINEAR)
    return [(splits[info(node).position], costs[info(node).position]) for node in nodes]
