"""Graphs, segments and schedules: how many there are, and what they say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hetegen_compile
from tests.backend.modules import BUDGET, Linear, Mlp, around, plain, random
from tests.models.architectures import generate, prompts, tiny_model
from tests.models.harness import (
    Comparison,
    RecordingBackend,
    assert_offloaded,
    compiled_like_eager,
    emulated,
    half_the_weights,
    new_schedules,
)


def test_a_graph_break_in_the_middle() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        y = before(x)
        torch._dynamo.graph_break()
        return after(y)

    model = around(body)

    def run() -> Any:
        with torch.no_grad():
            return [model(random(3, 64)) for _ in range(2)]

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=14 << 10))
    assert len([graph for graph in found.schedules if graph.host_bytes and graph.streamed_bytes]) == 2


def test_a_graph_without_a_linear_before_the_others() -> None:
    """Nothing of it goes down to the host: a check of the prompt, say, whose answer the program branches on."""

    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        places = (x > 0).sum()
        if places.item() < 0:
            return x
        return after(before(x) + places)

    model = around(body)

    def run() -> Any:
        with torch.no_grad():
            return [model(random(3, 64)) for _ in range(2)]

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), calls=2)
    assert [bool(graph.host_bytes and graph.streamed_bytes) for graph in found.schedules] == [False, True]


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_serves_all_numbers_of_tokens(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model, backend, known = Mlp(4, 256).eval(), RecordingBackend(), hetegen_compile.schedules()
    options = emulated(gpu_memory=400 << 10)
    compiled = torch.compile(model, backend=backend, options=options, dynamic=dynamic)
    for tokens in (2, 3, 10, 30, 4, 11):
        x = random(tokens, 256, seed=tokens)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    schedules = new_schedules(known)
    assert len(backend.graphs) == (1 if dynamic else 2)
    buckets = [(2, 4), (5, 16), (17, 64)]
    assert sorted({schedule.tokens for schedule in schedules}) == buckets
    assert [len(graph.plans) for graph in backend.graphs] == ([3] if dynamic else [1, 3])
    # a larger bucket's activations take the place of weights, which go up again with the next plan
    assert_offloaded(backend, schedules, options, weights_change=True)


def test_five_models_in_one_process() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (32, 48, 64, 80, 96):
            torch.manual_seed(0)
            model, x = Mlp(4, width).eval(), random(3, width)

            def run(model: Mlp = model, x: Tensor = x) -> Tensor:
                with torch.no_grad():
                    result: Tensor = model(x)
                return result

            compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model)), calls=1)


def test_more_architectures_in_one_process_than_dynamo_recompiles() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        for architecture in ("gpt2", "llama", "opt"):
            model = tiny_model(architecture, layers=1)

            def run(model: Any = model) -> Tensor:
                with torch.no_grad():
                    logits: Tensor = model(**prompts(1), use_cache=False).logits
                return logits

            compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model)), calls=1)


def _everything_fits() -> Comparison:
    model = around(plain)

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(3, 64))
        return result

    # offloads=False: that nothing is offloaded is what this is about
    options = emulated(gpu_memory="1GiB", split="auto")
    return compiled_like_eager(model, run, options=options, calls=1, offloads=False)


def test_everything_fits() -> None:
    found = _everything_fits()
    (schedule,), (graph,) = found.schedules, found.backend.graphs
    assert schedule.whole_graph
    assert graph.compiled_segments == 1
    assert schedule.streamed_bytes == schedule.host_bytes == 0
    assert schedule.resident_bytes >= 4 * 64 * 64 * 4
    assert "everything fits" in schedule.explain()


def test_that_everything_fits_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hetegen_compile"):
        _everything_fits()
    assert any("nothing is offloaded" in record.message for record in caplog.records)


def _llama_segments(layers: int, **options: Any) -> tuple[int, set[tuple[Any, ...]]]:
    model = tiny_model("llama", layers=layers)

    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**prompts(1), use_cache=False).logits
        return logits

    chosen = emulated(gpu_memory=half_the_weights(model), **options)
    found = compiled_like_eager(model, run, options=chosen, calls=1)
    (graph,), (schedule,) = found.backend.graphs, found.schedules
    linears = [row for row in schedule.rows if row.op == "linear"]
    return graph.compiled_segments, {(r.host_share, r.streamed_share, r.resident_share) for r in linears}


def test_deeper_models_have_as_many_segments() -> None:
    few, _ = _llama_segments(2)
    many, shares = _llama_segments(8)
    assert few == many
    assert len(shares) > 1, "layers differ in where their weights are"
    assert any(resident for _, _, resident in shares)


@pytest.mark.parametrize("split", ["auto", 0.5])
def test_another_split_takes_no_new_segments(split: float | str) -> None:
    model, inputs = tiny_model("llama", layers=1), prompts(1)
    # offloads=False: for so small a model "auto" streams everything; the splits below are what offloads
    options = emulated(gpu_memory=half_the_weights(model), split=split)
    found = compiled_like_eager(model, lambda: generate(model, inputs, "static"), options=options, offloads=False)
    segments = [graph.compiled_segments for graph in found.backend.graphs]
    for other, used, unused in ((0.0, "streamed_bytes", "host_bytes"), (1.0, "host_bytes", "streamed_bytes")):
        known = hetegen_compile.schedules()
        with hetegen_compile.override_split(other):
            again = generate(model, inputs, "static")
        torch.testing.assert_close(again["sequences"], found.eager["sequences"], rtol=0, atol=0)
        new = new_schedules(known)
        assert new
        assert all(schedule.step_times_s for schedule in new)
        assert all(getattr(schedule, used) > getattr(schedule, unused) == 0 for schedule in new)
    assert [graph.compiled_segments for graph in found.backend.graphs] == segments
    assert found.backend.accelerator.counters.peak_bytes <= half_the_weights(model)


def _compiled(layers: int) -> Mlp:
    torch.manual_seed(0)
    model = Mlp(layers).eval()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=BUDGET))
    with torch.no_grad():
        for _ in range(3):
            model(random(2, 64))
    return model


def test_schedules_are_listed_newest_last() -> None:
    known = hetegen_compile.schedules()
    kept = [_compiled(4), _compiled(5)]
    linears = [sum(row.op == "linear" for row in schedule.rows) for schedule in new_schedules(known)]
    assert linears == [4, 5]
    assert len(kept) == 2


def test_a_schedule_reports(tmp_path: Path) -> None:
    model = _compiled(4)
    schedule = hetegen_compile.schedules()[-1]
    assert schedule.tokens == (2, 4)
    assert "layers.0" in schedule.table(unfold=True)
    assert "x4" in schedule.table() or "{" in schedule.table(), "equal layers are folded"
    explanation = schedule.explain()
    assert "gpu_memory" in explanation
    assert "layers.3" in explanation
    assert schedule.measured_step_s is not None
    assert schedule.measured_step_s > 0
    assert any(row.measured_s is not None for row in schedule.rows)
    assert 0 < schedule.floor_s <= schedule.predicted_step_s
    assert 0 < schedule.accelerator_peak_bytes <= BUDGET
    assert schedule.host_pinned_bytes > 0
    schedule.save_trace(tmp_path / "step.json")
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {"predicted", "measured"}
    assert {"host", "accelerator", "up"} <= {event["tid"] for event in events if event["pid"] == "measured"}
    assert model.training is False


def test_the_table_is_printed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = around(plain)
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=BUDGET, print_schedule=True))
    with torch.no_grad():
        model(random(3, 64))
    assert hetegen_compile.schedules()[-1].title in capsys.readouterr().out
