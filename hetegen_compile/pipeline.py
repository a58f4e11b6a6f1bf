"""The compiler on one page: every stage, in order, with its reason.

A stage is one of three kinds. **analyse**: graph -> value. **decide**: graph and costs -> a frozen plan, the
graph stays as it is. **rewrite**: graph and plan -> the graph, changed in place. What an analysis or a decision
returns goes into the context's field named in ``leaves`` for the stages after it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.carry_prefetches import carry_prefetches
from hetegen_compile.passes.choose_residency import choose_residency
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.choose_staging import choose_staging
from hetegen_compile.passes.context import Context, Refusal
from hetegen_compile.passes.find_blocks import find_blocks
from hetegen_compile.passes.fold_gelu import fold_gelu
from hetegen_compile.passes.group_segments import group_segments
from hetegen_compile.passes.insert_transfers import insert_transfers
from hetegen_compile.passes.issue_ahead import issue_ahead
from hetegen_compile.passes.lower import lower
from hetegen_compile.passes.measure_memory import measure_memory
from hetegen_compile.passes.normalise_linears import normalise_linears
from hetegen_compile.passes.note_effects import note_effects
from hetegen_compile.passes.place_nodes import place_nodes
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.resolve_sizes import resolve_sizes
from hetegen_compile.passes.retarget_devices import retarget_devices
from hetegen_compile.passes.schedule import schedule
from hetegen_compile.passes.split_experts import split_experts
from hetegen_compile.passes.split_linears import split_linears
from hetegen_compile.passes.stream_experts import stream_experts
from hetegen_compile.passes.verify import verify

logger = logging.getLogger("hetegen_compile")


@dataclass(frozen=True)
class Stage:
    """One line of the pipeline."""

    run: Callable[[fx.GraphModule, Context], Any]
    kind: Literal["analyse", "decide", "rewrite"]
    why: str
    leaves: str | None = None

    @property
    def name(self) -> str:
        """That of its function, its file, in logs and in the table of stages."""
        return self.run.__name__


PIPELINE: tuple[Stage, ...] = (
    Stage(resolve_sizes, "rewrite", "sizes are known on the host; reading them from a tensor would wait for it"),
    Stage(normalise_linears, "rewrite", "one node kind for every form of Linear"),
    Stage(fold_gelu, "rewrite", "eight operations that the host would run one by one are one"),
    Stage(note_effects, "analyse", "what the program does to memory: what verify holds the schedule to", "effects"),
    Stage(find_blocks, "analyse", "Linears whose host parts need not meet in between", "blocks"),
    Stage(annotate_costs, "analyse", "decisions compare seconds", "costs"),
    Stage(choose_residency, "decide", "the budget is hard; what saves most per byte stays", "residency"),
    Stage(choose_staging, "decide", "host memory is not doubled: what cannot be pinned goes through a ring", "staged"),
    Stage(choose_splits, "decide", "host and link finish together", "splits"),
    Stage(stream_experts, "rewrite", "one node kind for products with experts of which parts are computed"),
    Stage(place_nodes, "decide", "everything else: host, accelerator or both", "placement"),
    Stage(group_segments, "rewrite", "segments are cut at Linears, so no plan changes them"),
    Stage(split_linears, "rewrite", "host part, accelerator parts, join"),
    Stage(split_experts, "rewrite", "a part for each chunk of a streamed stack of experts"),
    Stage(insert_transfers, "rewrite", "nothing crosses a border without a start and a wait"),
    Stage(schedule, "rewrite", "slots and issue order: what runs by itself first, host work last"),
    Stage(issue_ahead, "rewrite", "what needs the host's parts is issued while they are computed"),
    Stage(carry_prefetches, "rewrite", "the link does not idle between two steps"),
    Stage(measure_memory, "analyse", "what it occupies, in issue order, at any sizes", "memory"),
    Stage(predict_step, "analyse", "the step on a timeline, for the table and for pacing", "prediction"),
    Stage(verify, "analyse", "no race, or an error that names the node"),
    Stage(retarget_devices, "rewrite", "constants and example values of the device that segments run on"),
    Stage(lower, "rewrite", "segments through Inductor, equal ones once"),
)


def _place_of(run: Callable[[fx.GraphModule, Context], Any]) -> int:
    return next(i for i, stage in enumerate(PIPELINE) if stage.run is run)


_FIRST_OF_PLAN = _place_of(split_linears)
NORMALISATION = PIPELINE[: _place_of(find_blocks)]
"""Stages that bring the captured graph into the form that decisions are taken on."""
DECISIONS = PIPELINE[_place_of(find_blocks) : _place_of(stream_experts)]
"""Stages that are run again when memory is shared out anew; they leave the graph as it is."""
GROUPING = PIPELINE[_place_of(stream_experts) : _FIRST_OF_PLAN]
"""Stages that cut the graph into segments."""
ONCE_PER_SPLIT = PIPELINE[_FIRST_OF_PLAN:]
"""Stages that turn one assignment of rows into a schedule."""
UNTIL_MEASURED = PIPELINE[_FIRST_OF_PLAN : _place_of(measure_memory) + 1]
"""Stages up to what a schedule occupies."""
SIMULATED = (*PIPELINE[_FIRST_OF_PLAN : _place_of(measure_memory)], PIPELINE[_place_of(predict_step)])
"""Stages of a schedule of which only the seconds are asked for."""
UNTIL_VERIFIED = PIPELINE[_FIRST_OF_PLAN : _place_of(verify) + 1]
"""Stages of a schedule that nobody will run."""


def run_pipeline(
    module: fx.GraphModule, context: Context, stages: tuple[Stage, ...] = PIPELINE, *, lint: bool = True
) -> Context:
    """Run ``stages`` on ``module`` in place and return the context with what they left behind and refused.

    Without ``lint`` a malformed graph is found by ``verify`` only: for schedules, most of which are simulated and
    dropped.
    """
    for stage in stages:
        started = time.perf_counter()
        refused: list[Refusal] = []
        result = stage.run(module, replace(context, refuse=refused.append))
        context = context.refusing(stage.name, refused)
        if stage.kind == "rewrite" and lint:
            module.graph.lint()
        if stage.leaves is not None:
            context = replace(context, **{stage.leaves: result})
        logger.debug("%s %s: %.3f s", stage.kind, stage.name, time.perf_counter() - started)
    return context
