"""The split of all Linears together, judged by the simulated step.

The closed form balances host and link inside one Linear. Over a step the host thread also issues everything
else, so the host's shares are scaled down together and the scale whose simulated step is shortest is
taken. All-streamed (scale 0) is among them: a plan is never worse than it in the simulation.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from hetegen_compile.cost_model import row_granularity
from hetegen_compile.ir import LINEAR, copy_module, info
from hetegen_compile.passes.choose_splits import choose_splits, with_host_rows
from hetegen_compile.passes.context import Context, LinearPlan, Splits, require
from hetegen_compile.pipeline import ONCE_PER_SPLIT, run_pipeline

_ONCE_DECIDED = ("measure_memory", "verify", "retarget_devices", "lower")
SCALES = (1.0, 0.75, 0.5, 0.25, 0.0)


def balanced_splits(module: fx.GraphModule, context: Context) -> Splits:
    """The rows of every Linear; with ``split="auto"`` the best of the scaled closed-form splits."""
    splits = choose_splits(module, context)
    if context.options.split != "auto" or not any(plan.host for plan in splits.values()):
        return splits
    candidates = [_scaled(module, context, splits, scale) for scale in SCALES]
    return min(candidates, key=lambda candidate: simulated_step_s(module, context, candidate))


def simulated_step_s(module: fx.GraphModule, context: Context, splits: Splits) -> float:
    """Seconds of a step of a grouped graph with these splits, through the same passes as the real one."""
    _, context = _scheduled(module, context, splits)
    return require(context.prediction, "predict_step").step_s


def _scheduled(module: fx.GraphModule, context: Context, splits: Splits) -> tuple[fx.GraphModule, Context]:
    copy = copy_module(module)
    stages = tuple(stage for stage in ONCE_PER_SPLIT if stage.run.__name__ not in _ONCE_DECIDED)
    return copy, run_pipeline(copy, replace(context, splits=splits), stages)


def _scaled(module: fx.GraphModule, context: Context, splits: Splits, scale: float) -> Splits:
    if scale == 1.0:
        return splits
    linears = {info(node).position: node for node in module.graph.find_nodes(op="call_function", target=LINEAR)}
    return {
        position: with_host_rows(linears[position], _scaled_rows(plan, scale), context)
        for position, plan in splits.items()
    }


def _scaled_rows(plan: LinearPlan, scale: float) -> int:
    step = row_granularity(plan.rows)
    return int(plan.host * scale) // step * step
