"""The stages of ``benchmarks.gpu``: what is lost when one fails, hangs or finds no time, and what the run says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from benchmarks.children import Notebook, Outcome
from benchmarks.compare import __main__ as comparison
from benchmarks.compare.job import HETEGEN, IN_TURN, Job, Row
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import child, issuing, speed, stages
from benchmarks.gpu.floor import thread_counts
from benchmarks.gpu.models import budgets_kept
from benchmarks.gpu.settings import Checks, ChecksFailedError, Settings, SkipError, require
from benchmarks.gpu.stages import STAGES, Stage, run_stages, stages_for
from hetegen_compile.calibration.gating import BothWays
from hetegen_compile.host_kernels import KERNELS

SETTINGS = Settings("cuda", "/nowhere", "h100-server", minutes=1.0, dtype="bfloat16")
PLAN = (
    Stage("first", 10.0),
    Stage("one", 30.0, correctness=True, together="group"),
    Stage("other", 30.0, correctness=True, together="group"),
    Stage("last", 30.0),
)


class Runner:
    """Plays children: ends each as it is told, and advances the clock by what it took."""

    def __init__(self, outcomes: Mapping[str, Outcome]) -> None:
        self.outcomes = outcomes
        self.now_s = 100.0
        self.limits: dict[str, float] = {}
        self.beside: dict[str, int] = {}

    def __call__(self, module: str, argument: Mapping[str, Any], *, limit_s: float, files: Path) -> Outcome:
        assert module == stages.CHILD
        assert Settings(**argument["settings"]).minutes == SETTINGS.minutes
        assert files == Path("/nowhere") / argument["stage"]
        outcome = self.outcomes.get(argument["stage"], Outcome("ok", 1.0, {"noted": 1}))
        self.limits[argument["stage"]] = limit_s
        self.beside[argument["stage"]] = argument["beside"]
        self.now_s += outcome.seconds
        return outcome

    def clock(self) -> float:
        """Seconds."""
        return self.now_s


def run(outcomes: Mapping[str, Outcome], settings: Settings = SETTINGS) -> tuple[dict[str, str], Runner, list[bool]]:
    runner = Runner(outcomes)
    ended = list(run_stages(PLAN, settings, runner=runner, clock=runner.clock))
    return {one.stage.name: one.outcome.status for one in ended}, runner, [one.wrong for one in ended]


def test_a_stage_that_fails_costs_itself_only() -> None:
    statuses, runner, wrong = run(
        {"first": Outcome("timeout", 10.0, {}, "killed"), "other": Outcome("failed", 2.0, {"checks": []}, "exit 1")}
    )
    assert statuses == {"first": "timeout", "one": "ok", "other": "failed", "last": "ok"}
    assert wrong == [False, False, True, False], "only stages of correctness fail the run"
    assert runner.limits["first"] == 10.0


def test_a_stage_gets_what_is_left_and_none_begins_without_time() -> None:
    settings = replace(SETTINGS, accelerator="emulated")  # one after the other
    statuses, runner, wrong = run({"first": Outcome("ok", 35.0, {}), "one": Outcome("ok", 15.0, {})}, settings)
    assert runner.limits["one"] == pytest.approx(25.0)
    assert statuses["other"] == statuses["last"] == "not begun"
    assert wrong == [False, False, True, False], "correctness that did not run is not correct"


def test_a_group_runs_at_the_same_time_where_there_is_a_device() -> None:
    both = threading.Barrier(2, timeout=10)

    def runner(module: str, argument: Mapping[str, Any], **options: Any) -> Outcome:
        if argument["stage"] in ("one", "other"):
            both.wait()  # breaks unless both are under way
        return Outcome("ok", 1.0, {})

    assert all(one.outcome.ok for one in run_stages(PLAN, SETTINGS, runner=runner))


def test_what_computes_with_the_hosts_kernel_runs_behind_its_being_built() -> None:
    """Each of them would wait for it, within its own limit."""
    groups = [list(group) for _, group in groupby(STAGES, key=lambda stage: stage.together)]
    (built,) = (place for place, group in enumerate(groups) if any(stage.name == "kernel" for stage in group))
    assert all(not stage.correctness or stage.name == "contact" for group in groups[: built + 1] for stage in group)


def test_skipped_is_neither_failed_nor_ok() -> None:
    statuses, _, _ = run({"last": Outcome("ok", 1.0, {"skipped": "needs a CUDA device"})})
    assert statuses["last"] == "skipped"


def test_every_stage_has_its_work_and_time_for_all_fits_in_order() -> None:
    for stage in stages.STAGES:
        assert callable(stages.stage_work(stage.name))
    emulated = stages_for(replace(SETTINGS, accelerator="emulated"), [])
    assert callable(stages.stage_work("opt-tiny"))
    assert [one.name for one in emulated if one.name.startswith("opt")] == ["opt-tiny"]
    assert [one.name for one in stages_for(SETTINGS, ["floor", "contact"])] == ["floor", "contact"]
    named = [one.name for one in stages_for(SETTINGS, ["kernel", "floor", "correctness", "floor"])]
    assert named[:4] == ["kernel", "floor", "environment", "contact"], "in the order in which they are asked for"
    assert len(named) == len(set(named))
    both = [{one.name for one in stages_for(SETTINGS, [group])} for group in stages.GROUPS]
    assert {"kernel", "racecheck"} <= both[0]
    assert {"calibration", "opt-6.7b", "floor"} <= both[1]
    assert both[0] | both[1] == {one.name for one in stages.STAGES}
    assert both[0] & both[1] == {"environment"}, "each says what it ran on"
    timed = [one.name for one in stages.STAGES if not one.correctness]
    alone = [one for one in stages.STAGES if one.name in timed and one.name not in ("environment", "kernel")]
    assert not any(one.together for one in alone), "what is timed runs alone"
    names = [one.name for one in stages.STAGES]
    assert names.index("calibration") + 1 == names.index("opt-6.7b"), "what matters most loses no time to figures"


def test_checks_go_on_after_one_has_failed(tmp_path: Path) -> None:
    checks = Checks(Notebook(tmp_path / "notes.json"))
    checks.check("good", lambda: {"bytes": 1})
    checks.check("bad", lambda: require(False, "3 is not 4"))
    checks.check("not here", lambda: _skip())
    with pytest.raises(ChecksFailedError, match="1 of 3 checks failed: bad"):
        checks.finish()
    noted = json.loads((tmp_path / "notes.json").read_text())["checks"]
    assert [entry["result"] for entry in noted] == ["ok", "FAILED", "skipped"]
    assert noted[1]["detail"] == "AssertionError: 3 is not 4"


def _skip() -> None:
    raise SkipError("needs a CUDA device")


def test_the_result_file_is_written_after_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def runner(module: str, argument: Mapping[str, Any], *, limit_s: float, files: Path) -> Outcome:
        path = tmp_path / "out" / "result.json"
        seen.append(list(json.loads(path.read_text())["stages"]) if path.exists() else [])
        failed = {"check": "tokens", "result": "FAILED", "detail": "they differ", "seconds": 1.0}
        if argument["stage"] == "generation":
            return Outcome("failed", 1.0, {"checks": [failed]}, "exit status 1")
        return Outcome("ok", 1.0, {})

    monkeypatch.setattr(program, "run_stages", lambda plan, settings: run_stages(plan, settings, runner=runner))
    arguments = ["--out", str(tmp_path / "out"), "--accelerator", "emulated", "--stages"]
    assert program.main([*arguments, "environment", "generation", "floor"]) == 1
    assert seen == [[], ["environment"], ["environment", "generation"]]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["correct"] is False
    assert result["emulated"] is True
    assert "EMULATED" in result["hardware"]
    assert "tokens: they differ" in capsys.readouterr().out
    assert program.main([*arguments, "environment", "floor"]) == 0


def test_results_of_others_and_of_stages_that_do_not_run_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("other", "calibration", "environment", "profile"):
        (tmp_path / f"{name}.json").write_text("{}")
    monkeypatch.setattr(program, "run_stages", lambda stages, settings: [])
    run = ["--accelerator", "emulated", "--out", str(tmp_path), "--stages"]
    assert program.main([*run, "environment"]) == 0
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["calibration", "other", "profile"]
    assert program.main([*run, "calibration"]) == 0
    assert [path.stem for path in tmp_path.glob("*.json")] == ["other"]


@pytest.mark.parametrize(("accelerator", "stage"), [("emulated", "opt-13b"), ("cuda", "opt-tiny")])
def test_a_stage_that_does_not_exist_here_is_no_success(
    accelerator: str, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--accelerator", accelerator, "--hardware", "a10-xeon", "--out", str(tmp_path), "--stages"]
    with pytest.raises(SystemExit) as raised:
        program.main([*run, "environment", stage])
    assert raised.value.code == 2
    assert f"no stage with accelerator {accelerator}: {stage}" in capsys.readouterr().err


def test_peaks_of_checks_with_several_figures_count() -> None:
    kept, over = {"peak_bytes": 1, "budget_bytes": 2}, {"peak_bytes": 3, "budget_bytes": 2}
    assert budgets_kept([{"check": "a", "detail": kept}, {"check": "b", "detail": {"0.0": kept}}]) == {
        "a": 0.5, "b, 0.0": 0.5,
    }  # fmt: skip
    with pytest.raises(AssertionError, match="b, 1.0"):
        budgets_kept([{"check": "b", "detail": {"0.0": kept, "1.0": over}}])


STEPS = ({"gated": False, "gaps_s": 0.5}, {"gated": True, "gaps_s": 0.02}, {"gated": True, "gaps_s": 0.01})


def test_what_is_said_of_a_model_at_one_limit() -> None:
    rows = [
        Row(HETEGEN, 100, 1.0, 9.0, predicted_tokens_per_s=9.9, floor_tokens_per_s=10.0, steps=STEPS),
        Row("Accelerate", None, 1.0, 3.0),
    ]
    assert speed.summary(rows, 100) == {
        "gpu_memory": 100,
        "decode_tokens_per_s": 9.0,
        "of_the_floor": 0.9,
        "predicted_over_measured": pytest.approx(1.1),
        "steps": {"gated": 1, "gaps_s": 0.02},
        "own_ways": {HETEGEN: {"decode_tokens_per_s": 9.0, "of_the_floor": 0.9, "note": ""}},
        "best_peer": {"way": "Accelerate", "hetegen_over_it": 3.0},
    }
    other = Row(IN_TURN, 100, decode_tokens_per_s=12.0, floor_tokens_per_s=16.0, note="issued in turn")
    told = speed.summary([*rows, other], 100)
    assert told["own_ways"][IN_TURN] == {"decode_tokens_per_s": 12.0, "of_the_floor": 0.75, "note": "issued in turn"}
    assert told["best_peer"]["way"] == "Accelerate", "another way of ours is no peer"
    assert speed.summary(rows[1:], 100) == {"gpu_memory": 100}


def test_a_model_that_the_host_has_no_room_for_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "memory_limit_bytes", lambda: 64 << 30)
    with pytest.raises(SkipError, match=r"opt-30b needs about 8\d GiB of host memory, the limit is 64"):
        speed.require_memory("opt-30b", SETTINGS)
    speed.require_memory("opt-13b", SETTINGS)
    monkeypatch.setattr(speed, "memory_limit_bytes", lambda: None)
    speed.require_memory("opt-30b", SETTINGS)  # the size of main memory may grow with use


def test_stages_that_run_at_the_same_time_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    _, runner, _ = run({})
    assert runner.beside == {"first": 1, "one": 2, "other": 2, "last": 1}
    _, runner, _ = run({}, replace(SETTINGS, accelerator="emulated"))
    assert set(runner.beside.values()) == {1}
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with inductor_config.patch(compile_threads=2):
        child.share_processors(4)
        assert (threads, inductor_config.compile_threads) == ([4], 1)


def test_peers_are_compared_with_the_rows_of_an_earlier_stage(tmp_path: Path) -> None:
    settings = replace(SETTINGS, folder=str(tmp_path))
    assert speed.earlier_rows("opt-6.7b", settings) == []
    row = Row(HETEGEN, 100, 1.0, 9.0)
    (tmp_path / "opt-6.7b.json").write_text(json.dumps({"rows": [row.to_json()]}))
    (found,) = speed.earlier_rows("opt-6.7b", settings)
    assert (found.way, found.gpu_memory, found.decode_tokens_per_s) == (HETEGEN, 100, 9.0)


def compared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[Job], bool],
    seconds: float,
    ways: tuple[str, ...] = (HETEGEN, "Accelerate"),
) -> list[tuple[str, int | None, bool | str, float]]:
    """Jobs that a stage of so many seconds runs, each 60 s long: way, limit, how it issues, its own limit."""
    now_s, asked = [0.0], list[tuple[str, int | None, bool | str, float]]()

    def child(job: Job, limit_s: float, files: Path) -> list[Row]:
        asked.append((job.way, job.gpu_memory, job.issue_ahead, limit_s))
        took_s = limit_s if fails(job) else 60.0
        now_s[0] += took_s
        return [Row(job.way, job.gpu_memory, decode_tokens_per_s=None if fails(job) else 1.0)]

    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    monkeypatch.setattr(comparison, "run", child)
    monkeypatch.setattr(comparison, "heading", lambda arguments: {})
    settings = replace(SETTINGS, folder=str(tmp_path), seconds=seconds)
    speed.compare_shape("opt-tiny", settings, Notebook(tmp_path / "notes.json"), ways=ways)
    return asked


def test_hetegen_that_hangs_is_run_again_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compared(tmp_path, monkeypatch, lambda job: job.issue_ahead is not False and job.way == HETEGEN, 300.0)
    low, high = sorted({limit for _, limit, _, _ in asked if limit is not None})
    assert [one[:3] for one in asked] == [
        (HETEGEN, low, "auto"), (HETEGEN, low, False), (HETEGEN, high, False), ("Accelerate", None, False),
    ]  # fmt: skip
    assert [one[3] for one in asked] == [120.0, 120.0, 115.0, 55.0]
    rows = json.loads((tmp_path / "notes.json").read_text())["rows"]
    assert [bool(row["decode_tokens_per_s"]) for row in rows] == [False, True, True, True]


def test_no_child_outlives_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compared(tmp_path, monkeypatch, lambda job: False, 130.0)
    assert [(way, limit_s) for way, _, _, limit_s in asked] == [(HETEGEN, 120.0), (HETEGEN, 65.0)]
    rows = json.loads((tmp_path / "notes.json").read_text())["rows"]
    assert rows[-1]["note"] == "not begun: 5 s were left"


def test_a_comparison_that_no_time_is_left_for_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkipError, match="^not begun: 5 s were left$"):
        compared(tmp_path, monkeypatch, lambda job: False, 10.0)
    with pytest.raises(RuntimeError, match="hetegen has no figure"):
        compared(tmp_path, monkeypatch, lambda job: job.way == HETEGEN, 300.0)


def test_peers_that_were_measured_are_told_whatever_became_of_hetegen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row(HETEGEN, 100, note="not begun: 5 s were left")
    (tmp_path / "opt-tiny.json").write_text(json.dumps({"rows": [asdict(row)]}))
    assert compared(tmp_path, monkeypatch, lambda job: False, 300.0, ways=("Accelerate",))
    rows = json.loads((tmp_path / "notes.json").read_text())["rows"]
    assert [row["way"] for row in rows] == [HETEGEN, "Accelerate"]
    with pytest.raises(AssertionError, match="no peer has a figure"):
        compared(tmp_path, monkeypatch, lambda job: True, 300.0, ways=("Accelerate",))


def test_a_comparison_without_a_calibration_of_its_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared(tmp_path, monkeypatch, lambda job: False, 300.0)
    assert "h100-server, this run has calibrated nothing" in (tmp_path / "notes.json").read_text()
    (tmp_path / "profile.json").write_text("{}")
    compared(tmp_path, monkeypatch, lambda job: False, 300.0)
    assert "calibrated nothing" not in (tmp_path / "notes.json").read_text()


def test_threads_that_the_floor_is_measured_with() -> None:
    assert thread_counts(16) == [16, 15, 14, 8]
    assert thread_counts(2) == [2, 1]
    assert thread_counts(1) == [1]


def test_what_issuing_costs_is_measured_behind_host_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuing, "best_kernel", lambda weight: KERNELS["F.linear"])
    found = issuing.measure(torch.device("cpu"), arena_bytes=1 << 18, weight_bytes=1 << 16, rounds=3)
    assert set(found) == {
        "host_s", "host_bytes_per_s", "launch_behind_it_s", "launch_with_bias_behind_it_s", "launch_in_a_loop_s",
        "host_on_a_worker_s", "host_on_a_worker_beside_idle_threads_s",
    }  # fmt: skip
    assert all(value > 0 for value in found.values())
    assert found["host_bytes_per_s"] == pytest.approx((1 << 16) / found["host_s"])


def test_each_way_of_waiting_gets_a_child_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, Mapping[str, str]]] = []

    def child_of(module: str, argument: Mapping[str, Any], *, environment: Mapping[str, str], **_: Any) -> Outcome:
        asked.append((argument["threads"], environment))
        failed = argument["threads"] == 2
        return Outcome("failed" if failed else "ok", 1.0, {"host_s": 1.0}, "exit status 1" if failed else "")

    monkeypatch.setattr(issuing, "run_child", child_of)
    monkeypatch.setattr(issuing, "device_of", lambda settings: torch.device("cpu"))
    opened = SimpleNamespace(device=torch.device("cpu"), close=lambda: asked.append((0, {})))
    monkeypatch.setattr(issuing, "CudaAccelerator", lambda: opened)
    monkeypatch.setattr(issuing, "both_ways", lambda accelerator, schedule: BothWays(2.0, 1.0, same=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    notebook = Notebook(tmp_path / "notes.json")
    issuing.issuing(SETTINGS, notebook)
    assert notebook.entries["small step in turn and ahead"] == {"in_turn_s": 2.0, "ahead_s": 1.0, "same": True}
    assert asked == [(0, {}), *((n, e) for e in ({}, {"OMP_WAIT_POLICY": "passive"}) for n in (4, 3, 2))]
    assert notebook.entries["4 threads, passive"] == {"host_s": 1.0}
    assert notebook.entries["2 threads, default"] == {"reason": "exit status 1"}
