"""Other ways of sharing out the memory for resident weights, where the step is far from its floor with the first.

Which rows stay is decided by an estimate, which is all that most plans need: their steps are within some percent of the
floor. Where launches and waits of the host's thread decide (small models, fast links) the estimate may be wrong by
more than that, so the steps of a few other ways are scheduled and simulated, and the shortest has its way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from hetegen_compile.errors import BudgetError
from hetegen_compile.passes.claims import Way
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.residency_shares import of_one_model
from hetegen_compile.planning.balance import balanced_splits, is_varied
from hetegen_compile.planning.floor import floor_s
from hetegen_compile.planning.planned import Balanced, BucketPlan

logger = logging.getLogger("hetegen_compile")

_FAR = 1.05
"""Times the floor: a step that is longer is worth more planning."""

_MOST = 3
"""Other ways that are simulated: each takes as long as the plan itself."""

_SHORTER = 0.995
"""Times the first step: less than that is not worth another graph's residency."""


def weighed(first: BucketPlan, another: Callable[[Way], BucketPlan]) -> BucketPlan:
    """``first``, or the plan with another residency whose simulated step is shorter.

    Args:
        first: the plan with the residency that is estimated to be best.
        another: makes the plan with another way of it; BudgetError: it has no room for its schedule.
    """
    if not _is_asked(first.context):
        return first
    best = _balanced(first)
    if best.step_s < _FAR * floor_s(first.module, first.context):
        return replace(first, balanced=[best])
    chosen = first
    for way in require(first.context.residency, "choose_residency").ways[:_MOST]:
        try:
            other = another(way)
        except BudgetError:
            continue
        found = _balanced(other)
        if found.step_s < _SHORTER * best.step_s:
            logger.debug("other weights stay: a step of %.3g instead of %.3g s", found.step_s, best.step_s)
            best, chosen = found, other
    return replace(chosen, balanced=[best])


def _is_asked(context: Context) -> bool:
    """Whether the plan is of decode steps that share weights between host and accelerator as they like, and no other
    graph of the model has been weighed. (A prompt is one step of many, and decode steps will follow its order.)"""
    decodes = is_varied(context) and context.tokens_per_sequence <= 1
    free = decodes and context.options.split == "auto" and not context.lean
    residency = require(context.residency, "choose_residency")
    related = (graph for graph in context.resident.claims() if of_one_model(residency.claims, graph))
    return free and bool(residency.ways) and not any(claim.weighed for graph in related for claim in graph)


def _balanced(plan: BucketPlan) -> Balanced:
    """The ways to split what is not resident, by their simulated steps."""
    trials = plan.trials()
    splits = balanced_splits(plan.module, plan.context, trials)
    return Balanced(splits, trials, trials.step_s(plan.context, splits[0]))


__all__ = ["weighed"]
