"""Whole models on ``CudaAccelerator`` over the fake of torch.cuda: the calls that compiled graphs make of it.

It says nothing about a GPU: everything lies in host memory and happens at once.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from benchmarks.compare.recorder import recording
from benchmarks.gpu.instrumented import hostile
from hetegen_compile.accelerators import CudaAccelerator, choice
from hetegen_compile.accelerators.cuda import accelerator as cuda
from hetegen_compile.accelerators.cuda import native_trips
from hetegen_compile.calibration import write_profile
from hetegen_compile.cost_model import KernelChoice, load_profile
from hetegen_compile.host_kernels import TILED, VECTORISED
from hetegen_compile.host_kernels.program import Wait
from tests.accelerators import fake_cuda
from tests.accelerators.fake_cuda import LOG
from tests.backend.modules import Mlp, random
from tests.models.architectures import generate, prompts, tiny_model
from tests.models.harness import RecordingBackend, new_schedules

STEPS = 10
OPTIONS: dict[str, Any] = {"accelerator": "cuda", "hardware": "h100-server", "split": 0.25, "print_schedule": False}


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake, until every accelerator is closed."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or Dynamo asks it for more
    for module in (choice, cuda):
        monkeypatch.setattr(module, "require_cuda", lambda: None)
    yield
    torch._dynamo.reset()
    gc.collect()


def budget(accelerator_bytes: int) -> int:
    """So many bytes beside what the device's libraries take."""
    accelerator = CudaAccelerator()
    overhead = sum(accelerator.overhead_bytes().values())
    accelerator.close()
    return accelerator_bytes + overhead


@pytest.mark.parametrize(("refuse_pins", "ahead"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_model_runs_with_every_kind_of_operation(tmp_path: Path, *, refuse_pins: bool, ahead: bool) -> None:
    model, x = Mlp().eval(), random(2, 64)
    with torch.no_grad():
        expected = model(x)
        with hostile(refuse_pins=refuse_pins) as opened:
            backend = RecordingBackend()
            model.compile(backend=backend, options={**OPTIONS, "gpu_memory": budget(40 << 10), "issue_ahead": ahead})
            for seed in range(STEPS):
                torch.testing.assert_close(model(x), expected)
                (accelerator,) = opened
                accelerator.reseed(seed)
    counters = backend.accelerator.counters
    assert backend.accelerator is accelerator
    assert counters.held_bytes["weights"] > 0, "some rows are resident"
    assert counters.uploaded_bytes["weights"] > 3 * counters.held_bytes["weights"], "others are streamed each step"
    assert bool(counters.staged_bytes) == refuse_pins
    assert counters.trips_down == counters.trips_up == 4 * STEPS, "one trip for each Linear and step"
    assert {"on up", "on down", "host waits compute", "host waits down"} <= set(LOG)
    (plan,) = backend.graphs[0].plans
    plan.schedule.save_trace(tmp_path / "trace.json")
    traced = {span.resource for span in plan.schedule.spans}
    assert {"up", "down", "accelerator", "worker" if ahead else "host"} <= traced
    closed = sum(entry.startswith("gate") for entry in LOG)
    closed_steps = closed / 4  # one for each Linear
    assert STEPS / 2 < closed_steps < STEPS if ahead else not closed, "but in the first step, and where it is recorded"
    assert 0 < counters.chains_recorded < counters.chains_replayed
    assert ("pin" in traced) == refuse_pins


@pytest.mark.parametrize("ahead", [False, True])
def test_a_language_model_generates_as_in_eager(*, ahead: bool) -> None:
    model, inputs = tiny_model("llama", layers=1), prompts(1)
    expected = generate(model, inputs, "static")
    known = hetegen_compile.schedules()
    with hostile():
        backend = RecordingBackend()
        model.compile(backend=backend, options={**OPTIONS, "gpu_memory": budget(120 << 10), "issue_ahead": ahead})
        found = generate(model, inputs, "static")
    assert torch.equal(found["sequences"], expected["sequences"])
    made = new_schedules(known)
    assert made
    plans = [plan for graph in backend.graphs for plan in graph.plans]
    assert {plan.bound.in_turn for plan in plans} == {not ahead}
    assert any(entry.startswith("gate") for entry in LOG) == ahead
    assert all(schedule.host_bytes > 0 and schedule.streamed_bytes > 0 for schedule in made)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_trips_of_the_workers_are_native_calls(tmp_path: Path, name: str) -> None:
    """With the kernels of a calibrated profile: Linears by rows and by columns, activation functions between them."""
    model, inputs = tiny_model(name, layers=1), prompts(1)
    expected = generate(model, inputs, "static")
    hardware = own_kernels(tmp_path / "profile.json")
    with hostile():
        backend = RecordingBackend()
        options = {**OPTIONS, "hardware": hardware, "gpu_memory": budget(200 << 10), "issue_ahead": True}
        model.compile(backend=backend, options=options)
        found = generate(model, inputs, "static")
    assert torch.equal(found["sequences"], expected["sequences"])
    counters = backend.accelerator.counters
    assert counters.native_trips > counters.trips_up / 2


class Wide(nn.Module):
    """Linears of which several threads compute the host's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 4096), nn.Linear(4096, 64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(x)))
        return found


def test_weights_are_read_ahead_while_a_download_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count(1)
    functions = [
        ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(one)
        for one in (lambda event: 0, lambda event: 0 if next(asked) % 3 == 0 else 600)
    ]
    wait, pending = (ctypes.cast(one, ctypes.c_void_p).value for one in functions)
    monkeypatch.setattr(native_trips, "driver_wait", lambda: Wait(wait, pending, 600))
    monkeypatch.setattr(fake_cuda.FakeEvent, "cuda_event", 1, raising=False)
    model, x = Wide().eval(), random(1, 64)
    options = {**OPTIONS, "hardware": own_kernels(tmp_path / "profile.json"), "split": 0.5, "issue_ahead": True}
    with torch.no_grad(), hostile():
        expected = model(x)
        backend = RecordingBackend()
        model.compile(backend=backend, options={**options, "gpu_memory": budget(1 << 20)})
        for _ in range(STEPS):
            torch.testing.assert_close(model(x), expected)
    counters = backend.accelerator.counters
    assert counters.native_trips > STEPS / 2
    assert counters.read_ahead_bytes > 0


def test_what_steps_spend_their_time_on_is_recorded(tmp_path: Path) -> None:
    model, inputs = tiny_model("opt"), prompts(1)
    hardware = own_kernels(tmp_path / "profile.json")
    with hostile(), recording() as recorder:
        options = {**OPTIONS, "hardware": hardware, "gpu_memory": budget(200 << 10), "issue_ahead": True}
        model.compile(backend=RecordingBackend(), options=options)
        began_s = time.perf_counter()
        tokens = generate(model, inputs, "static")["sequences"].shape[1] - inputs["input_ids"].shape[1]
        took_s = time.perf_counter() - began_s
    steps = recorder.take(tokens - 1)
    assert len(steps) == tokens - 1 > 3, "the prompt's step is none of decode"
    assert recorder.take(1) == ()
    assert not steps[0].gated
    assert any(step.gated for step in steps)
    assert sum(step.recorded for step in steps) > 0
    assert sum(step.replayed for step in steps) > 0
    traced = [step for step in steps if not step.trips]
    assert len(traced) <= 1, "once, for the schedule's spans"
    assert {step.trips for step in steps if step not in traced} == {steps[0].trips}
    assert steps[0].trips > 1
    parts = [(s.between_s, s.first_s, s.computed_s, s.gaps_s, s.tail_s) for s in steps]
    assert all(part > 0 for step, known in zip(parts, steps, strict=True) if known.trips for part in step)
    assert sum(map(sum, parts)) < took_s, "each second once"


def own_kernels(path: Path) -> str:
    """A profile whose host parts are computed by kernels of our own."""
    preset = load_profile("h100-server")
    kernels = {"float32": KernelChoice(((1.0, TILED.name), (2.0, VECTORISED.name)))}
    write_profile(path, replace(preset, host=replace(preset.host, linear_kernels=kernels, ahead_bytes=1 << 20)))
    return str(path)


def test_launches_that_cannot_be_recorded_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, pool: object, capture_error_mode: str) -> None:
        raise RuntimeError("capture is not possible here")

    monkeypatch.setattr(fake_cuda.FakeGraph, "capture_begin", refuse)
    model, x = Mlp().eval(), random(2, 64)
    with torch.no_grad():
        expected = model(x)
        backend = RecordingBackend()
        model.compile(backend=backend, options={**OPTIONS, "gpu_memory": budget(40 << 10), "issue_ahead": False})
        for _ in range(STEPS):
            torch.testing.assert_close(model(x), expected)
    (plan,) = backend.graphs[0].plans
    told = [refusal for refusal in plan.schedule.refusals if refusal.where == "launches"]
    assert len(told) == 1
    assert "left as it is: launches: issued one by one, recording" in plan.schedule.explain()
    assert backend.accelerator.counters.chains_recorded == 0


class Keeps(nn.Module):
    """Gives back a view of a Linear's result, which the next step is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.first(x).view(2, 4, 16).transpose(0, 1)
        y = (keys + kept).transpose(0, 1).reshape(2, 64)
        return self.last(self.middle(y).relu()), keys


class Writes(nn.Module):
    """Writes through a view of a cache, which leaves one chain, in a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        row = cache[0]
        y = self.first(x + row)
        row.add_(y[0])
        return self.last(self.middle(y).relu() + cache.sum(0))  # type: ignore[no-any-return]


def beside_eager(model: nn.Module, split: float, nbytes: int) -> tuple[nn.Module, RecordingBackend]:
    """The model compiled, and one like it."""
    eager, backend = type(model)().eval(), RecordingBackend()
    eager.load_state_dict(model.state_dict())
    model.compile(backend=backend, options={**OPTIONS, "split": split, "gpu_memory": budget(nbytes)})
    return eager, backend


def test_what_a_join_of_one_part_passes_on_outlives_the_step() -> None:
    model = Keeps().eval()
    eager, backend = beside_eager(model, 0.0, 28 << 10)
    mine = theirs = torch.zeros(4, 2, 16)
    with torch.no_grad():
        for seed in range(14):
            x = random(2, 64, seed=seed)
            result, mine = model(x, mine)
            expected, theirs = eager(x, theirs)
            torch.testing.assert_close(result, expected)
            torch.testing.assert_close(mine, theirs)
    assert backend.accelerator.counters.chains_replayed > 0
    assert "twins.append(" in backend.graphs[-1].plans[-1].bound.source


def test_what_is_written_later_through_a_view_is_no_copy() -> None:
    model = Writes().eval()
    eager, backend = beside_eager(model, 0.25, 60 << 10)
    with torch.no_grad():
        for number in range(32):
            if number % 8 == 0:  # another place in memory now and then
                mine = random(4, 64, seed=number)
                theirs = mine.clone()
            x = random(2, 64, seed=100 + number)
            torch.testing.assert_close(model(x, mine), eager(x, theirs))
            torch.testing.assert_close(mine, theirs)
    assert backend.accelerator.counters.chains_replayed > 0


def test_models_with_other_profiles_share_the_devices_budget() -> None:
    """A device is one, whatever is told about it."""
    weights, x, backend = 4 * 128 * 128 * 4, random(2, 128), RecordingBackend()
    models, limit = [Mlp(4, 128).eval(), Mlp(5, 128).eval()], budget(4 * 128 * 128 * 4)
    for model, hardware in zip(models, ("h100-server", "t4-xeon"), strict=True):
        model.compile(backend=backend, options={**OPTIONS, "hardware": hardware, "gpu_memory": limit})
    with torch.no_grad():
        for model in 2 * models:
            torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    assert sum(backend.accelerator.counters.held_bytes.values()) <= weights
