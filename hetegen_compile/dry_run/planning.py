"""``hetegen_compile.plan``: the schedule of one forward, from shapes alone."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from hetegen_compile.calibration.runner import EMULATED_PRESET
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.dry_run.fakes import Fakes
from hetegen_compile.dry_run.trace import TracedGraph, nothing_to_plan, trace
from hetegen_compile.geometry import storage_id
from hetegen_compile.hardware import profile_for
from hetegen_compile.heap import large_heap
from hetegen_compile.options import Options, format_bytes, parse_options
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.claims import Claim
from hetegen_compile.passes.context import HostOnlyGraphError, SegmentCache, require
from hetegen_compile.passes.plans import Residency
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.pipeline import UNTIL_VERIFIED
from hetegen_compile.planning.baselines import baselines
from hetegen_compile.planning.floor import floor_s
from hetegen_compile.planning.planned import DRY_RUN, BucketPlan, ScheduledStep, Sizes, Split, Target
from hetegen_compile.planning.planner import Planner, budget_bytes
from hetegen_compile.planning.trials import Trials
from hetegen_compile.reports.schedule import Schedule, register


def plan(model: nn.Module, *args: Any, options: Mapping[str, object] | None = None, **kwargs: Any) -> Schedule:
    """The schedule of ``model(*args, **kwargs)`` without running it.

    The model may be in host memory, on meta (``with torch.device("meta"): ...``) or both: only shapes are looked at,
    nothing is computed, no memory is taken for weights, and neither the model nor Dynamo's state is changed. The
    hardware may be a machine that one does not have.

    Args:
        model: the model; one that ``torch.compile`` or ``.compile()`` made is planned as what it was made from.
        args, kwargs: what its forward is called with; tensors may be on meta.
        options: those of the backend. ``hardware`` names the machine and ``gpu_memory`` the budget (default: the
            profile's memory less a sixteenth). ``print_schedule=True`` prints the table; ``pace`` and ``seed``, which
            are about running, say nothing here.

    Returns:
        The schedule of the graph that reads most weights; those of the forward's other graphs, if it breaks into
        several, are in its ``others``. ``hetegen_compile.schedules()`` lists all of them. ``measured_step_s`` is None.

    Raises:
        OptionError, HardwareProfileError: an option is wrong.
        UnsupportedModelError: the forward depends on values that only a run can tell.
        BudgetError: ``gpu_memory`` is too small; the message has the number that works.
    """
    parsed = parse_options(options)
    inner = getattr(model, "_orig_mod", model)
    machine = Machine(parsed, profile_for(parsed), weight_bytes(inner))
    fakes = Fakes()
    with large_heap():
        graphs = trace(fakes.copy(inner), fakes, fakes.copy(args), fakes.copy(kwargs)).graphs
    resident = PlannedWeights()
    with large_heap():
        planned = [plan_graph(graph, machine, resident) for graph in graphs]
        schedule = main_schedule(planned)
    if (options or {}).get("print_schedule"):
        print(schedule.table(unfold=parsed.unfold), flush=True)
    return schedule


@dataclass(frozen=True)
class Machine:
    """What plans are made for: the options, the hardware, the whole model's bytes, what of the budget is taken."""

    options: Options
    profile: HardwareProfile
    weight_bytes: int = 0
    reserved_bytes: int = 0

    @cached_property
    def planned_options(self) -> Options:
        """The options with "auto" as the accelerator that the hardware has: a GPU, unless that is the emulated one."""
        if self.options.accelerator != "auto":
            return self.options
        return replace(self.options, accelerator="emulated" if self.profile.name == EMULATED_PRESET else "cuda")

    @cached_property
    def budget_bytes(self) -> int:
        """The hard limit on the accelerator's memory."""
        accelerator = self.profile.accelerator
        return budget_bytes(self.options.gpu_memory, accelerator.memory_bytes, accelerator.name)

    def staged(self, names: Collection[str], weights: Mapping[str, Tensor]) -> dict[str, str]:
        """All of ``names`` if the model does not fit the host's memory: a mapped file cannot be pinned whole."""
        available = self.profile.host.memory_bytes
        if self.weight_bytes <= available:
            return {}
        reason = f"{format_bytes(self.weight_bytes)} of weights are more than the host's {format_bytes(available)}"
        return dict.fromkeys(names, reason)


@dataclass
class PlannedWeights:
    """What earlier plans of the same model claim, which rows of weights they keep, and their staging ring."""

    plans: list[Residency] = field(default_factory=list)

    def add(self, residency: Residency) -> None:
        """Note a plan: what it decides about resident rows holds for those before it, too."""
        self.plans.append(residency)

    @property
    def first_rows(self) -> Mapping[Hashable, int]:
        """First resident row of each weight, as the last plan decided."""
        return self.plans[-1].first_rows if self.plans else {}

    def ring_within(self, nbytes: int) -> int:
        """The longest staging ring that takes at most ``nbytes``."""
        return max((plan.ring_bytes for plan in self.plans if plan.ring_bytes <= nbytes), default=0)

    def identify(self, weight: Tensor) -> Hashable:
        """A fake stands for one weight in all graphs."""
        return id(weight)

    def claims(self) -> Sequence[Sequence[Claim]]:
        """What each plan claims, oldest first."""
        return [plan.claims for plan in self.plans]

    def reserved_bytes(self) -> int:
        """The most that a step needs beside resident weights and the ring."""
        return max((plan.step_bytes for plan in self.plans), default=0)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step: ours, the bound, and done otherwise."""

    step_s: float
    floor_s: float
    baselines: Mapping[str, float | None]


@dataclass(frozen=True)
class PlannedGraph:
    """One captured graph with its plan."""

    graph: TracedGraph
    base: BucketPlan
    planner: Planner
    split: Split

    @cached_property
    def step(self) -> ScheduledStep:
        """Its schedule, made when it is asked for: while residency is being settled nobody does."""
        return self.planner.plan_split(self.base, self.split, UNTIL_VERIFIED, self.trials)

    @cached_property
    def trials(self) -> Trials:
        """The schedules that it was chosen from and that it is compared with."""
        return self.base.trials()

    @property
    def residency(self) -> Residency:
        """How its plan shares out the accelerator's memory."""
        return require(self.base.context.residency, "choose_residency")

    def at(self, sizes: Sizes) -> StepTimes:
        """The same plan's step at other sizes: nothing is decided again."""
        context = replace(self.base.context, sizes=sizes)
        context = replace(context, costs=annotate_costs(self.base.module, context))
        return StepTimes(
            step_s=predict_step(self.step.module, replace(self.step.context, sizes=sizes)).step_s,
            floor_s=floor_s(self.base.module, context),
            baselines=baselines(self.base.module, context, self.trials),
        )


def plan_graph(
    graph: TracedGraph,
    machine: Machine,
    resident: PlannedWeights,
    sizes: Sizes | None = None,
    planner: Planner | None = None,
) -> PlannedGraph:
    """The plan of one captured graph at ``sizes`` (default: those it was captured with).

    What it keeps on the accelerator is added to ``resident``. The ``planner`` of an earlier plan of the graph knows
    already what its schedules need.
    """
    sizes = graph.sizes if sizes is None else sizes
    planner = planner or Planner(
        graph.module, options=machine.planned_options, profile=machine.profile, segments=SegmentCache(_never, {})
    )
    target = Target(
        kind=DRY_RUN, device=torch.device("cpu"), budget_bytes=machine.budget_bytes - machine.reserved_bytes,
        resident=resident, host_memory=machine,
    )  # fmt: skip
    try:
        base = planner.plan_bucket(sizes, target, graph.weights)
    except HostOnlyGraphError as error:
        raise nothing_to_plan(error) from error
    resident.add(require(base.context.residency, "choose_residency"))
    return PlannedGraph(graph, base, planner, machine.options.split)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; what several modules share counts once."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    storages = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return int(sum(storages.values()))


def main_schedule(planned: Sequence[PlannedGraph]) -> Schedule:
    """The schedule of the graph that reads most weights, registered, the others on it."""
    chosen = max(planned, key=lambda one: one.graph.weight_bytes).step.schedule
    chosen.others = tuple(one.step.schedule for one in planned if one.step.schedule is not chosen)
    for one in planned:
        register(one.step.schedule)
    return chosen


def sizes_at(graph: TracedGraph, hint: int, size: int) -> Sizes:
    """The graph's sizes with ``size`` for every symbol that was ``hint`` when it was captured."""
    return {symbol: sympy.Integer(size) if found == hint else found for symbol, found in graph.sizes.items()}


def _never(segment: fx.GraphModule, examples: Any) -> Any:
    raise AssertionError("a dry run compiles nothing")
