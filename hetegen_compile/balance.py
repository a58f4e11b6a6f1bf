"""The split of all Linears together: shares from the chain of the step, judged by the simulated step.

Balance is global over a step: the link works while the accelerator attends, so it gets more rows than any
Linear by itself would give it, and Linears are split where the trip costs least. ``cost_model.chain`` finds the shares;
the real passes then schedule them and the timeline simulates the step. What the simulation adds to the chain
(issue, slots, granularity) is fed back once or twice. All-streamed is among the candidates: a plan is never
worse than it in the simulation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from hetegen_compile.cost_model import Chain, Trip, row_granularity, solve_chain
from hetegen_compile.ir import LINEAR, copy_module, info
from hetegen_compile.passes.choose_splits import choose_splits, with_host_rows
from hetegen_compile.passes.context import Context, NodeCost, Prediction, Splits, require
from hetegen_compile.passes.liveness import scheduled_peak_bytes, segment_workspace_bytes
from hetegen_compile.passes.predict_step import node_work, trip_s
from hetegen_compile.pipeline import ONCE_PER_SPLIT, run_pipeline

_ONCE_DECIDED = ("verify", "retarget_devices", "lower")
_ROUNDS = 3
_CLOSE = 0.01


@dataclass(frozen=True)
class _Candidate:
    splits: Splits
    prediction: Prediction


def balanced_splits(module: fx.GraphModule, context: Context) -> Splits:
    """The rows of every Linear; with ``split="auto"`` those of the shortest simulated step."""
    splits = choose_splits(module, context)
    if context.options.split != "auto" or all(plan.resident_rows == plan.rows for plan in splits.values()):
        return splits
    groups = trips_of(module)
    chain = step_chain(module, groups, context)
    streamed = _simulated(module, context, _with_shares(groups, [0.0] * len(groups), context))
    best, extra_s = streamed, 0.0
    for _ in range(_ROUNDS):
        solution = solve_chain(replace(chain, serial_s=chain.serial_s + extra_s))
        if not any(solution.shares):
            break
        found = _simulated(module, context, _with_shares(groups, solution.shares, context))
        best = min(best, found, key=lambda candidate: candidate.prediction.step_s)
        error_s = found.prediction.step_s - solution.step_s
        if abs(error_s) < _CLOSE * solution.step_s:
            break
        extra_s += error_s
    return best.splits


def trips_of(module: fx.GraphModule) -> list[list[fx.Node]]:
    """Linears that read the same activation, in program order."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        groups.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    return list(groups.values())


def step_chain(module: fx.GraphModule, groups: list[list[fx.Node]], context: Context) -> Chain:
    """A grouped graph as a chain of trips and the accelerator's segments between them."""
    serial_s = sum(node_work(node, context).seconds for node in module.graph.find_nodes(op="call_module"))
    return Chain(tuple(_trip(group, context) for group in groups), serial_s)


def _trip(group: list[fx.Node], context: Context) -> Trip:
    costs = require(context.costs, "annotate_costs")
    host_s = link_s = accelerator_s = saved_s = 0.0
    for node in group:
        cost: NodeCost = costs[info(node).position]
        plan = with_host_rows(node, 0, context)
        offloaded = 1.0 - plan.resident_rows / plan.rows
        host_s += offloaded * cost.host_s
        link_s += offloaded * cost.link_s
        accelerator_s += cost.accelerator_s
        saved_s += offloaded * cost.accelerator_s
    return Trip(host_s, link_s, accelerator_s, saved_s, fixed_s=trip_s(group[0], context))


def _with_shares(groups: list[list[fx.Node]], shares: list[float] | tuple[float, ...], context: Context) -> Splits:
    return {
        info(node).position: with_host_rows(node, _host_rows(node, share, context), context)
        for group, share in zip(groups, shares, strict=True)
        for node in group
    }


def _host_rows(node: fx.Node, share: float, context: Context) -> int:
    plan = with_host_rows(node, 0, context)
    movable = plan.rows - plan.resident_rows
    step = row_granularity(plan.rows)
    return movable if share >= 1.0 else min(movable, round(share * movable / step) * step)


def simulated_step_s(module: fx.GraphModule, context: Context, splits: Splits) -> float:
    """Seconds of a step of a grouped graph with these splits, through the same passes as the real one."""
    return _simulated(module, context, splits).prediction.step_s


def _simulated(module: fx.GraphModule, context: Context, splits: Splits) -> _Candidate:
    _, context = _scheduled(module, context, splits)
    return _Candidate(splits, require(context.prediction, "predict_step"))


def activation_bytes(module: fx.GraphModule, context: Context) -> int:
    """Peak bytes of activations of a grouped graph, workspace of segments included, once it is scheduled."""
    copy, context = _scheduled(module, context, choose_splits(module, context))
    return scheduled_peak_bytes(copy.graph, context) + segment_workspace_bytes(module, context)


def _scheduled(module: fx.GraphModule, context: Context, splits: Splits) -> tuple[fx.GraphModule, Context]:
    copy = copy_module(module)
    stages = tuple(stage for stage in ONCE_PER_SPLIT if stage.run.__name__ not in _ONCE_DECIDED)
    return copy, run_pipeline(copy, replace(context, splits=splits), stages)
