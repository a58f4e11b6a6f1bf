"""benchmarks.prediction: what it makes of measured steps, and when it fails."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hetegen_compile
from benchmarks import prediction
from benchmarks.prediction import Result
from hetegen_compile.bench import measure


def result(predicted_s: float, measured_s: float) -> Result:
    return Result("rtx3060-laptop", "static", 0.5, "auto", 10.0, predicted_s, measured_s, measured_s, measured_s, 1, 1)


def test_the_error_is_relative_to_what_was_measured() -> None:
    assert result(1.2, 1.0).error == pytest.approx(0.2)
    assert result(0.9, 1.2).error == pytest.approx(-0.25)


def test_measured_steps_are_divided_by_the_pace_and_a_run_is_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = SimpleNamespace(predicted_step_s=0.5, streamed_bytes=7, host_bytes=9)
    runs = iter([[4.0, 6.0, 100.0], [8.0, 8.0, 8.0], [2.0, 2.0, 12.0]] * 2)  # medians 6, 8 and 2; at pace 4
    asked: list[Any] = []
    monkeypatch.setattr(prediction, "compile_anew", lambda model, options: asked.append(options))
    monkeypatch.setattr(prediction, "_decode", lambda model, tokens, cache: None)
    monkeypatch.setattr(prediction, "decode_schedule", lambda split: schedule)
    monkeypatch.setattr(prediction, "_run", lambda model, split, steps, cache: next(runs))
    arguments = argparse.Namespace(seconds=2.0, runs=3, steps=3)
    found = list(prediction.measure("rtx3060-laptop", "dynamic", 0.5, arguments))
    assert [one.split for one in found] == ["auto", "0.0"]
    assert asked[1] == {**asked[0], "pace": 4.0}  # two seconds of half a second
    assert (found[0].measured_s, found[0].lowest_run_s, found[0].highest_run_s) == (1.5, 0.5, 2.0)
    assert found[0].error == pytest.approx(0.5 / 1.5 - 1.0)


def test_the_steps_of_a_run_are_those_after_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = SimpleNamespace(step_times_s=[9.0, 9.0], tokens=(1, 1), split="auto", rows=(1,))
    for module in (hetegen_compile, measure):
        monkeypatch.setattr(module, "schedules", lambda: (schedule,))

    def decode(model: Any, tokens: int, cache: str) -> None:
        assert cache == "dynamic"
        schedule.step_times_s.extend(range(tokens - 1))

    monkeypatch.setattr(prediction, "_decode", decode)
    times = prediction._run(None, "auto", 4, "dynamic")
    assert times == [2, 3, 4, 5]  # the first two warm up; the first token of all is prefill's


@pytest.mark.parametrize(("predicted_s", "code"), [(1.19, 0), (0.81, 0), (1.25, 1), (0.7, 1)])
def test_a_prediction_beyond_the_tolerance_is_a_failure(
    predicted_s: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, float]] = []

    def measure(hardware: str, cache: str, share: float, arguments: argparse.Namespace) -> Iterator[Result]:
        asked.append((cache, share))
        yield result(1.0, 1.0)
        yield result(predicted_s, 1.0)

    monkeypatch.setattr(prediction, "measure", measure)
    out = tmp_path / "out.json"
    assert prediction.main(["--hardware", "rtx3060-laptop", "--json", str(out)]) == code
    written = json.loads(out.read_text())["results"]
    assert asked == [(cache, share) for cache in ("dynamic", "static") for share in prediction.BUDGETS]
    assert [one["error"] for one in written] == pytest.approx([0.0, predicted_s - 1.0] * len(asked))
