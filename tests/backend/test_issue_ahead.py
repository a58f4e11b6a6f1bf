"""Compiled models whose host parts are the worker's: same results, under delays, errors and interrupts too."""

from __future__ import annotations

import gc
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.accelerators.base import Op, call_on_host
from hetegen_compile.accelerators.emulated import ahead
from hetegen_compile.cost_model import load_profile, profile_to_json
from hetegen_compile.overrides import override_issue_ahead
from tests.backend.budgets import Kept
from tests.backend.modules import BUDGET, Mlp, around, plain, random
from tests.models.architectures import generate, prompts, tiny_model
from tests.models.harness import RecordingBackend, assert_offloaded, emulated, half_the_weights, new_schedules

SEEDS = 4
TOKENS = 4


def compiled(model: nn.Module, **options: Any) -> RecordingBackend:
    """Half of all rows on the host, computed by the worker."""
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(**{"gpu_memory": BUDGET, "issue_ahead": True, **options}))
    return backend


def like_eager(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)


def sources(backend: RecordingBackend) -> list[str]:
    return [plan.bound.source for graph in backend.graphs for plan in graph.plans]


@pytest.mark.parametrize(("name", "cache"), [("llama", None), ("gpt2", "static")])
def test_generation_is_the_same_for_every_seed_and_as_in_turn(name: str, cache: str | None) -> None:
    model, inputs = tiny_model(name), prompts(1)
    options = emulated(gpu_memory=half_the_weights(model), seed=0)
    expected = generate(model, inputs, cache, tokens=TOKENS)
    found, kept, known = [], Kept(model), hetegen_compile.schedules()
    for it_is in (False, True):
        backend = kept.compile(**options, issue_ahead=it_is)
        found.append(generate(model, inputs, cache, tokens=TOKENS))
        assert any("deliver(" in source for source in sources(backend)) == it_is
    accelerator = backend.accelerator
    assert isinstance(accelerator, EmulatedAccelerator)
    for seed in range(1, SEEDS):
        accelerator.reseed(seed)
        found.append(generate(model, inputs, cache, tokens=TOKENS))
    assert torch.equal(found[0]["sequences"], expected["sequences"])
    for one in found[1:]:
        assert torch.equal(one["sequences"], found[0]["sequences"])
        torch.testing.assert_close(one["logits"], found[1]["logits"], rtol=0, atol=0)
    torch.testing.assert_close(found[1]["logits"], found[0]["logits"], rtol=1e-4, atol=1e-5)
    assert_offloaded(backend, new_schedules(known), options, weights_change=True)


def test_sizes_may_vary() -> None:
    """Sequences that come and go: the graph has a symbol, of which the worker's results have their sizes."""
    model = Mlp().eval()
    backend = compiled(model)
    for sequences in (2, 3, 5, 4, 2, 5):
        like_eager(model, random(sequences, 64))
    assert any("deliver(" in source and "(inputs[" in source for source in sources(backend))


def test_host_parts_are_traced_as_the_workers_and_stand_in_the_table() -> None:
    model = Mlp().eval()
    backend = compiled(model)
    for _ in range(3):
        like_eager(model, random(3, 64))
    (schedule,) = [plan.schedule for graph in backend.graphs for plan in graph.plans]
    assert "worker" in {span.resource for span in schedule.spans}
    linears = [row for row in schedule.rows if row.op == "linear"]
    assert all(row.host_s > 0 and row.measured_s is not None for row in linears)
    assert backend.accelerator.counters.trips_up == 3 * len(linears)
    assert schedule.trips_ahead == len(linears)
    assert f"a worker thread computes the host's part of {len(linears)} trips" in schedule.explain()


def test_the_caller_may_have_it_otherwise() -> None:
    """With the same capture and segments; what is issued ahead needs more room, so memory is shared out anew once."""
    model, x = Mlp().eval(), random(3, 64)
    backend = compiled(model, issue_ahead=False)
    like_eager(model, x)
    with override_issue_ahead(True):
        like_eager(model, x)
        with hetegen_compile.override_split(0.0):
            like_eager(model, x)
    like_eager(model, x)
    (graph,) = backend.graphs
    assert [(plan.schedule.split, bool(plan.schedule.trips_ahead)) for plan in graph.plans] == [
        (0.5, True), (0.0, False), (0.5, False),
    ]  # fmt: skip


def with_gates(folder: Path, gate_s: float) -> str:
    """The path of a profile that knows gates, if they cost something."""
    profile = load_profile("h100-server")
    told = {"accelerator.gate_s": "of this test"} if gate_s else {}
    changed = replace(
        profile, accelerator=replace(profile.accelerator, gate_s=gate_s), sources={**profile.sources, **told}
    )
    path = folder / f"gates {gate_s}.json"
    path.write_text(json.dumps(profile_to_json(changed)))
    return str(path)


def test_a_profile_that_knows_gates_asks_for_it(tmp_path: Path) -> None:
    for gate_s in (0.0, 4e-6):
        torch._dynamo.reset()
        model = Mlp().eval()
        backend = compiled(model, hardware=with_gates(tmp_path, gate_s), issue_ahead="auto")
        like_eager(model, random(3, 64))
        assert ("deliver(" in sources(backend)[0]) == bool(gate_s)


@pytest.mark.parametrize("cache", [None, "static"])
def test_gates_are_closed_in_decode_steps_of_any_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str | None
) -> None:
    """Attention to a growing cache, new in each step, is issued when they are open: the accelerator checks that."""
    model, backend, gated = tiny_model("llama"), RecordingBackend(), dict[str, bool]()
    expected = generate(model, prompts(1), cache, tokens=TOKENS)
    begin_step, launch = EmulatedAccelerator.begin_step, EmulatedAccelerator.launch

    def begun(self: EmulatedAccelerator, *args: Any, **options: Any) -> None:
        gated.clear()
        begin_step(self, *args, **options)

    def launched(self: EmulatedAccelerator, op: Op, *args: Any, **options: Any) -> Any:
        gated[op.name] = self._ahead.behind_gates
        return launch(self, op, *args, **options)

    monkeypatch.setattr(EmulatedAccelerator, "begin_step", begun)
    monkeypatch.setattr(EmulatedAccelerator, "launch", launched)
    options = emulated(gpu_memory=half_the_weights(model), hardware=with_gates(tmp_path, 4e-6))
    model.compile(backend=backend, options=options)
    assert torch.equal(generate(model, prompts(1), cache, tokens=TOKENS)["sequences"], expected["sequences"])
    assert "deliver(" in sources(backend)[-1]
    segments = {name: behind for name, behind in gated.items() if name.startswith("segment")}
    attention = len(model.model.layers) if cache is None else 0
    assert len(segments) - sum(segments.values()) == 1 + attention  # the first lies before all gates
    assert sum(gated.values()) > len(segments)


def test_what_cannot_be_done_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedAccelerator, "cannot_issue_ahead", "it has no worker")
    model = Mlp().eval()
    backend = compiled(model)
    like_eager(model, random(3, 64))
    (schedule,) = [plan.schedule for graph in backend.graphs for plan in graph.plans]
    assert "deliver(" not in sources(backend)[0]
    assert "left as it is: issuing ahead of the host's parts: it has no worker" in schedule.explain()


def test_what_is_too_large_is_told() -> None:
    model = Mlp(2, 128).eval()
    backend = compiled(model, gpu_memory=8 << 20)
    like_eager(model, random(2048, 128))
    (schedule,) = [plan.schedule for graph in backend.graphs for plan in graph.plans]
    assert (schedule.trips_ahead, schedule.host_bytes > 0) == (0, True)
    assert "2 of 2 are computed by the issuing thread: what they send up is more than 256 KiB" in schedule.explain()


def test_that_there_is_nothing_to_give_to_the_worker_is_told() -> None:
    model = Mlp(2, 128).eval()
    backend = compiled(model, gpu_memory=8 << 20, split=0.0)
    like_eager(model, random(2, 128))
    (schedule,) = [plan.schedule for graph in backend.graphs for plan in graph.plans]
    assert "issuing ahead of the host's parts: no Linear has rows on the host" in schedule.explain()


def test_a_split_without_room_for_it_is_scheduled_without_it() -> None:
    """Residency has kept room for a schedule that sends nothing down; another split needs more, ahead most."""
    model, x = Mlp(5, 128).eval(), random(2, 128)
    backend = compiled(model, gpu_memory=4 * 128 * 128 * 4, split=0.0)
    like_eager(model, x)
    with hetegen_compile.override_split(0.5):
        like_eager(model, x)
    streamed, half = (plan.schedule for graph in backend.graphs for plan in graph.plans)
    assert (streamed.split, half.split) == (0.0, 0.5)
    assert half.host_bytes > 0
    assert "there is no room for the activations" in half.explain()
    assert "deliver(" not in sources(backend)[1]
    assert backend.accelerator.counters.peak_bytes <= 4 * 128 * 128 * 4


def test_an_error_of_a_host_part_names_its_node_and_the_next_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = around(plain)
    compiled(model)
    like_eager(model, random(3, 64))
    real, failed = call_on_host, list[str]()

    def failing(op: Any, function: Any, args: Any, kwargs: Any) -> Any:
        if "host_linear" in op.name and not failed:
            failed.append(op.name)
            return real(op, lambda *_: 1 / 0, (), {})
        return real(op, function, args, kwargs)

    monkeypatch.setattr(ahead, "call_on_host", failing)
    with torch.no_grad(), pytest.raises(ZeroDivisionError) as raised:
        model(random(3, 64))
    assert any(failed[0] in note for note in raised.value.__notes__)
    like_eager(model, random(3, 64))


def test_threads_level_off_when_models_come_and_go() -> None:
    counts = []
    for _ in range(4):
        model = Mlp(2).eval()
        backend = compiled(model)
        like_eager(model, random(3, 64))
        assert "deliver(" in sources(backend)[0]
        del model, backend
        torch._dynamo.reset()
        gc.collect()
        counts.append(threading.active_count())
    assert counts[-1] == counts[0]
