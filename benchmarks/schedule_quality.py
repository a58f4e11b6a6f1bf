"""The simulated step over its floor: how good the scheduler is, model by model and machine by machine.

    python -m benchmarks.schedule_quality [--model NAME ...] [--hardware NAME ...] [--json OUT]
    python -m benchmarks.schedule_quality --model path/to/config.json --hardware my_profile.json --dtype bfloat16

A model is a shape known here, the path of a config.json or of its folder; hardware is a preset or the path of a
profile (``hetegen calibrate --json`` prints one; ``cost_model/presets`` has others to start from).

Each setting is planned from shapes alone (weights on meta), with a budget that holds the stated share of the weights
beside the staging ring and what else a step needs. Decode has a cache of 512 tokens. The floor is the largest of the
bounds of ``hetegen_compile.planning.floor``: offloaded bytes over link and host, the accelerator's own work, the
critical path, the host's thread; ``S/(V+V)`` is the first with the same share of every Linear on the host. Nothing is
measured and nothing is random, so the figures are the same on every machine.

Models are cut to ``--layers`` equal layers, which are planned as part of the whole: the staging ring is the one that
the whole model would have, and weights go through pinned memory where the whole model does not fit the host's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.arguments import output_file, whole_number
from benchmarks.model_shapes import MIXTURES, SHAPES, Depth, Shape, shape_of
from hetegen_compile.cost_model import HardwareProfile, load_profile, preset_names
from hetegen_compile.dry_run.models import DTYPES
from hetegen_compile.dry_run.planning import Machine
from hetegen_compile.errors import HetegenError
from hetegen_compile.options import Options
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.choose_residency import staging_ring_bytes
from hetegen_compile.passes.claims import NothingResident
from hetegen_compile.passes.context import SegmentCache, require
from hetegen_compile.passes.plans import RESIDENT, RING, Residency
from hetegen_compile.passes.unsplit_weights import unsplit_on_host
from hetegen_compile.pipeline import UNTIL_VERIFIED
from hetegen_compile.planning.floor import Floor, floor, offloaded_together_s
from hetegen_compile.planning.planned import DRY_RUN, BucketPlan, ScheduledStep, Split, Target
from hetegen_compile.planning.planner import Planner

SHARES = (0.10, 0.25, 0.50, 0.75)
CASES = {"decode-1": 1, "decode-4": 4, "decode-16": 16, "prefill-512": 0}
"""Sequences of a decode step; 0: a prompt."""

LIMITS = {"decode-1": (1.05, 1.15)}
"""Mean and worst ratio that are no failure."""

_CONTEXT = 512
_ROOM_BYTES = 1 << 36


@dataclass(frozen=True)
class Result:
    """One plan."""

    model: str
    layers: int
    full_layers: int
    hardware: str
    case: str
    asked_share: float
    resident_share: float
    ring_bytes: int
    step_s: float
    bytes_s: float
    accelerator_s: float
    path_s: float
    thread_s: float
    together_s: float
    streamed_bytes: int
    host_bytes: int

    @property
    def name(self) -> str:
        """The setting, for people."""
        return f"{self.model} {self.hardware} {self.case} {self.asked_share:.0%}"

    @property
    def floor(self) -> Floor:
        """The bounds that the step is held against."""
        return Floor(self.bytes_s, self.accelerator_s, self.path_s, self.thread_s)

    @property
    def ratio(self) -> float:
        """The step over its floor; 1 is perfect."""
        return self.step_s / self.floor.seconds


class Work:
    """One forward of one shape, captured once, to be planned for any machine and share."""

    def __init__(self, shape: Shape, case: str) -> None:
        self.shape, self.case = shape, case
        batch = CASES[case]
        self.graph, self.sizes = shape.decode(batch, _CONTEXT) if batch else shape.prefill(_CONTEXT)
        self.full_bytes, self.full_weights = shape.full_bytes(), shape.full_weights()

    def result(self, profile: HardwareProfile, share: float) -> Result:
        """The plan with this share of the weights resident, held against its floor."""
        base, step = self.plan(profile, share)
        found, residency = step.schedule, _residency(base)
        bounds = floor(base.module, step.context)
        total = found.resident_bytes + found.streamed_bytes + found.host_bytes
        return Result(
            model=self.shape.name, layers=self.shape.layers, full_layers=self.shape.full_layers,
            hardware=profile.name, case=self.case, asked_share=share,
            resident_share=found.resident_bytes / total, ring_bytes=residency.ring_bytes,
            step_s=found.predicted_step_s, bytes_s=bounds.bytes_s, accelerator_s=bounds.accelerator_s,
            path_s=bounds.path_s, thread_s=bounds.thread_s, together_s=offloaded_together_s(base.module, step.context),
            streamed_bytes=found.streamed_bytes, host_bytes=found.host_bytes,
        )  # fmt: skip

    def plan(self, profile: HardwareProfile, share: float) -> tuple[BucketPlan, ScheduledStep]:
        """The plan with this share of the weights resident, before and after it is scheduled."""
        base = self.base(profile, share)
        return base, self._planner(profile, "auto").plan_split(base, "auto", UNTIL_VERIFIED)

    def base(self, profile: HardwareProfile, share: float) -> BucketPlan:
        """What does not depend on the split. Planned twice: the first tells what a step needs beside weights."""
        ring = staging_ring_bytes(self.full_weights, int(share * self.full_bytes))
        first = self.within(profile, ring + _ROOM_BYTES, ring, split=0.5)  # never whole on the accelerator
        weights = sum(site.weight_bytes for site in first.sites.values()) + _unsplit_bytes(first)
        beside = sum(nbytes for item, nbytes in _residency(first).budget.items() if item not in (RESIDENT, RING))
        return self.within(profile, int(share * weights) + ring + beside, ring, split="auto")

    def _planner(self, profile: HardwareProfile, split: Split) -> Planner:
        options = Options(split=split)
        return Planner(self.graph.module, options=options, profile=profile, segments=SegmentCache(_never, {}))

    def within(self, profile: HardwareProfile, budget: int, ring: int = 0, split: Split = "auto") -> BucketPlan:
        """What does not depend on the split, within a budget in bytes; other graphs have made a ring of ``ring``."""
        machine = Machine(Options(), profile, self.full_bytes)
        target = Target(DRY_RUN, torch.device("cpu"), budget, NothingResident(ring), host_memory=machine)
        return self._planner(profile, split).plan_bucket(self.sizes, target, self.graph.weights)


def results(
    shapes: Sequence[Shape], profiles: Sequence[HardwareProfile], cases: Sequence[str], shares: Sequence[float]
) -> Iterator[Result]:
    """Every combination, in order; each forward is captured once."""
    for shape in shapes:
        for case in cases:
            work = Work(shape, case)
            for profile in profiles:
                for share in shares:
                    yield work.result(profile, share)


def _unsplit_bytes(base: BucketPlan) -> int:
    """Bytes of weights that cannot be split, a mixture's experts, wherever they are."""
    on_host = unsplit_on_host(base.module, base.context)
    return _residency(base).unsplit_bytes + sum(value_bytes(weight, base.context) for weight in on_host)


def _residency(base: BucketPlan) -> Residency:
    return require(base.context.residency, "choose_residency")


def _never(*_: Any) -> Any:
    raise AssertionError("a plan compiles nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan every setting, print; 1 if decode at batch 1 is beyond the limits, 2 if something given is wrong."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    try:
        found = _planned(arguments)
    except HetegenError as error:
        print(f"schedule_quality: {error}", file=sys.stderr)
        return 2
    print(f"{_table(found)}\n\n{_summary(found)}\n\n{_depths(found)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([_as_json(one) for one in found], indent=1) + "\n")
    return int(any(not _within(_of(found, case)) for case in arguments.cases if case in LIMITS))


def _planned(arguments: argparse.Namespace) -> list[Result]:
    """All settings, each told as it is planned. What is given is read before the first is."""
    shapes = [shape_of(source, arguments.layers, arguments.dtype) for source in arguments.models]
    profiles = [load_profile(name) for name in arguments.hardware]
    found = []
    for one in results(shapes, profiles, arguments.cases, arguments.shares):
        found.append(one)
        print(f"{one.name}: {one.ratio:.3f}", file=sys.stderr, flush=True)
    return found


def _within(found: Sequence[Result]) -> bool:
    """Whether the settings of a case with limits keep them."""
    mean, worst = LIMITS[found[0].case]
    ratios = [one.ratio for one in found]
    return statistics.fmean(ratios) <= mean and max(ratios) <= worst


def _of(found: Sequence[Result], case: str) -> list[Result]:
    return [one for one in found if one.case == case]


def _table(found: Sequence[Result]) -> str:
    """Mean and worst ratio over the shares, by model, case and machine."""
    hardware = list(dict.fromkeys(one.hardware for one in found))
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in found:
        cells.setdefault((one.model, one.case), {}).setdefault(one.hardware, []).append(one.ratio)
    rows = [
        [*key, *(f"{statistics.fmean(by[name]):.3f} {max(by[name]):.3f}" for name in hardware)]
        for key, by in cells.items()
    ]
    return str(tabulate(rows, headers=["mean worst", "case", *hardware], disable_numparse=True))


def _summary(found: Sequence[Result]) -> str:
    """By case: mean and worst of step over floor, and how the floor compares with the simple bound."""
    rows = []
    for case in dict.fromkeys(one.case for one in found):
        own = _of(found, case)
        worst = max(own, key=lambda one: one.ratio)
        bounds = Counter(one.floor.bound for one in own)
        rows.append([
            case, len(own), f"{statistics.fmean(one.ratio for one in own):.3f}", f"{worst.ratio:.3f}", worst.name,
            ", ".join(f"{name} {count}" for name, count in bounds.most_common()),
            f"{statistics.fmean(one.step_s / one.together_s for one in own if one.together_s):.3f}",
            f"{statistics.fmean(one.bytes_s / one.floor.seconds for one in own):.3f}",
        ])  # fmt: skip
    headers = ["case", "settings", "mean", "worst", "at", "floor is", "step over S/(V+V)", "bytes bound over floor"]
    return str(tabulate(rows, headers=headers, disable_numparse=True))


def _depths(found: Sequence[Result]) -> str:
    depths = {one.model: f"{one.model} {one.layers} of {one.full_layers}" for one in found}
    return f"step over floor, simulated; layers planned: {', '.join(depths.values())}"


def _as_json(one: Result) -> dict[str, object]:
    return {**asdict(one), "floor_s": one.floor.seconds, "bound": one.floor.bound, "ratio": one.ratio}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedule_quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    shapes, presets, given = list(SHAPES), list(preset_names()), "NAME|PATH"
    models = f"config.json files, their folders, or shapes known here: {', '.join(shapes)} (default), "
    models += f"and mixtures of experts: {', '.join(MIXTURES)}"
    parser.add_argument("--models", "--model", default=shapes, help=models, nargs="+", metavar=given)
    hardware = f"profile files, or presets (default): {', '.join(presets)}"
    parser.add_argument("--hardware", default=presets, help=hardware, nargs="+", metavar=given)
    dtype = "of the weights (default: what the config states, else float16)"
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    shares = f"of the weights resident (default: {' '.join(map(str, SHARES))})"
    parser.add_argument("--shares", nargs="+", type=_share, default=list(SHARES), help=shares)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="forwards to plan (default: all)"
    )
    layers = "layers of each model to plan, or full (default: %(default)s)"
    parser.add_argument("--layers", type=_depth, default=8, help=layers)
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    return parser.parse_args(argv)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share < 1.0:
        raise argparse.ArgumentTypeError(f"'{text}': valid are shares from 0 up to but not including 1, such as 0.5")
    return share


def _depth(text: str) -> Depth:
    if text == "full":
        return "full"
    try:
        return whole_number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or full") from error


if __name__ == "__main__":
    sys.exit(main())
