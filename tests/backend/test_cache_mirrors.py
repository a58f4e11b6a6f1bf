"""A cache is updated on both sides and goes up no second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hetegen_compile
from hetegen_compile.accelerators.base import Accelerator, Value
from hetegen_compile.mirrors import Mirrors, Request
from tests.models.architectures import tiny_model
from tests.models.harness import (
    RecordingBackend,
    assert_like_eager,
    assert_offloaded,
    emulated,
    half_the_weights,
    new_schedules,
)

PROMPT, TOKENS = 12, 10


def _moved(accelerator: Accelerator) -> int:
    """Bytes that went up so far, weights aside: mirrors of inputs and caches, and results of the host."""
    return sum(nbytes for category, nbytes in accelerator.counters.uploaded_bytes.items() if category != "weights")


@pytest.mark.parametrize(
    ("architecture", "cache"), [("llama", None), ("llama", "static"), ("mistral", None), ("gemma3", "static")]
)
def test_a_cache_is_not_uploaded_again(architecture: str, cache: str | None) -> None:
    """Full and sliding layers; the windows of 8 tokens are full before the steps that are counted."""
    layers = 2 if architecture == "gemma3" else 1  # one of each kind
    model, backend, known = tiny_model(architecture, layers), RecordingBackend(), hetegen_compile.schedules()
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
    steps = [after - before for before, after in zip(mirrors[steady:], mirrors[steady + 1 :], strict=False)]
    growths = {after - before for before, after in zip(steps, steps[1:], strict=False)}
    assert growths in ({0}, {8}), f"bytes of mirrors of each step: {steps}"  # 8: a padding mask, one int64 a token
    a_tokens_keys_and_values = layers * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    assert 0 < min(steps) <= max(steps) < a_tokens_keys_and_values
    alike = {after - before for before, after in zip(moved[steady:], moved[steady + 1 :], strict=False)}
    assert max(alike) - min(alike) < a_tokens_keys_and_values, "activations do not grow with the cache either"

    mirrors.clear()  # all is compiled: the step behind the prompt finds the prompt's keys and values there, too
    assert_like_eager(run(), expected)
    behind_prompt, *steps = [after - before for before, after in zip(mirrors, mirrors[1:], strict=False)]
    assert max(steps) < a_tokens_keys_and_values
    windows = architecture != "llama"  # of a prompt longer than a window the last tokens come down, and go up once
    assert behind_prompt < (PROMPT + 1 if windows else 1) * a_tokens_keys_and_values


def test_a_growing_cache_is_read_without_a_record_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step returned the next one is given as it is; only what the caller makes anew is looked up."""
    model, backend, known = tiny_model("llama", layers=1), RecordingBackend(), hetegen_compile.schedules()
    prompt = torch.randint(2, 256, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    asked: list[list[str]] = []
    fetch = Mirrors.fetch

    def fetched(mirrors: Mirrors, requests: Sequence[Request], limit_bytes: int) -> list[Value]:
        asked.append([request.name for request in requests])
        return fetch(mirrors, requests, limit_bytes)

    def run() -> Tensor:
        tokens: Tensor = model.generate(prompt, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)  # type: ignore[operator]
        return tokens

    expected, options = run(), emulated(gpu_memory=half_the_weights(model))
    model.compile(backend=backend, options=options)
    assert_like_eager(run(), expected)
    assert_offloaded(backend, new_schedules(known), options)
    monkeypatch.setattr(Mirrors, "fetch", fetched)
    assert_like_eager(run(), expected)
    assert len(asked) == TOKENS
    caches = [name for names in asked[1:] for name in names if "past_key_values" in name]
    assert not caches


def test_the_hosts_copy_of_a_static_cache_is_written_while_later_layers_run() -> None:
    """Positions of the new token need nothing of the step; what reads them does not follow the step for that."""
    model, backend = tiny_model("llama"), RecordingBackend()
    prompt = torch.randint(2, 256, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    options = {**emulated(gpu_memory=half_the_weights(model)), "split": 0.5}
    model.compile(backend=backend, options=options)
    model.generate(prompt, cache_implementation="static", do_sample=False, max_new_tokens=4)  # type: ignore[operator]
    plan = backend.graphs[-1].plans[-1]
    lines = plan.bound.source.splitlines()
    written = [place for place, line in enumerate(lines) if line.lstrip().startswith("index_copy_")]
    downloads = [place for place, line in enumerate(lines) if " = wait_host(" in line]
    layers: int = model.config.num_hidden_layers
    assert plan.schedule.host_bytes > 0
    assert len(written) == 2 * layers
    assert written[-1] < downloads[-1], "behind the last download comes nothing of them"
    assert sum(place < downloads[-2] for place in written) >= 2 * (layers - 1)
