"""The comparison's jobs, ratios and tables; its measurements run in ``benchmarks``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.children import Outcome
from benchmarks.compare import __main__ as program
from benchmarks.compare import ways
from benchmarks.compare.job import AHEAD, HETEGEN, HOST_ROWS, IN_TURN, STREAMED, Job, Row
from benchmarks.compare.report import at_limit, best_peer, equal_prefix, ratio, table, tables
from benchmarks.random_models import weight_bytes_of

ROWS = [
    Row("eager GPU", None, 900.0, 90.0, tokens=(1, 2, 9)),
    Row(HETEGEN, 100, 50.0, 10.0, peak_bytes=99, predicted_tokens_per_s=11.0, tokens=(1, 2, 3)),
    Row(STREAMED, 100, 50.0, 5.0, tokens=(1, 2, 3)),
    Row("Accelerate", None, 9.0, 2.0, tokens=(1, 2, 3)),
    Row("Accelerate map", 100, 9.0, 4.0, tokens=(3, 2, 1)),
    Row("CPU, Inductor", 100, predicted_tokens_per_s=5.5, note="cannot be emulated; predicted only"),
    Row("diffusers", None, note="not installed: diffusers"),
    Row(HETEGEN, 200, 60.0, 40.0),
]
JOB = Job(
    way=HETEGEN, shape="opt-tiny", dtype="bfloat16", gpu_memory=None, prompt=4, new_tokens=2, threads=1,
    accelerator="emulated", hardware="a10-xeon", step_s=0.1,
)  # fmt: skip


def test_what_is_compared_at_one_limit() -> None:
    assert [row.way for row in at_limit(ROWS, 100)] == [
        HETEGEN, STREAMED, "eager GPU", "Accelerate", "Accelerate map", "CPU, Inductor", "diffusers",
    ]  # fmt: skip
    assert [row.decode_tokens_per_s for row in at_limit(ROWS, 200) if row.way == HETEGEN] == [40.0]


@pytest.mark.parametrize(
    ("way", "expected"),
    [(HETEGEN, 1.0), (STREAMED, 0.5), ("eager GPU", 9.0), ("CPU, Inductor", 0.5), ("diffusers", None)],
)
def test_ratios_compare_like_with_like(way: str, expected: float | None) -> None:
    """Measured with measured, predicted with predicted, nothing with nothing."""
    (reference,) = (row for row in at_limit(ROWS, 100) if row.way == HETEGEN)
    (row,) = (row for row in at_limit(ROWS, 100) if row.way == way)
    assert ratio(row, reference) == expected
    assert ratio(row, None) is None


def test_the_best_peer_is_neither_ours_nor_the_whole_model_on_the_device() -> None:
    assert best_peer(at_limit(ROWS, 100)) == ("Accelerate map", 2.5)
    assert best_peer([row for row in ROWS if row.way == HETEGEN]) is None
    assert best_peer([row for row in ROWS if row.way != HETEGEN]) is None


def test_the_table_says_what_is_equal_and_why_figures_are_missing() -> None:
    lines = table(at_limit(ROWS, 100)).splitlines()
    found = {line.split("  ")[0]: line for line in lines[2:]}
    assert "first 0 of 3" in found["Accelerate map"]
    assert "first 2 of 3" in found["eager GPU"]
    assert " all" in found["Accelerate"]
    shorter = [replace(row, tokens=row.tokens[:2]) if row.way == "Accelerate" else row for row in at_limit(ROWS, 100)]
    assert "  all of 2" in next(line for line in table(shorter).splitlines() if line.startswith("Accelerate  "))
    assert "not installed: diffusers" in found["diffusers"]
    assert tables(ROWS).count("gpu_memory") == 2
    assert equal_prefix((), (1,)) == 0


def test_each_way_and_limit_is_a_child(tmp_path: Path) -> None:
    arguments = program.parse_arguments(
        ["--accelerator", "cuda", "--gpu-memory", "0.5", "20MiB", "--trace", str(tmp_path / "trace.json")]
    )
    weights = weight_bytes_of("opt-tiny", torch.bfloat16)
    jobs = program.jobs_of(arguments)
    assert [(job.way, job.gpu_memory) for job in jobs] == [
        (HETEGEN, weights // 2), (HETEGEN, 20 << 20), ("Accelerate", None), ("Accelerate map", weights // 2),
        ("Accelerate map", 20 << 20), ("diffusers", None), ("eager GPU", None), ("CPU, Inductor", None),
    ]  # fmt: skip
    assert [job.trace for job in jobs if job.trace] == [str(tmp_path / "trace.json")]
    fewer = program.parse_arguments(["--accelerator", "cuda", "--new-tokens", "9", "--peer-tokens", "3"])
    assert {job.new_tokens for job in program.jobs_of(fewer) if job.way == HETEGEN} == {9}
    assert {job.new_tokens for job in program.jobs_of(fewer) if job.way != HETEGEN} == {3}
    emulated = program.parse_arguments(["--accelerator", "emulated"])
    assert [job.way for job in program.jobs_of(emulated)] == [HETEGEN, HETEGEN]
    assert "emulated" in program.heading(emulated)["hardware"]


@pytest.mark.parametrize(
    ("outcome", "note"),
    [
        (Outcome("failed", 1.0, {"error": "OptionError: no"}, "exit status 1\nlog"), "failed: OptionError: no"),
        (Outcome("timeout", 9.0, {"rows": [ROWS[1].to_json()]}, "killed after 9 s\nlog"), "timeout: killed"),
    ],
)
def test_a_child_that_fails_leaves_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, note: str
) -> None:
    monkeypatch.setattr(program, "run_child", lambda *arguments, **options: outcome)
    *measured, failed = program.run(JOB, 9.0, tmp_path / "job")
    assert measured == ROWS[1:2][: len(outcome.notes.get("rows", []))]
    assert failed.way == HETEGEN
    assert failed.note.startswith(note)
    assert "log" not in failed.note


def test_what_jobs_noted_lies_beside_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a job that is cut off with everything else are not lost."""

    def interrupted(module: str, argument: object, *, limit_s: float, files: Path) -> Outcome:
        files.with_name(files.name + ".json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program.main(["--accelerator", "emulated", "--json", str(tmp_path / "result.json")])
    assert (tmp_path / "result.jobs" / "0.json").exists()


def measured(trips_ahead: int) -> Any:
    return SimpleNamespace(schedule=SimpleNamespace(trips_ahead=trips_ahead))


@pytest.mark.parametrize(("trips", "order"), [(3, [HETEGEN, IN_TURN, STREAMED, HOST_ROWS]),
                                              (0, [HETEGEN, STREAMED, AHEAD, HOST_ROWS])])  # fmt: skip
def test_what_auto_has_not_chosen_is_measured_too(trips: int, order: list[str]) -> None:
    job = replace(JOB, accelerator="cuda")
    asked = dict(ways.own_ways(job, [measured(trips)], time.monotonic()))
    assert list(asked) == order
    assert {name: way.issue_ahead for name, way in asked.items() if name in (AHEAD, IN_TURN)} in (
        {IN_TURN: False}, {AHEAD: True},
    )  # fmt: skip
    decided = dict(ways.own_ways(replace(job, issue_ahead=False), [measured(trips)], time.monotonic()))
    assert list(decided) == [HETEGEN, STREAMED, HOST_ROWS]
    assert list(dict(ways.own_ways(JOB, [measured(trips)], 0.0))) == [HETEGEN, STREAMED, HOST_ROWS]


def test_other_ways_are_begun_as_long_as_there_is_time() -> None:
    job = replace(JOB, accelerator="cuda", others_s=50.0)
    now_s = time.monotonic()
    assert len(dict(ways.own_ways(job, [measured(1)], now_s))) == 4
    assert list(dict(ways.own_ways(job, [measured(1)], now_s - 51.0))) == [HETEGEN]


def test_a_row_with_a_figure_is_what_others_are_compared_with() -> None:
    failed = Row(HETEGEN, 100, note="timeout: killed")
    (line,) = [line for line in table([failed, *at_limit(ROWS, 100)]).splitlines() if line.startswith("Accelerate map")]
    assert " 0.4 " in line


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model: Any, job: Job) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(ways, "_model", lambda job: None)
    (row,) = ways.peer("diffusers", missing)(JOB)
    assert row == Row("diffusers", None, note="not installed: diffusers")
