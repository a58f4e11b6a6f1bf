"""From a captured graph to schedules: one plan per token bucket, one schedule per split of it. Nothing runs here.

A compiled graph (``compiled.py``) binds the schedules that it makes to an accelerator; a dry run only reads them.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from hetegen_compile.balance import balanced_splits, promising_blocks
from hetegen_compile.baselines import baselines
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.errors import BudgetError
from hetegen_compile.floor import floor_s
from hetegen_compile.graph_inputs import number, sequence_shape, token_count
from hetegen_compile.ir import LINEAR, copy_module, info
from hetegen_compile.options import Options, format_bytes
from hetegen_compile.passes import choose_splits
from hetegen_compile.passes.claims import HostWeights, ResidentWeights
from hetegen_compile.passes.context import Bucket, Context, Refusal, SegmentCache, require
from hetegen_compile.passes.findings import MemoryNeed
from hetegen_compile.passes.plans import ACTIVATIONS, RESIDENT, Splits
from hetegen_compile.passes.stacked_weights import stacks_on_host
from hetegen_compile.pipeline import (
    DECISIONS,
    GROUPING,
    NORMALISATION,
    ONCE_PER_SPLIT,
    UNTIL_MEASURED,
    Stage,
    run_pipeline,
)
from hetegen_compile.schedule import LinearSite, Schedule, schedule_rows
from hetegen_compile.trials import Trials

logger = logging.getLogger("hetegen_compile")

BUCKET_LIMITS = (1, 4, 16, 64, 256)
"""Highest number of tokens of each bucket but the last, which is open."""

DRY_RUN = "dry run"
"""What a plan is made for if nothing will run."""

_ATTEMPTS = 3
"""Residencies that are tried, each with what the schedule of the one before needed."""

Sizes = dict[sympy.Symbol, sympy.Integer]
Split = float | Literal["auto"]


@dataclass(frozen=True)
class Target:
    """What a plan is made for: the accelerator and what lies on it already.

    Attributes:
        kind: ``"cuda"``, ``"emulated"`` or ``DRY_RUN``.
        device: where segments will run.
        budget_bytes: the hard limit.
        resident: what other graphs keep on the accelerator.
        ring_bytes: length of its staging ring.
        overhead_bytes: what the device's libraries take of the budget, item by item.
        host_memory: what can be pinned; None says everything.
    """

    kind: str
    device: torch.device
    budget_bytes: int
    resident: ResidentWeights
    ring_bytes: int = 0
    overhead_bytes: Mapping[str, int] = field(default_factory=dict)
    host_memory: HostWeights | None = None


@dataclass(frozen=True)
class BucketPlan:
    """What the stages that do not depend on the split left: the graph with its segments, and the context.

    ``linears`` is the graph before it was grouped, which decisions are taken on.
    """

    module: fx.GraphModule
    linears: fx.GraphModule
    context: Context
    sites: Mapping[int, LinearSite]
    kind: str


class _Graphs(NamedTuple):
    """One graph before and after its nodes are grouped into segments."""

    linears: fx.GraphModule
    grouped: fx.GraphModule


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
        self._tokens = token_count(module)
        self._needed: dict[Hashable, int] = {}

    def plan_bucket(
        self, bucket: Bucket, sizes: Sizes, target: Target, weights: Mapping[str, Tensor]
    ) -> BucketPlan:
        """Everything that is the same for every split of the Linears.

        Raises:
            BudgetError: the target's budget cannot hold what a step needs.
            HostOnlyGraphError: the graph cannot be offloaded.
        """
        context = Context(
            options=self._options,
            profile=self._profile,
            sizes=sizes,
            bucket=bucket,
            budget_bytes=target.budget_bytes,
            resident=target.resident,
            weights=weights,
            refuse=_ignore,
            segments=self._segments,
            ring_bytes=target.ring_bytes,
            overhead_bytes=target.overhead_bytes,
            device=target.device,
            host_memory=target.host_memory,
        )
        return self._decided(context, target.kind, None)

    def decide_again(self, base: BucketPlan, sizes: Sizes, target: Target, weights: Mapping[str, Tensor]) -> BucketPlan:
        """The same plan with what stays on the accelerator decided again: the target or the sizes have changed.

        Segments and placement stay, so nothing is compiled. (Unless everything fitted and no longer does, or a stack
        of experts comes or goes: the graph is cut anew then.)

        Raises:
            BudgetError: the target's budget cannot hold what a step needs.
        """
        context = replace(
            base.context, sizes=sizes, budget_bytes=target.budget_bytes, resident=target.resident, weights=weights,
            ring_bytes=target.ring_bytes, overhead_bytes=target.overhead_bytes, host_memory=target.host_memory,
            activation_bytes=None, lean=False, options=self._options, residency=None,
        )  # fmt: skip
        return self._decided(context, target.kind, base)

    def _decided(self, context: Context, kind: str, base: BucketPlan | None) -> BucketPlan:
        refusals: dict[Refusal, None] = dict.fromkeys(context.refusals)
        context = replace(context, refuse=lambda refusal: refusals.setdefault(refusal))
        try:
            graphs, context = self._within_budget(self._with_room(context, spare=True), base)
        except BudgetError:  # no room beyond what the options state: what a larger forward needs is decided then
            graphs, context = self._within_budget(self._with_room(context, spare=False), base)
        context = replace(context, refusals=tuple(refusals), weights={})
        return BucketPlan(graphs.grouped, graphs.linears, context, _sites(graphs.grouped, context), kind)

    def plan_split(
        self, base: BucketPlan, split: Split, stages: tuple[Stage, ...] = ONCE_PER_SPLIT, trials: Trials | None = None
    ) -> PlannedStep:
        """The schedule of one split; ``stages`` leaves out lowering where nothing will run.

        ``trials`` (those of ``base``) is given where they will be asked for again.
        """
        trials = Trials(base.module) if trials is None else trials
        context = replace(base.context, options=replace(self._options, split=split))
        module, done = trials.finish(context, balanced_splits(base.module, context, trials), stages)
        tried, excess = [done.splits], _excess_bytes(done)
        for leaner in _leaner(base.module, context, trials) if split == "auto" else ():
            if _excess_bytes(done) > 0 and (splits := leaner()) not in tried:
                module, done = trials.finish(context, splits, stages)
                tried.append(splits)
        if len(tried) > 1:
            reason = f"it needs {excess} bytes more for activations than are left; a leaner split is taken"
            done = replace(done, refusals=(*done.refusals, Refusal("the balance of the whole step", reason)))
        done = replace(done, refusals=(*done.refusals, *_apart(done)))
        if _excess_bytes(done) > 0:
            raise BudgetError(
                f"split={split} needs {_excess_bytes(done)} bytes more for activations than gpu_memory="
                f"{format_bytes(context.budget_bytes)} leaves: use a larger budget"
            )
        return PlannedStep(module, done, self._schedule(base, module, done, trials))

    def _with_room(self, context: Context, *, spare: bool) -> Context:
        """The context with the sizes that the budget has to hold."""
        sequences, tokens = sequence_shape(self._module.graph.find_nodes(op="placeholder"), context.weights)
        largest = largest_sizes(self._tokens, context, spare=spare)
        return replace(context, largest=largest, sequences=sequences, tokens_per_sequence=tokens, spare=spare)

    def _within_budget(self, context: Context, base: BucketPlan | None) -> tuple[_Graphs, Context]:
        """Run the stages that do not depend on the split until residency leaves room for its own schedule.

        What a schedule needs for activations depends on the residency that it was made with, so the first is decided
        with an estimate and the next with what the schedule before needed. Another plan for the same sizes begins
        with that.

        Raises:
            BudgetError: the leanest residency does not fit.
        """
        made_for = context.bucket, frozenset(context.sizes.items()), frozenset(context.largest.items())
        found = None
        with contextlib.suppress(BudgetError):  # an estimate may ask for too much
            found = self._settled(replace(context, activation_bytes=self._needed.get(made_for)), base)
        graphs, done = found if found is not None else self._within_tight_budget(context, base)
        self._needed[made_for] = require(done.memory, "measure_memory").peak_bytes(done.room)
        return graphs, done

    def _within_tight_budget(self, context: Context, base: BucketPlan | None) -> tuple[_Graphs, Context]:
        """The same, begun with what the leanest residency (no weights, the smallest ring) needs.

        If the budget holds that, there is a plan, and the budget that it needs is the smallest that works. Its schedule
        has many small transfers and takes long to make, so it is made only where an estimate does not do.
        """
        _, lean, needed = self._tried(replace(context, lean=True), base)
        start = replace(context, activation_bytes=needed)
        found = self._settled(start, base)
        if found is None and lean.blocks and self._options.pair_mlp == "auto":  # their activations may be too large
            found = self._settled(replace(start, options=replace(context.options, pair_mlp=False)), base)
        if found is not None:
            return found
        lean_bytes = require(lean.memory, "measure_memory").peak_bytes(lean.room)
        graphs, done, _ = self._tried(replace(context, lean=True, activation_bytes=lean_bytes), base)
        return graphs, done

    def _settled(self, context: Context, base: BucketPlan | None) -> tuple[_Graphs, Context] | None:
        """The first residency of some that leaves room for its own schedule, None if none does.

        One that was decided with an estimate is not taken unless that is exact: it may leave far too much room.

        Raises:
            BudgetError: the budget does not hold what ``context`` starts from.
        """
        for attempt in range(_ATTEMPTS):
            try:
                graphs, done, needed = self._tried(context, base)
            except BudgetError:
                if attempt == 0:
                    raise
                return None
            reserved = require(done.residency, "choose_residency").budget[ACTIVATIONS]
            if needed == reserved or (needed < reserved and context.activation_bytes is not None):
                return graphs, done
            context = replace(context, activation_bytes=needed)
        return None

    def _tried(self, context: Context, base: BucketPlan | None) -> tuple[_Graphs, Context, int]:
        """The grouped graph, its context, and the bytes of activations that its schedule takes.

        The splits are chosen later, and shares that the options force may be overridden. With fewer rows on the host
        fewer values come down early, so the schedule without any has to fit as well.
        """
        graphs, context = self._cut(context, base)
        module = graphs.grouped
        splits = [require(context.splits, "choose_splits")]
        if any(plan.host for plan in splits[0].values()):
            splits.append(choose_splits(module, replace(context, options=replace(context.options, split=0.0))))
        paired = None if context.lean else promising_blocks(module, context)
        needs = [_need(module, context, each) for each in (*splits, *([paired] if paired else []))]
        need = max(needs, key=lambda memory: memory.peak_bytes(context.room))
        return graphs, replace(context, memory=need), need.peak_bytes(context.room)

    def _cut(self, context: Context, base: BucketPlan | None) -> tuple[_Graphs, Context]:
        """Decisions, and the graph with its segments: those of ``base`` if they are cut at the same places."""
        linears = copy_module(self._module) if base is None else base.linears
        context = run_pipeline(linears, context, NORMALISATION if base is None else ())
        context = run_pipeline(linears, context, DECISIONS)
        if base is not None and _cuts(base.context) == _cuts(context):
            return _Graphs(linears, base.module), context
        grouped = copy_module(linears)
        return _Graphs(linears, grouped), run_pipeline(grouped, context, GROUPING)

    def _schedule(self, base: BucketPlan, module: fx.GraphModule, context: Context, trials: Trials) -> Schedule:
        prediction = require(context.prediction, "predict_step")
        splits = require(context.splits, "choose_splits")
        residency = require(context.residency, "choose_residency")
        sites = {position: replace(site, plan=splits[position]) for position, site in base.sites.items()}
        low, high = context.bucket.low, context.bucket.high
        tokens = f"{low} token{'s' if low > 1 else ''}" if high == low else f"{low} to {high} tokens"
        tokens = f"{low} tokens or more" if high is None else tokens
        whole = residency.budget[RESIDENT] if residency.whole_graph else 0
        where = DRY_RUN if base.kind == DRY_RUN else f"on {base.kind}"
        return Schedule(
            title=f"hetegen {where}, hardware {self._profile.name}, {tokens} a forward",
            tokens=(low, high),
            split=context.options.split,
            rows=schedule_rows(module.graph, prediction, sites, context.number),
            resident_bytes=_bytes_in(sites, "resident_rows") + whole,
            streamed_bytes=_bytes_in(sites, "streamed_rows"),
            host_bytes=_bytes_in(sites, "host"),
            predicted_step_s=prediction.step_s,
            floor_s=floor_s(base.module, context),
            baselines=baselines(base.module, context, trials),
            budget_bytes=context.budget_bytes,
            budget=residency.budget,
            refusals=(*context.refusals, *stacks_on_host(base.module, context), *self._segments.refused.values()),
            whole_graph=residency.whole_graph,
            accelerator=base.kind,
        )


def _apart(context: Context) -> list[Refusal]:
    """Which blocks are cut Linear by Linear although the options ask for all of them as one."""
    cut = {plan.block for plan in require(context.splits, "choose_splits").values()}
    apart = sum(block.consumer not in cut for block in context.blocks)
    if context.options.pair_mlp is not True or not apart:
        return []
    reason = "their slices do not fit the staging ring, or the step is shorter with nothing of them on the host"
    return [Refusal("pair_mlp", f"{apart} of {len(context.blocks)} blocks are not cut as one: {reason}")]


def _leaner(module: fx.GraphModule, context: Context, trials: Trials) -> Iterator[Callable[[], Splits]]:
    """Splits that may take less memory: without blocks, then those that residency was decided with."""
    if context.options.pair_mlp == "auto" and context.blocks:
        alone = replace(context, blocks=())
        yield lambda: balanced_splits(module, alone, trials)
    yield lambda: choose_splits(module, context)


def budget_bytes(gpu_memory: int | None, available_bytes: int, accelerator: str) -> int:
    """The hard limit: ``gpu_memory``, else ``available_bytes`` less a sixteenth as a reserve.

    Never more than there is.
    """
    if gpu_memory is None:
        return available_bytes * 15 // 16
    if gpu_memory > available_bytes:
        logger.warning(
            "gpu_memory=%s is more than the %s that the %s accelerator has: planning with the latter",
            format_bytes(gpu_memory), format_bytes(available_bytes), accelerator,
        )
    return min(gpu_memory, available_bytes)


def largest_sizes(tokens: sympy.Expr, context: Context, *, spare: bool) -> Sizes:
    """The sizes up to which a plan's memory is reserved.

    Lengths of caches reach the stated context. With ``spare`` they reach twice what they are where none is stated,
    and the number of tokens (if one size tells it) the end of the bucket.
    """
    counted = tokens.free_symbols & context.sizes.keys()
    found: Sizes = {}
    for symbol, size in context.sizes.items():
        if symbol not in counted:
            found[symbol] = max(size, sympy.Integer(context.options.context or (2 * size if spare else size)))
        elif spare and len(counted) == 1:
            now = number(tokens, dict(context.sizes))
            high = context.bucket.high or 2 * now
            found[symbol] = max(size, size * high // max(1, now))
    return found


def _need(module: fx.GraphModule, context: Context, splits: Splits) -> MemoryNeed:
    """What the schedule of some splits occupies."""
    scheduled = run_pipeline(copy_module(module), replace(context, splits=splits), UNTIL_MEASURED, lint=False)
    return require(scheduled.memory, "measure_memory")


def _ignore(refusal: Refusal) -> None:
    """Before there is a list of refusals."""


def _cuts(context: Context) -> object:
    """What of a residency decides where the graph is cut."""
    residency = require(context.residency, "choose_residency")
    return residency.whole_graph, residency.host_weights, residency.tables


def _excess_bytes(context: Context) -> int:
    """Bytes by which a schedule's activations exceed what its residency left for them."""
    budget = require(context.residency, "choose_residency").budget
    return require(context.memory, "measure_memory").peak_bytes(context.room) - budget[ACTIVATIONS]


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


__all__ = ["BucketPlan", "PlannedStep", "Planner", "Split", "Target", "bucket_of", "budget_bytes"]
