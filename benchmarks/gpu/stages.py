"""The stages, their limits, and the run of them in children."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from benchmarks.children import Notebook, Outcome, run_child
from benchmarks.gpu.settings import Settings

CHILD = "benchmarks.gpu.child"
PATIENCE = 4.0
"""Limits are those of a machine with a GPU; a rehearsal, on whatever machine, gets so many times more."""

LEAST_S = 15.0
"""Below this a stage is not begun."""

SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "opt-6.7b": ("opt-6.7b", ("hetegen", "Accelerate map")),
    "opt-13b": ("opt-13b", ("hetegen", "Accelerate")),
    "opt-6.7b-peers": ("opt-6.7b", ("Accelerate", "diffusers", "eager GPU", "CPU, Inductor")),
    "opt-30b": ("opt-30b", ("hetegen", "Accelerate")),
}
"""Stages of the comparison: which model, and the ways in it. Those that matter less have a stage of their own.

Of the peers that are there everywhere Accelerate's device map has most to set against hetegen: it fills the limit.
"""

GROUPS: dict[str, Callable[[Stage], bool]] = {
    "correctness": lambda stage: stage.correctness or stage.name in ("environment", "kernel"),
    "speed": lambda stage: stage.name not in ("contact", "kernel") and not stage.correctness,
}
"""Names for several stages. Where a machine is lent by the minute each group is a run of its own, or a slow machine
spends on the first what the second needs: it has done so."""

REHEARSED = "opt-tiny"
"""Takes the place of all of them without a GPU."""


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of the stage, and the file of its notes.
        limit_s: seconds after which it is killed.
        correctness: whether its failure fails the run.
        together: neighbours of the same group run at the same time (never what is timed).
    """

    name: str
    limit_s: float
    correctness: bool = False
    together: str = ""


STAGES = (
    Stage("environment", 60.0, together="start"),
    Stage("contact", 110.0, correctness=True, together="start"),
    Stage("kernel", 150.0),
    Stage("generation", 200.0, correctness=True, together="correctness"),
    Stage("variants", 260.0, correctness=True, together="correctness"),
    Stage("mirrors", 120.0, correctness=True, together="correctness"),
    Stage("racecheck", 200.0, correctness=True, together="correctness"),
    Stage("steady", 120.0, correctness=True, together="correctness"),
    Stage("calibration", 240.0),
    Stage("opt-6.7b", 300.0),
    Stage("opt-6.7b-peers", 200.0),
    Stage("growing-cache", 240.0),
    Stage("reading-ahead", 100.0),
    Stage("floor", 45.0),
    Stage("issuing", 110.0),
    Stage("opt-13b", 200.0),
    Stage("captured", 60.0),
    Stage("overhead", 60.0),
    Stage("opt-30b", 240.0),
)
"""In the order in which they run unless the command line names another: what is lost when time runs out stands last.

On an H200 (16 cores, nothing cached) the group of correctness took 93 to 129 s, in which the host's kernel was built
beside it, and calibration 64 to 111 s. Models of these stages compute with that kernel now, so it is built before.
Limits leave room for a machine that is a third slower, as one of that kind was.
"""


@dataclass(frozen=True)
class Ended:
    """A stage that has ended ("skipped" if it has nothing to do here), or was not begun."""

    stage: Stage
    outcome: Outcome

    @property
    def wrong(self) -> bool:
        """Whether the run fails with it: only a stage of correctness, and also if it did not run."""
        return self.stage.correctness and not self.outcome.ok


Runner = Callable[..., Outcome]


def run_stages(
    stages: Sequence[Stage],
    settings: Settings,
    *,
    runner: Runner = run_child,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Ended]:
    """Run stage after stage, groups at the same time where there is a device; each gets what is left at most."""
    end_s = clock() + settings.minutes * 60

    def run(stage: Stage, beside: int) -> Ended:
        left_s = end_s - clock()
        if left_s < LEAST_S:
            return Ended(stage, Outcome("not begun", 0.0, {}, f"{left_s:.0f} s were left"))
        limit_s = min(stage.limit_s if settings.cuda else stage.limit_s * PATIENCE, left_s)
        argument = {"stage": stage.name, "settings": asdict(replace(settings, seconds=limit_s)), "beside": beside}
        outcome = runner(CHILD, argument, limit_s=limit_s, files=Path(settings.folder) / stage.name)
        return _ended(stage, outcome)

    for together, group in groupby(stages, key=lambda stage: stage.together):
        members = list(group)
        workers = len(members) if together and settings.cuda else 1
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(partial(run, beside=workers), members)


def _ended(stage: Stage, outcome: Outcome) -> Ended:
    skipped = outcome.notes.get("skipped")
    return Ended(stage, replace(outcome, status="skipped", reason=skipped) if outcome.ok and skipped else outcome)


def stage_work(name: str) -> Callable[[Settings, Notebook], None]:
    """What a stage does; imported in its own process only."""
    from benchmarks.gpu import (
        captured,
        contact,
        environment,
        floor,
        generation,
        issuing,
        mirrors,
        racecheck,
        speed,
        steady,
    )

    works: dict[str, Callable[[Settings, Notebook], None]] = {
        "environment": environment.environment, "contact": contact.contact, "kernel": contact.kernel,
        "generation": generation.generation, "variants": generation.variants,
        "mirrors": mirrors.mirrors, "racecheck": racecheck.racecheck, "steady": steady.steady,
        "calibration": speed.calibration, "floor": floor.floor, "issuing": issuing.issuing,
        "captured": captured.captured, "overhead": speed.overhead, "reading-ahead": speed.reading_ahead,
        "growing-cache": speed.growing_cache,
    }  # fmt: skip
    for stage, (shape, ways) in SHAPES.items():
        works[stage] = partial(speed.compare_shape, shape, ways=ways)
    works[REHEARSED] = partial(speed.compare_shape, REHEARSED, ways=("hetegen",))
    return works[name]


def stages_for(settings: Settings, names: Sequence[str]) -> list[Stage]:
    """Those that were asked for, by name or group, in that order, or all.

    Emulated, a tiny model takes the place of the large ones.
    """
    stages = list(STAGES)
    if not settings.cuda:
        first, *others = SHAPES
        rehearsed = Stage(REHEARSED, 200.0)
        stages = [rehearsed if stage.name == first else stage for stage in stages if stage.name not in others]
    if not names:
        return stages
    asked = [one for name in names for one in stages if one.name == name or (name in GROUPS and GROUPS[name](one))]
    return list(dict.fromkeys(asked))
