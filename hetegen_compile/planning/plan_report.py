"""The report on a schedule that was planned: what the user reads as ``schedules()[-1]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from hetegen_compile.ir import GROUPED, LINEAR, TO_ACCELERATOR, info
from hetegen_compile.operands import weight_of
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.context import Context, Refusal, require
from hetegen_compile.passes.plans import RESIDENT
from hetegen_compile.passes.stream_experts import with_host_experts
from hetegen_compile.passes.unsplit_weights import unsplit_on_host, weights_on_host
from hetegen_compile.planning.baselines import baselines
from hetegen_compile.planning.floor import floor_s
from hetegen_compile.planning.planned import DRY_RUN, BucketPlan
from hetegen_compile.planning.trials import Trials
from hetegen_compile.reports.schedule import EXPERTS, LinearSite, Schedule, schedule_rows


def report_on(base: BucketPlan, module: fx.GraphModule, context: Context, trials: Trials) -> Schedule:
    """The report on one schedule of a bucket's plan."""
    prediction = require(context.prediction, "predict_step")
    splits = require(context.splits, "choose_splits")
    residency = require(context.residency, "choose_residency")
    sites = {position: replace(site, plan=splits[position]) for position, site in base.sites.items()}
    low, high = context.bucket.low, context.bucket.high
    tokens = f"{low} token{'s' if low > 1 else ''}" if high == low else f"{low} to {high} tokens"
    tokens = f"{low} tokens or more" if high is None else tokens
    sendings = module.graph.find_nodes(op="call_function", target=TO_ACCELERATOR)
    whole = residency.budget[RESIDENT] if residency.whole_graph else 0
    unsplit = unsplit_on_host(base.module, context)
    where = DRY_RUN if base.kind == DRY_RUN else f"on {base.kind}"
    return Schedule(
        title=f"hetegen {where}, hardware {context.profile.name}, {tokens} a forward",
        tokens=(low, high),
        split=context.options.split,
        rows=schedule_rows(module.graph, prediction, sites, context.number),
        resident_bytes=whole or _bytes_in(sites, "resident_rows") + residency.unsplit_bytes,
        streamed_bytes=_bytes_in(sites, "streamed_rows"),
        host_bytes=_bytes_in(sites, "host") + sum(value_bytes(kept, context) for kept in unsplit),
        predicted_step_s=prediction.step_s,
        floor_s=floor_s(base.module, context),
        baselines=baselines(base.module, context, trials),
        budget_bytes=context.budget_bytes,
        budget=residency.budget,
        refusals=(*context.refusals, *weights_on_host(base.module, context), *context.segments.refused.values()),
        whole_graph=residency.whole_graph,
        accelerator=base.kind,
        trips_ahead=sum(info(sent).ahead for sent in sendings),
    )


def blocks_apart(context: Context) -> list[Refusal]:
    """Which blocks are cut Linear by Linear although the options ask for all of them as one."""
    cut = {plan.block for plan in require(context.splits, "choose_splits").values()}
    apart = sum(block.consumer not in cut for block in context.blocks)
    if context.options.pair_mlp is not True or not apart:
        return []
    reason = "their slices do not fit the staging ring, or the step is shorter with nothing of them on the host"
    return [Refusal("pair_mlp", f"{apart} of {len(context.blocks)} blocks are not cut as one: {reason}")]


def linear_sites(module: fx.GraphModule, context: Context) -> dict[int, LinearSite]:
    """Where each Linear and each product with streamed experts of a grouped graph is, and what its plan is."""
    costs = require(context.costs, "annotate_costs")
    splits = require(context.splits, "choose_splits")
    experts = module.graph.find_nodes(op="call_function", target=GROUPED)
    return {info(node).position: _experts_site(node, context) for node in experts} | {
        position: LinearSite(
            node=node.name, module=info(node).module, plan=splits[position],
            flops=costs[position].flops, weight_bytes=costs[position].weight_bytes,
        )
        for node in module.graph.find_nodes(op="call_function", target=LINEAR)
        for position in (info(node).position,)
    }  # fmt: skip


def _experts_site(node: fx.Node, context: Context) -> LinearSite:
    stack = weight_of(node)
    plan = with_host_experts(stack, 0, require(context.residency, "choose_residency"))
    return LinearSite(
        node.name, info(node).module, plan, context.number(info(node).flops), value_bytes(stack, context), EXPERTS
    )


def _bytes_in(sites: Mapping[int, LinearSite], rows: str) -> int:
    """Bytes of the rows that the plans of all Linears put in one place."""
    return sum(site.weight_bytes * getattr(site.plan, rows) // site.plan.rows for site in sites.values())


__all__ = ["blocks_apart", "linear_sites", "report_on"]
