"""``hetegen bench`` from the command line to its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, OPTConfig, OPTForCausalLM

from hetegen_compile import backend, cli
from hetegen_compile.bench import Measured, bench_json, bench_report, measure
from hetegen_compile.bench.timing import Timing
from hetegen_compile.errors import BudgetError
from hetegen_compile.reports.schedule import Schedule
from hetegen_compile.steps.segments import plain_compiler

SCHEDULE: Any = SimpleNamespace(
    title="hetegen on cuda, hardware h100-server, 1 token a forward", predicted_step_s=0.02, floor_s=0.01,
    resident_bytes=1, streamed_bytes=2, host_bytes=3, accelerator="cuda",
)  # fmt: skip
FOUND = Measured("hetegen", Timing(0.5, (0.1, 0.025, 0.025), (7, 8, 9, 4)), 1.0, 1 << 20, SCHEDULE, "static")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(tmp_path: Path) -> str:
    sizes: dict[str, Any] = {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 2, "word_embed_proj_dim": 64}
    config = OPTConfig(num_hidden_layers=1, vocab_size=128, max_position_embeddings=64, **sizes)
    config.save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


def test_a_shape_runs_with_random_weights(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights go over the link, and no speed is shown of an accelerator that has none."""
    monkeypatch.setattr(backend, "inductor_compiler", plain_compiler)
    run = ["bench", model, "--accelerator", "emulated", "--hardware", "a10-xeon", "--gpu-memory", "60KiB", "--json"]
    assert cli.main([*run, "--prompt", "5", "--new-tokens", "3"]) == 0
    split, streamed = json.loads(capsys.readouterr().out)["ways"]
    assert [split["way"], streamed["way"]] == ["hetegen", "all streamed"]
    assert streamed["streamed_bytes"] > 0
    assert streamed["host_bytes"] == 0
    assert split["tokens"] == streamed["tokens"]
    assert len(split["tokens"]) == 3
    assert split["emulated"]
    assert split["decode_tokens_per_s"] is split["prefill_tokens_per_s"] is split["decode_steps_s"] is None
    assert 0 < split["predicted_decode_tokens_per_s"] <= split["floor_decode_tokens_per_s"]
    assert 0 < split["accelerator_peak_bytes"] <= 60 << 10


@pytest.mark.parametrize(("more", "kept"), [([], None), (["--cache", "static"], "static")])
def test_the_cache_is_generates_own_unless_another_is_asked_for(
    model: str, more: list[str], kept: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "inductor_compiler", plain_compiler)
    asked: list[Any] = []
    generate = OPTForCausalLM.generate

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["cache_implementation"])
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(OPTForCausalLM, "generate", noting)
    run = ["bench", model, "--accelerator", "emulated", "--hardware", "a10-xeon", "--gpu-memory", "60KiB", *more]
    assert cli.main([*run, "--prompt", "5", "--new-tokens", "3"]) == 0
    assert asked
    assert set(asked) == {kept}
    assert f"a forward, {kept or 'dynamic'} cache" in capsys.readouterr().out


def test_a_split_without_room_is_compiled_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another split's activations may need what the residency of the first has taken."""
    compiled: list[Any] = []
    model: Any = SimpleNamespace(compile=lambda backend, options: compiled.append(options))

    def timed(model: Any, prompt: Any, new_tokens: int, way: measure.Way, cache: str) -> tuple[Timing, int]:
        assert cache == "dynamic"
        if way.split == 0.0 and "split" not in compiled[-1]:
            raise BudgetError("needs 13824 bytes more")
        return FOUND.timing, 1

    monkeypatch.setattr(measure, "_timed", timed)
    monkeypatch.setattr(measure, "decode_schedule", lambda split, known: SCHEDULE)
    splits: dict[str, measure.Split] = {**measure.SPLITS, "all on the host": 1.0}
    found = list(measure.measure_splits(model, torch.ones(1, 2), 3, {"gpu_memory": 5}, splits, cache="dynamic"))
    assert [one.way for one in found] == ["hetegen", "all streamed", "all on the host"]
    assert compiled == [{"gpu_memory": 5}, {"gpu_memory": 5, "split": 0.0}, {"gpu_memory": 5}]


def test_figures_are_rates_of_the_steps() -> None:
    (figures,) = bench_json([FOUND], prompt=100)["ways"]
    assert figures["prefill_tokens_per_s"] == 200
    assert figures["decode_tokens_per_s"] == 40
    assert figures["predicted_decode_tokens_per_s"] == 50
    assert not figures["emulated"]
    report = bench_report([FOUND, replace(FOUND, way="other", timing=Timing(0.5, (0.1,), (7, 8)))], prompt=100)
    assert "the same" in report
    assert "DIFFER" in report
    assert "emulated" not in report


@pytest.mark.parametrize(("pace", "speed", "said"), [(1.0, None, "say nothing about speed"), (10.0, 400.0, "paced")])
def test_of_an_emulated_accelerator_only_paced_times_are_shown(pace: float, speed: float | None, said: str) -> None:
    schedule: Schedule = SimpleNamespace(**{**vars(SCHEDULE), "accelerator": "emulated"})  # type: ignore[assignment]
    found = replace(FOUND, pace=pace, schedule=schedule)
    assert bench_json([found], prompt=1)["ways"][0]["decode_tokens_per_s"] == speed
    assert said in bench_report([found], prompt=1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "int4"], "dtype='int4'"),
        (["--cache", "sliding"], "cache='sliding': valid are 'dynamic', 'static'"),
        (["--new-tokens", "1"], "whole number of at least 2"),
        (["--gpu-memory", "6 bananas"], "is not a size"),
        (["--pace", "10", "--accelerator", "cuda"], "pace"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", model, *more]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hetegen: ")
    assert message in line


def test_an_encoder_makes_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    assert cli.main(["bench", str(tmp_path / "bert")]) == 1
    assert "no causal language model" in capsys.readouterr().err
