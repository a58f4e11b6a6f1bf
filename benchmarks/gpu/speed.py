"""Stages that measure: ``calibration``, ``overhead`` and the comparison of models of known shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import overhead as overhead_benchmark
from benchmarks.children import Notebook, write_json
from benchmarks.compare import __main__ as compare
from benchmarks.compare.job import HETEGEN, Row
from benchmarks.compare.report import at_limit, best_peer, tables
from benchmarks.gpu.settings import Settings, SkipError
from benchmarks.random_models import DTYPES, weight_bytes_of
from hetegen_compile.calibration import Effort, cache_path, calibrate, this_machine, write_profile
from hetegen_compile.calibration.machine import memory_limit_bytes
from hetegen_compile.calibration.report import profile_table
from hetegen_compile.cost_model import profile_to_json

REHEARSED = Effort(
    tokens=(1, 4), weight_bytes=(1 << 17, 1 << 20), arithmetic_bytes=1 << 20, kernel_tokens=(1,), rotate_bytes=8 << 20,
    square=256, linear_budget_s=0.002, budget_s=0.01, repeats=1,
)  # fmt: skip
"""Enough to see that a calibration runs; its figures are not used."""

LIMITS = ("0.3", "0.6")
"""Shares of the weights: two memory limits."""

PROMPT, NEW_TOKENS = 64, 12
CHILD_LIMIT_S = 150


def calibration(settings: Settings, notebook: Notebook) -> None:
    """Measure this machine; the profile is kept for the other stages and, on CUDA, in the user's cache."""
    profile = calibrate(
        accelerator=settings.accelerator, progress=False, effort=None if settings.cuda else REHEARSED
    )
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
    overhead_benchmark.main(
        ["--stages", "issue,resident", "--steps", steps, "--layers", layers, "--json", str(path)]
    )
    notebook.note("overhead", json.loads(path.read_text()))


def compare_shape(shape: str, settings: Settings, notebook: Notebook, *, ways: Sequence[str]) -> None:
    """The comparison of one shape at two memory limits; rows are noted as they come, a trace lies beside them.

    Ways without hetegen are compared with hetegen's rows of the stage that is named as the shape.
    """
    require_memory(shape, settings)
    arguments = compare.parse_arguments(
        [
            "--model", shape, "--dtype", settings.dtype, "--accelerator", settings.accelerator,
            "--hardware", settings.measured_hardware, "--gpu-memory", *LIMITS, "--prompt", str(PROMPT),
            "--new-tokens", str(NEW_TOKENS if settings.cuda else 4), "--step-s", "0.3",
            "--trace", str(settings.path / f"trace-{shape}.json"), "--limit", str(CHILD_LIMIT_S), "--ways", *ways,
        ]
    )  # fmt: skip
    notebook.note("what", compare.heading(arguments))
    rows = [] if HETEGEN in ways else earlier_rows(shape, settings)
    for job in compare.jobs_of(arguments):
        print(job.name, flush=True)
        rows += compare.run(job, arguments.limit, settings.path / f"compare-{shape}-{_slug(job.name)}")
        notebook.note("rows", [asdict(row) for row in rows])
        notebook.note("table", tables(rows).splitlines())
        notebook.note("summary", [summary(rows, limit) for limit in arguments.gpu_memory])
    if not any(row.way == HETEGEN and row.decode_tokens_per_s for row in rows):
        raise RuntimeError("hetegen has no figure; its rows say why")


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
        "best_peer": peer and {"way": peer[0], "hetegen_over_it": peer[1]},
    }


def require_memory(shape: str, settings: Settings) -> None:
    """SkipError if the control group leaves no room for the weights, their pinning and what others need beside them.

    The size of main memory is not asked: on some virtual machines it grows with use. A child that goes too far is the
    first that the system ends.
    """
    needed, limit = weight_bytes_of(shape, DTYPES[settings.dtype]) * 3 // 2, memory_limit_bytes()
    if limit is not None and needed > limit:
        raise SkipError(f"{shape} needs about {needed >> 30} GiB of host memory, the limit is {limit >> 30}")
