"""Generation with random delays on every lane gives the same bits for every seed, and eager's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hetegen_compile
from hetegen_compile.accelerators import EmulatedAccelerator
from tests.models.architectures import generate, prompts, tiny_model
from tests.models.harness import RecordingBackend, assert_offloaded, emulated, half_the_weights, new_schedules

SEEDS = 8
TOKENS = 4


def _bits(found: dict[str, Any]) -> list[Tensor]:
    return [found["sequences"], found["logits"], *(tensor for layer in found["cache"] for tensor in layer)]


@pytest.mark.parametrize("cache", [None, "static"])
def test_every_seed_gives_the_same_bits(cache: str | None) -> None:
    model, inputs, backend = tiny_model("llama"), prompts(1), RecordingBackend()
    options = emulated(gpu_memory=half_the_weights(model), seed=0)
    known = hetegen_compile.schedules()
    expected = generate(model, inputs, cache, tokens=TOKENS)
    model.compile(backend=backend, options=options)
    first = generate(model, inputs, cache, tokens=TOKENS)
    torch.testing.assert_close(first["sequences"], expected["sequences"], rtol=0, atol=0)
    accelerator = backend.accelerator
    assert isinstance(accelerator, EmulatedAccelerator)
    for seed in range(1, SEEDS):
        accelerator.reseed(seed)
        again = generate(model, inputs, cache, tokens=TOKENS)
        assert all(torch.equal(a, b) for a, b in zip(_bits(again), _bits(first), strict=True)), f"seed {seed}"
    # each generation begins with the prefill's plan again, whose caches may push resident weights out
    assert_offloaded(backend, new_schedules(known), options, weights_change=True)
