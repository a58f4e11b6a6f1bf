"""A fast subset of benchmarks.schedule_quality: shapes that it does not name keep the limits of decode at batch 1."""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path

import pytest

from benchmarks import schedule_quality
from benchmarks.model_shapes import SHAPES, shape_of
from benchmarks.schedule_quality import LIMITS, Result, results
from tests.benchmarks.shapes import config

HARDWARE = ("a10-xeon", "rtx3060-laptop")
SHARES = (0.4,)


@cache
def decoded() -> tuple[Result, ...]:
    shapes = [config("llama"), config("opt")]
    return tuple(results(shapes, HARDWARE, ["decode-1"], SHARES))


def test_steps_are_close_to_their_floors() -> None:
    mean, worst = LIMITS["decode-1"]
    ratios = [one.ratio for one in decoded()]
    assert len(ratios) == 4
    assert min(ratios) >= 1.0
    assert statistics.fmean(ratios) <= mean
    assert max(ratios) <= worst


def test_plans_split_and_hold_what_was_asked_for() -> None:
    for one in decoded():
        assert one.host_bytes > 0
        assert one.streamed_bytes > 0
        assert one.resident_share == pytest.approx(one.asked_share, abs=0.03)
        assert 0 < one.together_s < one.step_s


def test_the_same_figures_each_time() -> None:
    once, again = (next(results([config("llama", layers=1)], HARDWARE, ["decode-1"], SHARES)) for _ in range(2))
    assert once == again


def test_a_config_file_is_planned_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "own.json", tmp_path / "out.json"
    source.write_text(json.dumps({**SHAPES["opt-6.7b"], "num_hidden_layers": 6, "vocab_size": 1024}))
    arguments = ["--models", "--config", str(source), "--hardware", "a10-xeon", "--shares", "0.5", "--layers", "1"]
    assert schedule_quality.main([*arguments, "--cases", "decode-4", "--json", str(out)]) == 0
    (figure,) = json.loads(out.read_text())
    assert (figure["model"], figure["layers"], figure["full_layers"]) == ("own", 1, 6)
    assert figure["ratio"] == pytest.approx(figure["step_s"] / figure["floor_s"])
    assert figure["ratio"] >= 1.0
    assert "layers planned: own 1 of 6" in capsys.readouterr().out


def test_shapes_are_those_of_the_models() -> None:
    billions = {"opt-6.7b": 6.7, "opt-30b": 30.0, "llama-2-70b": 69.0, "qwen3-8b": 8.2, "qwen3-32b": 32.8}
    for name, size in billions.items():
        assert shape_of(name, 1).full_bytes() / 2e9 == pytest.approx(size, rel=0.03)
