"""From a captured graph to schedules: one plan per token bucket, one schedule per split of it. Nothing runs here.

A compiled graph (``compiled.py``) binds the schedules that it makes to an accelerator; a dry run only reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import sympy
from torch import Tensor, fx

from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.errors import BudgetError
from hetegen_compile.graph_inputs import number, sequence_shape, sequence_symbols, token_count
from hetegen_compile.options import Options, format_bytes
from hetegen_compile.passes.context import Bucket, Context, Refusal, SegmentCache, require
from hetegen_compile.passes.issue_ahead import NO_ROOM_AHEAD, issues_ahead
from hetegen_compile.passes.plans import ACTIVATIONS, RESIDENT, Splits
from hetegen_compile.pipeline import ONCE_PER_SPLIT, Stage
from hetegen_compile.planning.balance import balanced_splits
from hetegen_compile.planning.buckets import bucket_of, largest_sizes
from hetegen_compile.planning.plan_report import blocks_apart, linear_sites, report_on
from hetegen_compile.planning.planned import Ahead, BucketPlan, ScheduledStep, Sizes, Split, Target, Variant
from hetegen_compile.planning.size_limits import size_limits
from hetegen_compile.planning.trials import Trials
from hetegen_compile.planning.weigh_residency import weighed
from hetegen_compile.planning.within_budget import ResidencySearch

logger = logging.getLogger("hetegen_compile")

_CLEARLY = 1 / 8
"""Of what a plan would keep resident: with so much more or less of it, other weights may be the ones to keep."""


class Planner:
    """Plans of one captured graph. ``weights`` maps names of placeholders to the model's tensors."""

    def __init__(
        self, module: fx.GraphModule, *, options: Options, profile: HardwareProfile, segments: SegmentCache
    ) -> None:
        self._module = module
        self._options = options
        self._profile = profile
        self._segments = segments
        self._tokens = token_count(module)
        self._search = ResidencySearch(module)

    @property
    def counted(self) -> frozenset[sympy.Symbol]:
        """The symbols of the sizes that tell a forward's tokens."""
        return frozenset(self._tokens.free_symbols)

    def bucket(self, sizes: Mapping[sympy.Symbol, sympy.Integer | int]) -> Bucket:
        """The bucket that a forward of these sizes belongs to."""
        return bucket_of(number(self._tokens, sizes))

    def plan_bucket(self, sizes: Sizes, target: Target, weights: Mapping[str, Tensor]) -> BucketPlan:
        """The plan of the bucket that these sizes belong to: what is the same for every split of the Linears.

        Raises:
            BudgetError: the target's budget cannot hold what a step needs.
            HostOnlyGraphError: the graph cannot be offloaded.
        """
        context = Context(
            options=self._with(target.issue_ahead),
            profile=self._profile,
            sizes=sizes,
            bucket=self.bucket(sizes),
            budget_bytes=target.budget_bytes,
            resident=target.resident,
            weights=weights,
            segments=self._segments,
            overhead_bytes=target.overhead_bytes,
            device=target.device,
            host_memory=target.host_memory,
            cannot_issue_ahead=target.cannot_issue_ahead,
        )
        return self._weighed(self._decided(context, target.kind, None), context, None)

    def decide_again(self, base: BucketPlan, sizes: Sizes, target: Target, weights: Mapping[str, Tensor]) -> BucketPlan:
        """The same plan with what stays on the accelerator decided again: the target or the sizes have changed.

        Segments and placement stay, so nothing is compiled. (Unless everything fitted and no longer does, or a stack
        of experts comes or goes: the graph is cut anew then.) Where clearly more or less stays than before, which
        weights these are is weighed anew.

        Raises:
            BudgetError: the target's budget cannot hold what a step needs.
        """
        context = replace(
            base.context, sizes=sizes, budget_bytes=target.budget_bytes, resident=target.resident, weights=weights,
            overhead_bytes=target.overhead_bytes, host_memory=target.host_memory,
            activation_bytes=None, lean=False, options=self._with(target.issue_ahead), residency=None,
            cannot_issue_ahead=target.cannot_issue_ahead,
        )  # fmt: skip
        again = self._decided(context, target.kind, base)
        if abs(_resident_bytes(again) - _resident_bytes(base)) <= _CLEARLY * _claimed_bytes(again):
            return again
        if context.residency_way is not None:
            context = replace(context, residency_way=None)
            again = self._decided(context, target.kind, base)
        return self._weighed(again, context, base)

    def _weighed(self, first: BucketPlan, context: Context, base: BucketPlan | None) -> BucketPlan:
        return weighed(first, lambda way: self._decided(replace(context, residency_way=way), first.kind, base))

    def _decided(self, context: Context, kind: str, base: BucketPlan | None) -> BucketPlan:
        try:
            graphs, context, measured = self._search.within_budget(self._with_room(context, spare=True), base)
        except BudgetError:  # no room beyond what the options state: what a larger forward needs is decided then
            graphs, context, measured = self._search.within_budget(self._with_room(context, spare=False), base)
        context = replace(context, weights={})
        sites = linear_sites(graphs.grouped, context)
        return BucketPlan(graphs.grouped, graphs.linears, context, sites, kind, list(measured))

    def plan_split(
        self,
        base: BucketPlan,
        split: Split,
        stages: tuple[Stage, ...] = ONCE_PER_SPLIT,
        trials: Trials | None = None,
        *,
        issue_ahead: Ahead | None = None,
    ) -> ScheduledStep:
        """The schedule of one split; ``stages`` leaves out lowering where nothing will run.

        ``trials`` (those of ``base``) is given where they will be asked for again, ``issue_ahead`` where it is not that
        of the options.
        """
        context = replace(base.context, options=replace(self._with(issue_ahead), split=split))
        trials = base.trials() if trials is None else trials
        balanced = base.take_balanced(context)
        if balanced is not None:
            trials.adopt(balanced.trials)
        module, done = _finished(base.module, context, stages, trials, None if balanced is None else balanced.splits)
        if _excess_bytes(done) > 0 and issues_ahead(context):
            module, done = _finished(base.module, replace(context, cannot_issue_ahead=NO_ROOM_AHEAD), stages, trials)
        done = done.refusing("blocks apart", blocks_apart(done))
        if _excess_bytes(done) > 0:
            raise BudgetError(
                f"split={split} needs {_excess_bytes(done)} bytes more for activations than gpu_memory="
                f"{format_bytes(context.budget_bytes)} leaves: use a larger budget"
            )
        return ScheduledStep(module, done, report_on(base, module, done, trials))

    def needs_more_room(self, base: BucketPlan, variant: Variant) -> bool:
        """Whether this variant is issued ahead and ``base`` was decided for steps that are not."""
        options = self._with(variant.issue_ahead)
        return issues_ahead(replace(base.context, options=options)) and not issues_ahead(base.context)

    def _with(self, issue_ahead: Ahead | None) -> Options:
        return self._options if issue_ahead is None else replace(self._options, issue_ahead=issue_ahead)

    def _with_room(self, context: Context, *, spare: bool) -> Context:
        """The context with the sizes that the budget has to hold."""
        placeholders = self._module.graph.find_nodes(op="placeholder")
        shape = sequence_shape(placeholders, context.weights, context.sizes)
        limits = size_limits(self._module, context.sizes, context.options.context)
        lengths = context.sizes.keys() - self._tokens.free_symbols - sequence_symbols(placeholders, context.weights)
        largest = largest_sizes(self._tokens, context, limits, lengths, spare=spare)
        return replace(
            context,
            largest=largest,
            lengths=lengths,
            sequences=shape.sequences,
            tokens_per_sequence=shape.tokens,
            spare=spare,
        )


def _resident_bytes(plan: BucketPlan) -> int:
    return require(plan.context.residency, "choose_residency").budget[RESIDENT]


def _claimed_bytes(plan: BucketPlan) -> int:
    return sum(claim.nbytes for claim in require(plan.context.residency, "choose_residency").claims)


def _finished(
    module: fx.GraphModule, context: Context, stages: tuple[Stage, ...], trials: Trials,
    balanced: list[Splits] | None = None,
) -> tuple[fx.GraphModule, Context]:  # fmt: skip
    """The schedule of the context's split; with ``split="auto"`` the shortest of those tried that has room."""
    best, *others = balanced_splits(module, context, trials) if balanced is None else balanced
    scheduled, done = trials.finish(context, best, stages)
    tried, excess = [best], _excess_bytes(done)
    for splits in others:
        if _excess_bytes(done) > 0 and splits not in tried:
            scheduled, done = trials.finish(context, splits, stages)
            tried.append(splits)
    if len(tried) > 1:
        reason = f"it needs {excess} bytes more for activations than are left; a leaner split is taken"
        done = done.refusing("leaner split", [Refusal("the balance of the whole step", reason)])
    return scheduled, done


def budget_bytes(gpu_memory: int | None, available_bytes: int, accelerator: str) -> int:
    """The hard limit: ``gpu_memory``, else ``available_bytes`` less a sixteenth as a reserve.

    Never more than there is.
    """
    if gpu_memory is None:
        return available_bytes * 15 // 16
    if gpu_memory > available_bytes:
        logger.warning(
            "gpu_memory=%s is more than the %s that the %s accelerator has: planning with the latter",
            format_bytes(gpu_memory),
            format_bytes(available_bytes),
            accelerator,
        )
    return min(gpu_memory, available_bytes)


def _excess_bytes(context: Context) -> int:
    """Bytes by which a schedule's activations exceed what its residency left for them."""
    budget = require(context.residency, "choose_residency").budget
    return require(context.memory, "measure_memory").peak_bytes(context.room) - budget[ACTIVATIONS]


__all__ = ["Planner", "budget_bytes"]
