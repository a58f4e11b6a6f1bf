"""Caches that grow: where the host's copies lie, who may keep them, and what the report says of copying them."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import hetegen_compile
from hetegen_compile.host_memory import recycled
from tests.models.architectures import tiny_model
from tests.models.harness import RecordingBackend, assert_offloaded, emulated, half_the_weights, new_schedules

PROMPT, STEPS = 24, 8


def _keys(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])  # full layers, windows
def test_caches_lie_where_those_before_the_last_lay(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled, "LEAST_BYTES", 1)
    memory = recycled.Recycled()
    defaults: Any = recycled.cat.__kwdefaults__
    monkeypatch.setitem(defaults, "memory", memory)
    model, backend, known = tiny_model(architecture), RecordingBackend(), hetegen_compile.schedules()
    tokens = torch.randint(2, 256, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    eager, options = copy.deepcopy(model), emulated(gpu_memory=half_the_weights(model), context=PROMPT + STEPS)
    model.compile(backend=backend, options=options)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    steps = [tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1)]
    lay: list[set[int]] = []
    held: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for step, given in enumerate(steps):
            logits = model(given, past_key_values=cache).logits
            torch.testing.assert_close(logits, eager(given, past_key_values=expected).logits, rtol=1e-4, atol=1e-5)
            lay.append({tensor.untyped_storage().data_ptr() for tensor in _keys(cache)})
            if step == STEPS // 2:  # somebody keeps these: nothing may come to lie there
                held = [(tensor, tensor.clone()) for tensor in _keys(cache)]
    for mine, eagers in zip(_keys(cache), _keys(expected), strict=True):
        torch.testing.assert_close(mine, eagers, rtol=1e-4, atol=1e-5)
        assert mine.stride() == eagers.stride()
    assert lay[4] == lay[2], "two steps later"
    assert all(torch.equal(tensor, before) for tensor, before in held)
    assert not any(lay[STEPS // 2] & later for later in lay[STEPS // 2 + 1 :])
    assert_offloaded(backend, new_schedules(known), options)
    assert memory.lent_bytes > 0
    del cache, held, mine, logits
    gc.collect()
    backend.reset()
    assert (memory.lent_bytes, memory.idle_bytes) == (0, 0), "nothing is kept for caches that are gone"


@pytest.mark.parametrize(("sequences", "told"), [(1, False), (64, True)])
def test_the_report_says_what_copying_costs(sequences: int, told: bool) -> None:
    model, backend, known = tiny_model("llama"), RecordingBackend(), hetegen_compile.schedules()
    cache = DynamicCache()
    model.compile(backend=backend, options=emulated(gpu_memory="256MiB", context=600, max_batch=sequences))
    with torch.no_grad():
        model(torch.ones(sequences, 500, dtype=torch.long), past_key_values=cache)
        model(torch.ones(sequences, 1, dtype=torch.long), past_key_values=cache)
    decode = new_schedules(known)[-1]
    assert (decode.copying_s > 0) is told
    for text in (decode.table(), decode.explain()):
        assert ('cache_implementation="static" copies none' in text) is told
    if told:
        assert 0.1 * decode.predicted_step_s < decode.copying_s < decode.predicted_step_s
        assert f"{1e3 * decode.copying_s:.3g} ms of the host's time" in decode.table()
