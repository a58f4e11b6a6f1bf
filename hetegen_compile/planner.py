"""From a captured graph to schedules: one plan per token bucket, one schedule per split of it. Nothing runs here.

A compiled graph (``compiled.py``) binds the schedules that it makes to an accelerator; a dry run only reads them.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch
from torch import Tensor, fx

from hetegen_compile.balance import activation_bytes, balanced_splits
from hetegen_compile.baselines import baselines, floor_s
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.ir import LINEAR, copy_module, info
from hetegen_compile.options import Options
from hetegen_compile.passes.context import (
    Bucket,
    Context,
    HostWeights,
    Refusal,
    ResidentWeights,
    SegmentCache,
    require,
)
from hetegen_compile.pipeline import ONCE_PER_BUCKET, ONCE_PER_SPLIT, Stage, run_pipeline
from hetegen_compile.schedule import LinearSite, Schedule, schedule_rows

BUCKET_LIMITS = (1, 4, 16, 64, 256)
"""Highest number of tokens of each bucket but the last, which is open."""

Sizes = dict[sympy.Symbol, sympy.Integer]
Split = float | Literal["auto"]


@dataclass(frozen=True)
class Target:
    """What a plan is made for: the accelerator and what lies on it already.

    Attributes:
        kind: ``"cuda"`` or ``"emulated"``, for people.
        device: where segments will run.
        budget_bytes: the hard limit.
        resident: the weights on the accelerator.
        ring_bytes: length of its staging ring.
        host_memory: what can be pinned; None says everything.
    """

    kind: str
    device: torch.device
    budget_bytes: int
    resident: ResidentWeights
    ring_bytes: int = 0
    host_memory: HostWeights | None = None


@dataclass(frozen=True)
class BucketPlan:
    """What the stages that do not depend on the split left: the graph with its segments, and the context."""

    module: fx.GraphModule
    context: Context
    sites: Mapping[int, LinearSite]
    kind: str


@dataclass(frozen=True)
class PlannedStep:
    """One scheduled graph, the context it was made in, and the report on it."""

    module: fx.GraphModule
    context: Context
    schedule: Schedule


class Planner:
    """Plans of one captured graph. ``weights`` maps names of placeholders to the model's tensors."""

    def __init__(
        self, module: fx.GraphModule, *, options: Options, profile: HardwareProfile, segments: SegmentCache
    ) -> None:
        self._module = module
        self._options = options
        self._profile = profile
        self._segments = segments

    def plan_bucket(
        self, bucket: Bucket, sizes: Sizes, target: Target, weights: Mapping[str, Tensor]
    ) -> BucketPlan:
        """Everything that is the same for every split of the Linears.

        Raises:
            BudgetError: the target's budget cannot hold what a step needs.
            HostOnlyGraphError: the graph cannot be offloaded.
        """
        refusals: dict[Refusal, None] = {}
        context = Context(
            options=self._options,
            profile=self._profile,
            sizes=sizes,
            bucket=bucket,
            budget_bytes=target.budget_bytes,
            resident=target.resident,
            weights=weights,
            refuse=lambda refusal: refusals.setdefault(refusal),
            segments=self._segments,
            ring_bytes=target.ring_bytes,
            device=target.device,
            host_memory=target.host_memory,
        )
        module, context = self._within_budget(context)
        context = replace(context, refusals=tuple(refusals), weights={})
        return BucketPlan(module, context, _sites(module, context), target.kind)

    def plan_split(
        self, base: BucketPlan, split: Split, stages: tuple[Stage, ...] = ONCE_PER_SPLIT
    ) -> PlannedStep:
        """The schedule of one split; ``stages`` leaves out lowering where nothing will run."""
        module = copy_module(base.module)
        context = replace(base.context, options=replace(self._options, split=split))
        context = replace(context, splits=balanced_splits(module, context))
        context = run_pipeline(module, context, stages)
        return PlannedStep(module, context, self._schedule(base, module, context))

    def _within_budget(self, context: Context) -> tuple[fx.GraphModule, Context]:
        """Run the stages that do not depend on the split until residency leaves room for its own schedule.

        Activations are estimated from the captured graph at first; a schedule keeps some values longer
        (what goes down at the end of the step, parts of a Linear beside their join).
        """
        while True:
            module = copy_module(self._module)
            done = run_pipeline(module, context, ONCE_PER_BUCKET)
            needed = activation_bytes(module, done)
            if needed <= require(done.residency, "choose_residency").budget["activations"]:
                return module, done
            context = replace(context, activation_bytes=needed)

    def _schedule(self, base: BucketPlan, module: fx.GraphModule, context: Context) -> Schedule:
        prediction = require(context.prediction, "predict_step")
        splits = require(context.splits, "choose_splits")
        residency = require(context.residency, "choose_residency")
        sites = {position: replace(site, plan=splits[position]) for position, site in base.sites.items()}
        low, high = context.bucket.low, context.bucket.high
        tokens = f"{low} token{'s' if low > 1 else ''}" if high == low else f"{low} to {high or 'more'} tokens"
        whole = residency.budget["resident weights"] if residency.whole_graph else 0
        return Schedule(
            title=f"hetegen on {base.kind}, hardware {self._profile.name}, {tokens} a forward",
            tokens=(low, high),
            split=context.options.split,
            rows=schedule_rows(module.graph, prediction, sites, context.number),
            resident_bytes=_bytes_in(sites, "resident_rows") + whole,
            streamed_bytes=_bytes_in(sites, "streamed_rows"),
            host_bytes=_bytes_in(sites, "host"),
            predicted_step_s=prediction.step_s,
            floor_s=floor_s(base.module, context),
            baselines=baselines(base.module, context),
            budget_bytes=context.budget_bytes,
            budget=residency.budget,
            refusals=context.refusals,
            whole_graph=residency.whole_graph,
        )


def bucket_of(tokens: int) -> Bucket:
    """The bucket that a forward of ``tokens`` tokens belongs to."""
    place = bisect.bisect_left(BUCKET_LIMITS, tokens)
    low = 1 if place == 0 else BUCKET_LIMITS[place - 1] + 1
    return Bucket(low, BUCKET_LIMITS[place] if place < len(BUCKET_LIMITS) else None)


def _sites(module: fx.GraphModule, context: Context) -> dict[int, LinearSite]:
    costs = require(context.costs, "annotate_costs")
    splits = require(context.splits, "choose_splits")
    return {
        position: LinearSite(
            node=node.name, module=info(node).module, plan=splits[position],
            flops=costs[position].flops, weight_bytes=costs[position].weight_bytes,
        )
        for node in module.graph.find_nodes(op="call_function", target=LINEAR)
        for position in (info(node).position,)
    }


def _bytes_in(sites: Mapping[int, LinearSite], rows: str) -> int:
    """Bytes of the rows that the plans of all Linears put in one place."""
    return sum(site.weight_bytes * getattr(site.plan, rows) // site.plan.rows for site in sites.values())


__all__ = ["BucketPlan", "PlannedStep", "Planner", "Split", "Target", "bucket_of"]
