"""A fast subset of benchmarks.schedule_quality: shapes that it does not name keep the limits of decode at batch 1."""

from __future__ import annotations

import json
import re
import statistics
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import schedule_quality
from benchmarks.model_shapes import SHAPES, shape_of
from benchmarks.schedule_quality import LIMITS, Result, results
from hetegen_compile.cost_model import HardwareProfile, load_profile, profile_to_json
from hetegen_compile.ir import info
from tests.benchmarks.shapes import config

HARDWARE = ("a10-xeon", "rtx3060-laptop")
SHARES = (0.4,)


def profiles() -> list[HardwareProfile]:
    return [load_profile(name) for name in HARDWARE]


@cache
def decoded() -> tuple[Result, ...]:
    shapes = [config("llama", layers=2), config("opt", layers=2)]
    return tuple(results(shapes, profiles(), ["decode-1"], SHARES))


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


def test_where_every_weight_is_resident_in_part() -> None:
    """What such a split needs for activations is foreseen: everything had been streamed instead."""
    (one,) = results([config("falcon", layers=2)], [load_profile("a10-xeon")], ["decode-1"], [0.6])
    assert one.host_bytes > 0
    assert one.ratio <= LIMITS["decode-1"][1]


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_same_figures_each_time() -> None:
    once, again = (next(results([config("llama", layers=1)], profiles(), ["decode-1"], SHARES)) for _ in range(2))
    assert once == again


def test_a_config_file_is_planned_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "own.json", tmp_path / "out.json"
    source.write_text(json.dumps({**SHAPES["opt-6.7b"], "num_hidden_layers": 6, "vocab_size": 1024}))
    profile = profile_to_json(load_profile("a10-xeon")) | {"name": "a machine of my own"}
    hardware = written(tmp_path / "machine.json", profile)
    arguments = ["--model", str(source), "--hardware", str(hardware), "--shares", "0.5", "--layers", "1"]
    assert schedule_quality.main([*arguments, "--cases", "decode-4", "--dtype", "float32", "--json", str(out)]) == 0
    (figure,) = json.loads(out.read_text())
    assert (figure["model"], figure["layers"], figure["full_layers"]) == ("own", 1, 6)
    assert figure["hardware"] == "a machine of my own"
    offloaded = figure["streamed_bytes"] + figure["host_bytes"]
    weights = offloaded / (1 - figure["resident_share"])
    assert weights == pytest.approx(4 * (12 * 4096 * 4096 + 1024 * 4096), rel=1e-3), "four bytes an element"
    assert figure["ratio"] == pytest.approx(figure["step_s"] / figure["floor_s"])
    assert figure["ratio"] >= 1.0
    assert "layers planned: own 1 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "opt-6.8b"], r"no config of 'opt-6\.8b'.*known here: opt-6\.7b"),
        (["--model", "./nowhere.json"], r"nowhere\.json'.*no such file"),
        (["--model", "clip.json"], "'clip' states no number of layers"),
        (["--model", "list.json"], "no config of"),
        (["--hardware", "a11-xeon"], "did you mean 'a10-xeon'"),
        (["--hardware", "machine.json"], "machine.json.*schema_version"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "clip.json", {"model_type": "clip"})
    written(tmp_path / "list.json", [1, 2])
    written(tmp_path / "machine.json", {"name": "no profile"})
    assert schedule_quality.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(told, error)
    assert error.startswith("schedule_quality: ")
    assert len(error.splitlines()) == 1


def test_a_folder_is_named_after_itself(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    path = written(folder / "config.json", {**SHAPES["llama-2-7b"], "vocab_size": 1024})
    assert [shape_of(str(one), 2).name for one in (folder, path)] == ["my-model", "my-model"]


def test_weights_are_of_the_type_that_is_asked_for_or_stated(tmp_path: Path) -> None:
    path = written(tmp_path / "own.json", {**SHAPES["opt-6.7b"], "torch_dtype": "bfloat16"})
    assert shape_of(str(path), 1).dtype == "bfloat16"
    assert shape_of(str(path), 1, "float32").dtype == "float32"
    assert shape_of("opt-6.7b", 1).dtype == "float16"


def test_caches_with_windows_are_planned_at_their_length() -> None:
    """Gemma 2 and the first Mistral: a window of more tokens than there are, and one of fewer."""
    for window, tokens in ((4096, 512), (64, 63)):
        shape = config("mistral", layers=1, sliding_window=window)
        graph, sizes = shape.decode(1, 512)
        assert not sizes, "nothing is symbolic"
        given = [info(node).value for node in graph.module.graph.find_nodes(op="placeholder")]
        caches = [tuple(value.shape) for value in given if isinstance(value, torch.Tensor) and value.dim() == 4]
        assert caches == [(1, 8, tokens, 128)] * 2


def test_shapes_are_those_of_the_models() -> None:
    billions = {"opt-6.7b": 6.7, "opt-30b": 30.0, "llama-2-70b": 69.0, "qwen3-8b": 8.2, "qwen3-32b": 32.8}
    for name, size in billions.items():
        assert shape_of(name, 1).full_bytes() / 2e9 == pytest.approx(size, rel=0.03)
