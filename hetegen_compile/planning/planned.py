"""What a plan is made for, and what planning leaves: a bucket's plan, and a schedule for each split of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import sympy
import torch
from torch import fx

from hetegen_compile.passes.claims import HostWeights, ResidentWeights
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.plans import Splits
from hetegen_compile.planning.trials import Trial, Trials
from hetegen_compile.reports.schedule import LinearSite, Schedule

DRY_RUN = "dry run"
"""What a plan is made for if nothing will run."""

Sizes = Mapping[sympy.Symbol, sympy.Integer]
Split = float | Literal["auto"]
Ahead = bool | Literal["auto"]


class Variant(NamedTuple):
    """One way to schedule what has been decided about memory: the values of the options of these names."""

    split: Split
    issue_ahead: Ahead = "auto"


@dataclass(frozen=True)
class Target:
    """What a plan is made for: the accelerator and what lies on it already.

    Attributes:
        kind: ``"cuda"``, ``"emulated"`` or ``DRY_RUN``.
        device: where segments will run.
        budget_bytes: the hard limit.
        resident: what other graphs keep on the accelerator, and the staging ring that they share.
        overhead_bytes: what the device's libraries take of the budget, item by item.
        host_memory: what can be pinned; None says everything.
        cannot_issue_ahead: why nothing can be issued ahead of the host's parts; "" says that it can.
        issue_ahead: whether it is, where that is not what the options say.
    """

    kind: str
    device: torch.device
    budget_bytes: int
    resident: ResidentWeights
    overhead_bytes: Mapping[str, int] = field(default_factory=dict)
    host_memory: HostWeights | None = None
    cannot_issue_ahead: str = ""
    issue_ahead: Ahead | None = None


class Balanced(NamedTuple):
    """Ways to split what is not resident, that of the shortest simulated step first, and their schedules."""

    splits: list[Splits]
    trials: Trials
    step_s: float


@dataclass(frozen=True)
class BucketPlan:
    """What the stages that do not depend on the split left: the graph with its segments, and the context.

    ``linears`` is the graph before it was grouped, which decisions are taken on. ``measured`` are schedules that were
    made to see what they occupy: most of them are asked for again when the split is chosen, and by nobody afterwards.
    ``balanced`` is what was found if the split has been chosen already.
    """

    module: fx.GraphModule
    linears: fx.GraphModule
    context: Context
    sites: Mapping[int, LinearSite]
    kind: str
    measured: list[Trial] = field(default_factory=list)
    balanced: list[Balanced] = field(default_factory=list)

    def trials(self) -> Trials:
        """Schedules to choose the split from. The first caller gets those that were measured, later ones get none."""
        found = Trials(self.module, self.measured)
        self.measured.clear()
        return found

    def take_balanced(self, context: Context) -> Balanced | None:
        """What was found, for the first caller, if that asks for this context: its schedules are for one plan only."""
        found = self.balanced.pop() if self.balanced else None
        wanted = context.options, context.cannot_issue_ahead, context.sizes
        known = self.context.options, self.context.cannot_issue_ahead, self.context.sizes
        return found if wanted == known else None


class Graphs(NamedTuple):
    """One graph before and after its nodes are grouped into segments."""

    linears: fx.GraphModule
    grouped: fx.GraphModule


@dataclass(frozen=True)
class ScheduledStep:
    """One scheduled graph, the context it was made in, and the report on it."""

    module: fx.GraphModule
    context: Context
    schedule: Schedule


__all__ = [
    "DRY_RUN",
    "Ahead",
    "Balanced",
    "BucketPlan",
    "Graphs",
    "ScheduledStep",
    "Sizes",
    "Split",
    "Target",
    "Variant",
]
