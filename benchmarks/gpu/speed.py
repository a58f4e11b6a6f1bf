"""Stages that measure: ``calibration``, ``overhead`` and the comparison of models of known shapes."""

from __future__ import annotations

import json
import logging
import re
import statistics
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from benchmarks import overhead as overhead_benchmark
from benchmarks.children import Notebook, write_json
from benchmarks.compare import __main__ as compare
from benchmarks.compare.job import HETEGEN, Job, Row
from benchmarks.compare.report import OWN, at_limit, best_peer, tables
from benchmarks.gpu.settings import Settings, SkipError, device_of, require
from benchmarks.random_models import DTYPES, weight_bytes_of
from hetegen_compile.calibration import Effort, cache_path, calibrate, this_machine, write_profile
from hetegen_compile.calibration.report import profile_table
from hetegen_compile.cost_model import load_profile, profile_to_json
from hetegen_compile.system import memory_limit_bytes

REHEARSED = Effort(
    tokens=(1, 4), weight_bytes=(1 << 17, 1 << 20), arithmetic_bytes=1 << 20, kernel_tokens=(1,), rotate_bytes=8 << 20,
    square=256, linear_budget_s=0.002, budget_s=0.01, repeats=1,
)  # fmt: skip
"""Enough to see that a calibration runs; its figures are not used."""

LIMITS = ("0.3", "0.6")
"""Shares of the weights: two memory limits."""

SUITE = Effort(kernel_tokens=())
"""All that a profile holds; kernels that need copies of the weights are left to ``benchmarks.host_linear``."""

PROMPT, NEW_TOKENS, PEER_TOKENS = 64, 40, 12
"""hetegen records its launches in the first steps of each generation: a median of eleven was of those."""

GROWN_FROM = 120
"""Tokens of the prompt of a cache that grows past 128, where the allocator's blocks become larger ones."""

CHILD_LIMIT_S = 120.0

_END_S, _LEAST_S = 5.0, 15.0
"""Of a stage: kept to write down what its last child noted; less is not worth beginning one."""

_NOT_BEGUN = "not begun"

OTHERS_S = 80.0
"""Of a child's life, after which it begins none of hetegen's other ways (its first row came after about 65 s)."""

OTHER_AHEAD_BYTES = 16 << 20
"""Read ahead where calibration found that nothing is worth it."""

PEER_S = 85.0
"""Left to a peer at both limits, where there is so much."""


def calibration(settings: Settings, notebook: Notebook) -> None:
    """Measure this machine; the profile is kept for the other stages and, on CUDA, in the user's cache.

    The log says when each figure was begun.
    """
    logging.basicConfig(format="%(relativeCreated)d ms: %(message)s")
    logging.getLogger("hetegen_compile").setLevel(logging.DEBUG)
    profile = calibrate(accelerator=settings.accelerator, progress=False, effort=SUITE if settings.cuda else REHEARSED)
    write_json(settings.profile_path, profile_to_json(profile))
    notebook.note("profile", json.loads(settings.profile_path.read_text()))
    if settings.cuda:
        write_profile(cache_path(this_machine(cuda=True)), profile)
    print(profile_table(profile))


def overhead(settings: Settings, notebook: Notebook) -> None:
    """What a step costs beside its work, on an accelerator whose operations return at once."""
    path = settings.path / "overhead-figures.json"
    steps = "300" if settings.cuda else "20"
    layers = "24" if settings.cuda else "4"
    stages = "issue,between,resident"
    overhead_benchmark.main(["--stages", stages, "--steps", steps, "--layers", layers, "--json", str(path)])
    notebook.note("overhead", json.loads(path.read_text()))


def compare_shape(shape: str, settings: Settings, notebook: Notebook, *, ways: Sequence[str]) -> None:
    """The comparison of one shape at two memory limits; rows are noted as they come, a trace lies beside them.

    Ways without hetegen are compared with hetegen's rows of the stage that is named as the shape.
    """
    require_memory(shape, settings)
    trace = settings.path / f"trace-{shape}.json"
    arguments = _arguments(shape, settings, settings.measured_hardware, LIMITS, "--trace", str(trace), "--ways", *ways)
    notebook.note("what", compare.heading(arguments))
    if settings.cuda and settings.measured_hardware == settings.hardware:
        notebook.note("hardware", f"floors and plans are of {settings.hardware}, this run has calibrated nothing")
    rows = [] if HETEGEN in ways else earlier_rows(shape, settings)
    earlier = len(rows)
    compared = _Compared(shape, settings)
    for job in compare.jobs_of(arguments):
        print(job.name, flush=True)
        rows += compared.run(job)
        notebook.note("rows", [asdict(row) for row in rows])
        notebook.note("table", tables(rows).splitlines())
        notebook.note("summary", [summary(rows, limit) for limit in arguments.gpu_memory])
    if HETEGEN not in ways:
        require(any(row.decode_tokens_per_s for row in rows[earlier:]), "no peer has a figure; their rows say why")
        return
    own = [row for row in rows if row.way == HETEGEN]
    if own and all(row.note.startswith(_NOT_BEGUN) for row in own):
        raise SkipError("; ".join(dict.fromkeys(row.note for row in own)))
    if not any(row.decode_tokens_per_s for row in own):
        raise RuntimeError("hetegen has no figure; its rows say why")


def reading_ahead(settings: Settings, notebook: Notebook) -> None:
    """hetegen once more at the smaller limit: without reading weights ahead if calibration chose to, else with it.

    Whether asking the driver for an event meanwhile holds up launches shows in its steps beside the calibrated ones.
    """
    shape = _again(settings)
    profile = load_profile(str(settings.profile_path))
    other_bytes = 0 if profile.host.ahead_bytes else OTHER_AHEAD_BYTES
    other = settings.path / "profile-ahead.json"
    write_json(other, profile_to_json(replace(profile, host=replace(profile.host, ahead_bytes=other_bytes))))
    notebook.note("ahead_bytes", {"calibrated": profile.host.ahead_bytes, "here": other_bytes})
    arguments = _arguments(shape, settings, str(other), LIMITS[:1], "--ways", HETEGEN)
    _beside_earlier(shape, "ahead", arguments, settings, notebook)


def growing_cache(settings: Settings, notebook: Notebook) -> None:
    """hetegen once more at both limits, with the cache that ``generate`` makes by itself: it grows by a token a step.

    Attention to it has new sizes in each step: its launches are not recorded, and none is issued behind a closed gate.
    The peak is what torch's allocator has reserved.
    """
    shape = _again(settings)
    more = ("--ways", HETEGEN, "--cache", "dynamic", "--prompt", str(GROWN_FROM))
    arguments = _arguments(shape, settings, settings.measured_hardware, LIMITS, *more)
    _beside_earlier(shape, "growing", arguments, settings, notebook)


def _again(settings: Settings) -> str:
    """The shape that is measured once more; SkipError where it cannot be."""
    device_of(settings)
    if not settings.profile_path.exists():
        raise SkipError("this run has calibrated nothing")
    shape = "opt-6.7b"
    require_memory(shape, settings)
    return shape


def _beside_earlier(shape: str, name: str, arguments: Namespace, settings: Settings, notebook: Notebook) -> None:
    """hetegen's rows at the limits of ``arguments``, and beside each what the shape's own stage has found there."""
    notebook.note("what", compare.heading(arguments))
    compared, rows, beside = _Compared(f"{shape}-{name}", settings, others=False), list[Row](), list[dict[str, Any]]()
    for job in compare.jobs_of(arguments):
        rows += compared.run(job)
        limit = job.gpu_memory or 0
        beside.append({"here": summary(rows, limit), "earlier": summary(earlier_rows(shape, settings), limit)})
        notebook.note("rows", [asdict(row) for row in rows])
        notebook.note("table", tables(rows).splitlines())
        notebook.note("summary", beside)
    require(any(row.decode_tokens_per_s for row in rows), "hetegen has no figure; its rows say why")


def _arguments(shape: str, settings: Settings, hardware: str, limits: Sequence[str], *more: str) -> Namespace:
    return compare.parse_arguments(
        [
            "--model", shape, "--dtype", settings.dtype, "--accelerator", settings.accelerator,
            "--hardware", hardware, "--gpu-memory", *limits, "--prompt", str(PROMPT),
            "--new-tokens", str(NEW_TOKENS if settings.cuda else 4), "--peer-tokens", str(PEER_TOKENS),
            "--step-s", "0.3", *more,
        ]
    )  # fmt: skip


class _Compared:
    """The children of one stage, none of which outlives it: what a child had noted is lost with its parent."""

    def __init__(self, name: str, settings: Settings, *, others: bool = True) -> None:
        self._name, self._settings, self._others = name, settings, others
        self._end_s = time.monotonic() + settings.seconds - _END_S
        self._issue_ahead: bool | Literal["auto"] = "auto"

    def run(self, job: Job) -> list[Row]:
        """The job's rows. Where hetegen has no figure it is run again, it and those after it in turn."""
        found = self._child(job)
        if job.way != HETEGEN or not self._settings.cuda or any(row.decode_tokens_per_s for row in found):
            return found
        self._issue_ahead = False  # whatever it was, the other limits shall not be lost to it as well
        return found + self._child(job)

    def _child(self, job: Job) -> list[Row]:
        left_s = self._end_s - time.monotonic()
        if left_s < _LEAST_S:
            return [Row(job.way, job.gpu_memory, note=f"{_NOT_BEGUN}: {left_s:.0f} s were left")]
        others_s = min(OTHERS_S, left_s - PEER_S) if self._settings.cuda else None
        job = replace(job, issue_ahead=self._issue_ahead, others_s=others_s if self._others else 0.0)
        name = job.name if self._issue_ahead else f"{job.name} in turn"
        files = self._settings.path / f"compare-{self._name}-{_slug(name)}"
        return compare.run(job, min(CHILD_LIMIT_S, left_s), files)


def _slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def earlier_rows(shape: str, settings: Settings) -> list[Row]:
    """The rows that the stage of this shape has noted in this run, if it ran."""
    notes = settings.path / f"{shape}.json"
    rows = json.loads(notes.read_text()).get("rows", []) if notes.exists() else []
    return [Row(**row) for row in rows]


def summary(rows: list[Row], limit: int) -> dict[str, Any]:
    """At one memory limit: decode over the floor, the prediction's error, and over the best peer."""
    found = at_limit(rows, limit)
    own = next((row for row in found if row.way == HETEGEN and row.decode_tokens_per_s), None)
    if own is None or not own.decode_tokens_per_s:
        return {"gpu_memory": limit}
    measured, peer = own.decode_tokens_per_s, best_peer(found)
    return {
        "gpu_memory": limit,
        "decode_tokens_per_s": measured,
        "of_the_floor": measured / own.floor_tokens_per_s if own.floor_tokens_per_s else None,
        "predicted_over_measured": own.predicted_tokens_per_s / measured if own.predicted_tokens_per_s else None,
        "steps": median_step(own.steps),
        "own_ways": {row.way: of_the_floor(row) for row in found if row.way in OWN and row.decode_tokens_per_s},
        "best_peer": peer and {"way": peer[0], "hetegen_over_it": peer[1]},
    }


def median_step(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure of the recorded steps the median."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]} if steps else {}


def of_the_floor(row: Row) -> dict[str, Any]:
    """How fast one of hetegen's ways decodes, and the share of the floor that its own plan has."""
    measured, floor = row.decode_tokens_per_s, row.floor_tokens_per_s
    share = measured / floor if measured and floor else None
    return {"decode_tokens_per_s": measured, "of_the_floor": share, "note": row.note}


def require_memory(shape: str, settings: Settings) -> None:
    """SkipError if the control group leaves no room for the weights, their pinning and what others need beside them.

    The size of main memory is not asked: on some virtual machines it grows with use. A child that goes too far is the
    first that the system ends.
    """
    needed, limit = weight_bytes_of(shape, DTYPES[settings.dtype]) * 3 // 2, memory_limit_bytes()
    if limit is not None and needed > limit:
        raise SkipError(f"{shape} needs about {needed >> 30} GiB of host memory, the limit is {limit >> 30}")
