"""Models whose weights are pinned, adopted and staged, from compilation to result, with random delays."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import hetegen_compile
from hetegen_compile import runtime
from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.backend import make_backend
from hetegen_compile.host_memory import policy
from hetegen_compile.host_memory.limits import HostLimits
from hetegen_compile.host_memory.mappings import read_mappings
from hetegen_compile.reports.schedule import Schedule
from hetegen_compile.steps.segments import plain_compiler
from tests.backend.modules import Mlp, random
from tests.host_memory.driver import little, plenty
from tests.host_memory.files import map_weights
from tests.models.architectures import generate, prompts, tiny_model
from tests.models.harness import (
    Comparison,
    RecordingBackend,
    assert_like_eager,
    assert_offloaded,
    compiled_like_eager,
    emulated,
    fresh_dynamo,
    half_the_weights,
    new_schedules,
)

__all__ = ["fresh_dynamo"]

WEIGHT_BYTES = 64 * 64 * 4


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], HostLimits]], None]:
    """Lets the test say what the limits on host memory are."""
    return lambda limits: monkeypatch.setattr(policy, "read_limits", limits)


@pytest.fixture
def pin_limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the test say how much memory the driver pins."""

    def limit(nbytes: int) -> None:
        def open_accelerator(kind: str, *, memory_bytes: int, pace: float | None, seed: int | None) -> Any:
            assert kind == "emulated"
            return EmulatedAccelerator(memory_bytes, pace=pace, seed=seed, pin_limit_bytes=nbytes)

        monkeypatch.setattr(runtime, "open_accelerator", open_accelerator)

    return limit


def staged_bytes(found: Comparison) -> int:
    return found.backend.accelerator.counters.staged_bytes.get("weights", 0)


def streamed_bytes(found: Comparison) -> int:
    """Bytes that all steps streamed, as the plans say."""
    return sum(schedule.streamed_bytes * len(schedule.step_times_s) for schedule in found.schedules)


def streamed_layers(schedule: Schedule) -> int:
    """How many of the Linears are streamed from."""
    found = sum(bool(row.streamed_share) for row in schedule.rows)
    assert found >= 4
    return found


def _mapped_mlp(layers: int, folder: Path) -> Mlp:
    torch.manual_seed(0)
    model = Mlp(layers).eval()
    map_weights(model, folder)
    return model


def run_mlp(folder: Path, **options: Any) -> Comparison:
    model = _mapped_mlp(6, folder)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [model(random(3, 64, seed=seed)) for seed in range(3)]

    return compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model) // 2, **options))


def test_staged(limited: Any, tmp_path: Path) -> None:
    limited(little)
    found = run_mlp(tmp_path)
    (schedule,) = found.schedules
    assert staged_bytes(found) == streamed_bytes(found) > 0
    assert {span.resource for span in schedule.spans} == {"host", "accelerator", "up", "down", "pin"}
    assert schedule.host_pinned_bytes == schedule.pinned_ring_bytes > 0
    assert found.backend.accelerator.pinned_bytes == schedule.pinned_ring_bytes
    text = schedule.explain()
    assert "a pinned ring of" in text
    staged = streamed_layers(schedule) - 1
    assert f"and {staged} more: not pinned but streamed through the pinned ring: lies in a private file" in text
    assert any(str(tmp_path) in mapping.path for mapping in read_mappings()), "the mapping was given up"


def test_adopted(limited: Any, tmp_path: Path) -> None:
    limited(plenty)
    found = run_mlp(tmp_path)
    (schedule,) = found.schedules
    assert staged_bytes(found) == 0
    assert streamed_bytes(found) > 0
    adopted = streamed_layers(schedule)
    assert schedule.host_pinned_bytes == adopted * WEIGHT_BYTES
    assert f"in {adopted} storages adopted" in schedule.explain()
    mapped = [mapping.path for mapping in read_mappings() if str(tmp_path) in mapping.path and "weight" in mapping.path]
    assert len(mapped) == 6 - adopted


def test_pinned_in_place() -> None:
    torch.manual_seed(0)
    model = Mlp(6).eval()

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(3, 64))
        return result

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model) // 2))
    (schedule,) = found.schedules
    pinned = streamed_layers(schedule)
    assert schedule.host_pinned_bytes == found.backend.accelerator.pinned_bytes == pinned * WEIGHT_BYTES
    assert f"in {pinned} storages pinned in place" in schedule.explain()
    assert staged_bytes(found) == 0


def test_the_limit_of_locked_memory_falls_to_the_ring(pin_limit: Any, caplog: pytest.LogCaptureFixture) -> None:
    pin_limit(2 * WEIGHT_BYTES)
    torch.manual_seed(0)
    model = Mlp(6).eval()

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(3, 64))
        return result

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model) // 2))
    schedule = found.schedules[-1]
    assert 0 < staged_bytes(found) < streamed_bytes(found)
    assert "host memory: 32.00 KiB in 2 storages pinned in place" in schedule.explain()
    staged = streamed_layers(schedule) - 2
    assert f"and {staged - 1} more: not pinned but streamed through the pinned ring" in schedule.explain()
    assert "the driver refused with error 2" in schedule.explain()
    assert f"streaming {staged} weights" in caplog.text


@pytest.mark.parametrize(
    ("architecture", "cache", "limits"),
    [("llama", None, little), ("gpt2", "static", plenty)],
)
def test_generation_from_safetensors(
    architecture: str, cache: str | None, limits: Callable[[], HostLimits], limited: Any, tmp_path: Path
) -> None:
    limited(limits)
    tiny_model(architecture).save_pretrained(tmp_path)
    model = _load(tmp_path)
    assert any(str(tmp_path) in mapping.path for mapping in read_mappings())
    inputs = prompts(1)
    options = emulated(gpu_memory=half_the_weights(model))
    calls = 2  # prefill and decode: moving weights recompiles nothing
    found = compiled_like_eager(model, lambda: generate(model, inputs, cache), options=options, calls=calls)
    if limits is little:
        assert staged_bytes(found) == streamed_bytes(found) > 0
    else:
        assert staged_bytes(found) == 0
        holdings = [holding for schedule in found.schedules for holding in schedule.host_memory]
        assert {holding.how for holding in holdings} == {"adopted"}
        _assert_claims_moved_along(model, found)


def _assert_claims_moved_along(model: PreTrainedModel, found: Comparison) -> None:
    """The ledger knows adopted weights by the storages they lie in now, and nothing is held of them beside it."""
    (used,) = [one for one in runtime.live_runtimes() if one.accelerator is found.backend.accelerator]
    storages = {weight.untyped_storage()._cdata for weight in model.parameters()}
    claimed: dict[Any, int] = dict(used.ledger.first_rows)
    partial = [key for key, first in claimed.items() if first > 0]
    assert partial, "no weight is both resident and streamed, hence adopted"
    assert {key.storage for key in claimed} <= storages
    assert 0 < used.mirrors.held_bytes("weights") <= used.ledger.resident_bytes


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


@pytest.mark.parametrize("limits", [little, plenty])
def test_changed_weights_are_noticed(limits: Callable[[], HostLimits], limited: Any, tmp_path: Path) -> None:
    """Of each weight some rows are streamed and some on the host, of one the streamed rows are resident instead."""
    limited(limits)
    x = random(3, 64)

    def run(model: Mlp) -> list[Tensor]:
        results = [_call(model)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
            results.append(model(x))
            model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})
            results.append(model(x))
        return results

    expected = run(_mapped_mlp(4, tmp_path))
    model = _mapped_mlp(4, tmp_path)
    backend, known, options = RecordingBackend(), hetegen_compile.schedules(), emulated(gpu_memory=32 << 10)
    model.compile(backend=backend, options=options)
    assert_like_eager(run(model), expected)
    schedules = new_schedules(known)
    assert_offloaded(backend, schedules, options, weights_change=True)
    assert any(row.resident_share for schedule in schedules for row in schedule.rows)


def test_a_deleted_model_leaves_nothing_pinned(limited: Any, tmp_path: Path) -> None:
    limited(plenty)
    torch.manual_seed(0)
    kept = Mlp(4).eval()  # keeps the accelerator open
    options = emulated(gpu_memory=24 << 10)
    compiled_like_eager(kept, lambda: _call(kept), options=options)
    (open_runtime,) = [one for one in runtime.live_runtimes() if one.host_memory.holdings(list(kept.parameters()))]
    before = open_runtime.accelerator.pinned_bytes
    for _ in range(3):
        model = _mapped_mlp(4, tmp_path)
        model.compile(backend=make_backend(plain_compiler), options=options)
        _call(model)
        assert open_runtime.accelerator.pinned_bytes >= before + 3 * WEIGHT_BYTES
        del model
        gc.collect()
        assert open_runtime.accelerator.pinned_bytes == before
    assert len(open_runtime.host_memory._held) <= 4 + 4


def _call(model: Mlp) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(random(3, 64))
    return result
