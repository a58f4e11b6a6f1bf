"""``hetegen_compile.plan``: the schedule of one forward, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.dry_run.fakes import Fakes
from hetegen_compile.dry_run.trace import TracedGraph, trace
from hetegen_compile.graph_inputs import number, token_count
from hetegen_compile.hardware import profile_for
from hetegen_compile.options import Options, parse_options
from hetegen_compile.passes.context import Residency, SegmentCache, require
from hetegen_compile.pipeline import ONCE_PER_SPLIT
from hetegen_compile.planner import Planner, Sizes, Target, bucket_of, budget_bytes
from hetegen_compile.schedule import Schedule, register

KIND = "dry run"
_FOR_RUNNING = ("retarget_devices", "lower")
STAGES = tuple(stage for stage in ONCE_PER_SPLIT if stage.run.__name__ not in _FOR_RUNNING)
"""The stages after the split that a report needs: nothing is compiled."""


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
    profile = profile_for(parsed)
    fakes = Fakes()
    inner = getattr(model, "_orig_mod", model)
    graphs = trace(fakes.copy(inner), fakes, fakes.copy(args), fakes.copy(kwargs)).graphs
    resident = PlannedWeights()
    planned = [(plan_graph(graph, parsed, profile, resident), graph.weight_bytes) for graph in graphs]
    schedules = [schedule for schedule, _ in planned]
    chosen = max(planned, key=lambda pair: pair[1])[0]
    chosen.others = tuple(schedule for schedule in schedules if schedule is not chosen)
    for schedule in schedules:
        register(schedule)
    if (options or {}).get("print_schedule"):
        print(chosen.table(unfold=parsed.unfold), flush=True)
    return chosen


@dataclass
class PlannedWeights:
    """The weights that earlier plans of the same model keep on the accelerator, and their bytes."""

    bytes_of: dict[int, int] = field(default_factory=dict)

    def add(self, graph: TracedGraph, residency: Residency) -> None:
        """Note what a plan of ``graph`` keeps on the accelerator; one that evicts begins anew."""
        if residency.evicts:
            self.bytes_of.clear()
        for name, first in residency.weights.items():
            weight = graph.weights[name]
            rows = int(weight.shape[0])
            self.bytes_of[id(weight)] = int(weight.numel()) * weight.element_size() * (rows - first) // rows

    def is_resident(self, weight: Tensor) -> bool:
        """Whether an earlier plan holds this weight."""
        return id(weight) in self.bytes_of

    def held_bytes(self) -> int:
        """Bytes of all weights that earlier plans hold."""
        return sum(self.bytes_of.values())


def plan_graph(graph: TracedGraph, options: Options, profile: HardwareProfile, resident: PlannedWeights) -> Schedule:
    """The schedule of one captured graph; what it keeps resident is added to ``resident``."""
    planner = Planner(graph.module, options=options, profile=profile, segments=SegmentCache(_never, {}))
    bucket = bucket_of(number(token_count(graph.module), graph.sizes))
    available = profile.accelerator.memory_bytes
    target = Target(
        kind=KIND, device=torch.device("cpu"), resident=resident,
        budget_bytes=budget_bytes(options.gpu_memory, available, profile.accelerator.name),
    )
    base = planner.plan_bucket(bucket, graph.sizes, target, graph.weights)
    resident.add(graph, require(base.context.residency, "choose_residency"))
    return planner.plan_split(base, options.split, STAGES).schedule


def _never(segment: fx.GraphModule, examples: Any) -> Any:
    raise AssertionError("a dry run compiles nothing")


__all__ = ["Sizes", "plan"]
