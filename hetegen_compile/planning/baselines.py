"""What a step would take done otherwise, on the same hardware profile."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from hetegen_compile.cost_model import host_linear_s, upload_s
from hetegen_compile.ir import GROUPED, LINEAR, info, is_tensor
from hetegen_compile.operands import weight_of
from hetegen_compile.passes.annotate_costs import dtype_name, host_operation_s, value_bytes
from hetegen_compile.passes.aten_listener import FREE_ATEN
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import NodeCost
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.plans import RESIDENT, RING, LinearPlan
from hetegen_compile.passes.stream_experts import streamed_stacks
from hetegen_compile.passes.unsplit_weights import computed_on_host, unsplit_on_host
from hetegen_compile.planning.trials import Trials


def baselines(module: fx.GraphModule, context: Context, trials: Trials) -> dict[str, float | None]:
    """Seconds of a step done otherwise, from the graph with its segments and its Linears whole.

    ``streamed``: the same residency, everything else streamed with prefetch. Experts that stay on the host are, too,
    which no schedule of ours does: then it is what the link takes, or the accelerator if that is longer.
    ``per_module``: the same residency, each other weight (embedding tables, experts; of a Linear that stays in part the
    rest) copied from pageable memory when its module is called and waited for. ``per_linear``: host and link balanced
    inside each Linear as if it were alone, each with a trip of its own. ``host_only``: everything on the host, the link
    idle. ``resident``: everything on the accelerator, None if that does not fit its memory.
    """
    if require(context.residency, "choose_residency").whole_graph:
        return {"resident": _accelerator_s(module, context)}  # nothing is offloaded: there is nothing to compare
    return {
        "streamed": _streamed_s(module, context, trials),
        "per_module": _per_module_s(module, context),
        "per_linear": _per_linear_s(module, context, trials),
        "host_only": _host_only_s(module, context),
        "resident": _resident_s(module, context),
    }


def _streamed_s(module: fx.GraphModule, context: Context, trials: Trials) -> float:
    """The simulated step with no row on the host, through the same passes; with experts on the host link alone."""
    unsplit = unsplit_on_host(module, context)
    if unsplit:
        stacks = [*unsplit, *streamed_stacks(module)]
        moved = (*_offloaded_bytes(module, context), *(value_bytes(weight, context) for weight in stacks))
        return max(sum(upload_s(context.profile, nbytes) for nbytes in moved), _accelerator_s(module, context))
    context = replace(context, options=replace(context.options, split=0.0))
    return trials.step_s(context, choose_splits(module, context), keep=True)


def _per_linear_s(module: fx.GraphModule, context: Context, trials: Trials) -> float:
    """The simulated step with each Linear balanced by itself, as if it were alone: no trip is shared."""
    context = replace(context, options=replace(context.options, split="auto"), share_trips=False)
    return trials.step_s(context, choose_splits(module, context), keep=True)


def _per_module_s(module: fx.GraphModule, context: Context) -> float:
    unsplit = [*unsplit_on_host(module, context), *streamed_stacks(module)]
    others = dict.fromkeys([*_tables(module), *unsplit])  # a weight may be both
    copies = [
        upload_s(context.profile, nbytes, pinned=False) + context.profile.synchronise_s
        for nbytes in (*_offloaded_bytes(module, context), *(value_bytes(weight, context) for weight in others))
    ]
    return sum(copies) + _accelerator_s(module, context)


def _tables(module: fx.GraphModule) -> list[fx.Node]:
    """Placeholders of the tables that lookups read."""
    lookups = [node for node in module.graph.nodes if "embedding" in info(node).aten]
    operands = (operand for node in lookups for operand in node.all_input_nodes)
    # in the graph's order: the same sums each time
    tables = dict.fromkeys(operand for operand in operands if operand.op == "placeholder")
    return [table for table in tables if is_tensor(table) and info(table).value.dtype.is_floating_point]


def _host_only_s(module: fx.GraphModule, context: Context) -> float:
    nodes = [node for node in module.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    return sum(_host_s(node, context) for node in nodes)


def _host_s(node: fx.Node, context: Context) -> float:
    """Seconds of one node on the host while nothing is uploaded."""
    if node.target == LINEAR:
        cost = require(context.costs, "annotate_costs")[info(node).position]
        dtype = dtype_name(info(weight_of(node)).value)
        return host_linear_s(context.profile, dtype, cost.tokens, cost.weight_bytes, cost.flops, contended=False)
    if FREE_ATEN.issuperset(info(node).aten) and node.op != "call_module":
        return 0.0
    return host_operation_s(node, context.number(info(node).traffic_bytes), context)


def _resident_s(module: fx.GraphModule, context: Context) -> float | None:
    """None where weights and what a step needs beside them are more than the accelerator's memory."""
    residency = require(context.residency, "choose_residency")
    weights = sum(cost.weight_bytes for _, cost in _linears(module, context)) + residency.unsplit_bytes
    unsplit = [*unsplit_on_host(module, context), *streamed_stacks(module)]
    weights += sum(value_bytes(weight, context) for weight in unsplit)
    others = sum(nbytes for name, nbytes in residency.budget.items() if name not in (RESIDENT, RING))
    fits = weights + others <= context.profile.accelerator.memory_bytes
    return _accelerator_s(module, context) if fits else None


def _accelerator_s(module: fx.GraphModule, context: Context) -> float:
    """Seconds of the accelerator's own work with every weight at hand."""
    costs, names = require(context.costs, "annotate_costs"), {node.name for node in unsplit_on_host(module, context)}
    products = module.graph.find_nodes(op="call_function", target=GROUPED)
    working = [*module.graph.find_nodes(op="call_module"), *products]
    segments = sum(node_work(node, context).seconds for node in working)
    moved = computed_on_host(list(module.graph.nodes), names, context.weights) if names else ()
    readers = [node for node in module.graph.nodes if node in moved and node.target != LINEAR]
    computing = [node for node in readers if not FREE_ATEN.issuperset(info(node).aten)]
    readers_s = sum(costs[info(node).position].accelerator_s for node in computing)
    return segments + readers_s + sum(cost.accelerator_s for _, cost in _linears(module, context))


def _offloaded_bytes(module: fx.GraphModule, context: Context) -> list[float]:
    """Of each Linear that is not on the accelerator whole, what is not."""
    shares = [(1 - plan.resident_rows / plan.rows, cost.weight_bytes) for plan, cost in _linears(module, context)]
    return [share * nbytes for share, nbytes in shares if share]


def _linears(module: fx.GraphModule, context: Context) -> list[tuple[LinearPlan, NodeCost]]:
    splits, costs = require(context.splits, "choose_splits"), require(context.costs, "annotate_costs")
    nodes = module.graph.find_nodes(op="call_function", target=LINEAR)
    return [(splits[info(node).position], costs[info(node).position]) for node in nodes]
