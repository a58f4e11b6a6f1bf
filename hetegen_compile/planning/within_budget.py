"""The search for a residency that leaves room for its own schedule.

How much a schedule needs for activations depends on the residency that it was made with, and that on how much is left:
so one is decided, its schedule measured, and the next decided with what was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import fx

from hetegen_compile.errors import BudgetError
from hetegen_compile.ir import copy_module
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.issue_ahead import NO_ROOM_AHEAD, issues_ahead
from hetegen_compile.passes.plans import ACTIVATIONS
from hetegen_compile.pipeline import DECISIONS, GROUPING, NORMALISATION, Stage, run_pipeline
from hetegen_compile.planning.balance import promising_blocks, promising_trips
from hetegen_compile.planning.planned import BucketPlan, Graphs
from hetegen_compile.planning.trials import Trial, measured_trial

_ATTEMPTS = 3
"""Residencies that are tried, each with what the schedule of the one before needed."""

_SPARE = 64
"""One part in so many of the activations is left beside them where there is room: which rows the host computes is
decided later, and a split that needs some bytes more than those measured here would be lost."""


class _Cut(NamedTuple):
    """A graph that has been grouped into segments, the context that it was cut in, and schedules made of it."""

    graphs: Graphs
    context: Context
    measured: Sequence[Trial] = ()


class ResidencySearch:
    """For the plans of one captured graph; remembers what their schedules needed."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._needed: dict[Hashable, int] = {}

    def within_budget(self, context: Context, base: BucketPlan | None) -> tuple[Graphs, Context, Sequence[Trial]]:
        """Run the stages that do not depend on the split until residency leaves room for its own schedule.

        The last value are the schedules that were measured for that.

        What a schedule needs for activations depends on the residency that it was made with, so the first is decided
        with an estimate and the next with what the schedule before needed. Another plan for the same sizes begins
        with that.

        Raises:
            BudgetError: the leanest residency does not fit.
        """
        cut = None if base is None else _Cut(Graphs(base.linears, base.module), base.context)
        made_for = context.bucket, frozenset(context.sizes.items()), frozenset(context.largest.items())
        found = None
        with contextlib.suppress(BudgetError):  # an estimate may ask for too much
            found = self._settled(replace(context, activation_bytes=self._needed.get(made_for)), cut)
        if found is None and issues_ahead(context):
            with contextlib.suppress(BudgetError):
                found = self._settled(replace(context, cannot_issue_ahead=NO_ROOM_AHEAD, activation_bytes=None), cut)
        graphs, done, measured = found if found is not None else self._within_tight_budget(context, cut)
        self._needed[made_for] = require(done.residency, "choose_residency").budget[ACTIVATIONS]
        return graphs, done, measured

    def _within_tight_budget(self, context: Context, cut: _Cut | None) -> _Cut:
        """The same, begun with what the leanest residency (no weights, the smallest ring) needs.

        If the budget holds that, there is a plan, and the budget that it needs is the smallest that works. Its schedule
        has many small transfers and takes long to make, so it is made only where an estimate does not do.
        """
        lean, needed = self._tried(replace(context, lean=True), cut)
        lean = lean._replace(measured=())  # nobody asks for them again, and they are large
        start = replace(context, activation_bytes=needed)
        found = self._settled(start, lean, spare=False)
        if found is None and lean.context.blocks and context.options.pair_mlp == "auto":
            # the activations of blocks that are cut as one may be too large
            found = self._settled(replace(start, options=replace(context.options, pair_mlp=False)), lean, spare=False)
        if found is not None:
            return found
        lean_bytes = require(lean.context.memory, "measure_memory").peak_bytes(lean.context.room)
        return self._tried(replace(context, lean=True, activation_bytes=lean_bytes), lean)[0]

    def _settled(self, context: Context, cut: _Cut | None, *, spare: bool = True) -> _Cut | None:
        """The first residency of some that leaves room for its own schedule, None if none does.

        One that was decided with an estimate is not taken unless that is exact: it may leave far too much room.

        Raises:
            BudgetError: the budget does not hold what ``context`` starts from.
        """
        for attempt in range(_ATTEMPTS):
            try:
                cut, needed = self._tried(context, cut)
            except BudgetError:
                if attempt == 0:
                    raise
                return None
            reserved = require(cut.context.residency, "choose_residency").budget[ACTIVATIONS]
            if needed == reserved or (needed < reserved and context.activation_bytes is not None):
                return cut
            cut = cut._replace(measured=())
            context = replace(context, activation_bytes=needed + (needed // _SPARE if spare else 0))
        return None

    def _tried(self, context: Context, cut: _Cut | None) -> tuple[_Cut, int]:
        """The grouped graph and the bytes of activations that its schedule takes; ``cut`` is one of before.

        The splits are chosen later, and shares that the options force may be overridden. With fewer rows on the host
        fewer values come down early, so the schedule without any has to fit as well.
        """
        graphs, context, _ = self._cut(context, cut)
        module = graphs.grouped
        residency = require(context.residency, "choose_residency")
        splits = [
            choose_splits(module, context) if residency.streamed_stacks else require(context.splits, "choose_splits")
        ]
        if any(plan.host for plan in splits[0].values()):
            splits.append(choose_splits(module, replace(context, options=replace(context.options, split=0.0))))
        if not context.lean:
            promising = promising_blocks(module, context), promising_trips(module, context)
            splits += [each for each in promising if each is not None and each not in splits]
        measured = [measured_trial(module, context, each) for each in splits]
        needs = [require(trial.context.memory, "measure_memory") for trial in measured]
        need = max(needs, key=lambda memory: memory.peak_bytes(context.room))
        need = replace(need, workspace={})  # its nodes would keep the schedule alive
        return _Cut(graphs, replace(context, memory=need), measured), need.peak_bytes(context.room)

    def _cut(self, context: Context, before: _Cut | None) -> _Cut:
        """Decisions, and the graph with its segments: those of ``before`` if they are cut at the same places."""
        if before is None:
            linears = copy_module(self._module)
            context = run_pipeline(linears, context, NORMALISATION)
        else:
            linears, context = before.graphs.linears, _as_left(before.context, context, NORMALISATION)
        context = run_pipeline(linears, context, DECISIONS)
        if before is not None and _cuts(before.context) == _cuts(context):
            return _Cut(before.graphs, _as_left(before.context, context, GROUPING))
        grouped = copy_module(linears)
        return _Cut(Graphs(linears, grouped), run_pipeline(grouped, context, GROUPING))


def _as_left(before: Context, context: Context, stages: Iterable[Stage]) -> Context:
    """``context`` with what ``stages`` have found and refused in another one."""
    found = {stage.leaves: getattr(before, stage.leaves) for stage in stages if stage.leaves is not None}
    refused = {stage.name: before.refused[stage.name] for stage in stages}
    return replace(context, refused={**context.refused, **refused}, **found)


def _cuts(context: Context) -> object:
    """What of a residency decides where the graph is cut."""
    residency = require(context.residency, "choose_residency")
    return residency.whole_graph, residency.host_weights, residency.streamed_stacks, residency.tables


__all__ = ["ResidencySearch"]
