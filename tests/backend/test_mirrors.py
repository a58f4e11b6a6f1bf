"""What lies on the accelerator is brought up to date when the host's copy changes, and not otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.accelerators.base import Accelerator
from tests.backend.modules import BUDGET, Mlp, random
from tests.models.architectures import tiny_model
from tests.models.harness import (
    RecordingBackend,
    assert_like_eager,
    assert_offloaded,
    compiled_like_eager,
    emulated,
    half_the_weights,
    new_schedules,
)

PROMPT, TOKENS = 12, 10


def _moved(accelerator: Accelerator) -> int:
    """Bytes that went up so far, weights aside: mirrors of inputs and caches, and results of the host."""
    return sum(nbytes for category, nbytes in accelerator.counters.uploaded_bytes.items() if category != "weights")


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_cache_is_not_uploaded_again(cache: str | None) -> None:
    model, backend, known = tiny_model("llama"), RecordingBackend(), hetegen_compile.schedules()
    prompt = torch.randint(2, 256, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    mirrors: list[int] = []
    moved: list[int] = []

    def count(tokens: Tensor, scores: Any, **rest: Any) -> Tensor:
        if backend.returned:
            mirrors.append(backend.accelerator.counters.uploaded_bytes.get("mirrors", 0))
            moved.append(_moved(backend.accelerator))
        return torch.zeros(len(tokens), dtype=torch.bool)

    def run() -> Tensor:
        tokens: Tensor = model.generate(  # type: ignore[operator]
            prompt, cache_implementation=cache, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
            stopping_criteria=[count],
        )  # fmt: skip
        return tokens

    expected, options = run(), emulated(gpu_memory=half_the_weights(model))
    model.compile(backend=backend, options=options)
    result = run()
    assert_like_eager(result, expected)
    assert_offloaded(backend, new_schedules(known), options)
    assert len(mirrors) == TOKENS
    steady = 4  # prefill and the first decodes compile, and fetch buffers
    steps = {after - before for before, after in zip(mirrors[steady:], mirrors[steady + 1 :], strict=False)}
    assert len(steps) == 1, f"bytes of mirrors of each step: {steps}"
    a_tokens_keys_and_values = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    assert 0 < steps.pop() < a_tokens_keys_and_values
    alike = {after - before for before, after in zip(moved[steady:], moved[steady + 1 :], strict=False)}
    assert max(alike) - min(alike) < a_tokens_keys_and_values, "activations do not grow with the cache either"


def _set_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def _copy_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 0.5)


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def _assign(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)


def _new_parameters(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach() * 0.5)


def _write_data_and_refresh(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data *= 0.5
    hetegen_compile.refresh(model)


def _write_numpy_and_refresh(model: nn.Module) -> None:
    for parameter in model.parameters():
        view = parameter.detach().numpy()
        view *= 0.5
    hetegen_compile.refresh(model)


@pytest.mark.parametrize(
    "change",
    [_set_data, _copy_in_place, _load, _assign, _new_parameters, _write_data_and_refresh, _write_numpy_and_refresh],
)
def test_changed_parameters_are_noticed(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x = random(2, 64)

    def run() -> tuple[Tensor, ...]:
        model.load_state_dict(start)
        with torch.no_grad():
            before = [model(x) for _ in range(2)]
            change(model)
            after = [model(x) for _ in range(2)]
        return (*before, *after)

    found = compiled_like_eager(
        model, run, options=emulated(gpu_memory=BUDGET), compare=_close, weights_change=True
    )
    assert any(schedule.resident_bytes > 0 for schedule in found.schedules), "some weights are held"
    assert not torch.allclose(found.compiled[1], found.compiled[2])


def _close(result: Any, expected: Any) -> None:
    assert_like_eager(list(result), list(expected))


def test_a_resident_weight_is_uploaded_once() -> None:
    torch.manual_seed(0)
    model, x = Mlp().eval(), random(2, 64)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
    uploaded = []
    with torch.no_grad():
        for _ in range(3):
            model(x)
            backend.accelerator.synchronize()  # copies for the next step are under way
            ahead = backend.graphs[0]._runtime.carried.held_bytes
            uploaded.append(backend.accelerator.counters.uploaded_bytes["weights"] - ahead)
    (schedule,) = new_schedules(known)
    assert schedule.resident_bytes > 0
    first, second, third = uploaded
    assert first == schedule.resident_bytes + schedule.streamed_bytes
    assert third - second == second - first == schedule.streamed_bytes
