"""Decode loops by hand: what the caller does to a cache between steps arrives, what nobody changed does not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from tests.models.architectures import WINDOW, prompts, tiny_model
from tests.models.harness import Comparison, compiled_like_eager, emulated, half_the_weights

STEPS = 4
Between = Callable[[Any, int], None]


def _dynamic(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def _static(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=PROMPT_AND_STEPS)


PROMPT_AND_STEPS = 16


def _held(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """What the host's copy of the cache holds now."""
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def _decode(model: PreTrainedModel, cache: Cache, between: Between, tokens: Tensor) -> list[Any]:
    """Greedy steps from ``cache``; after each, ``between(cache, step)``. Logits and caches of all steps."""
    found: list[Any] = []
    for step in range(1 + STEPS):
        with torch.no_grad():
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1:]
        tokens = logits.argmax(-1)
        found += [logits.clone(), _held(cache)]
        between(cache, step)
    return found


def _compare(run: Callable[[PreTrainedModel], Any], architecture: str = "llama") -> Comparison:
    model = tiny_model(architecture, layers=1)
    half = half_the_weights(model)
    options = emulated(gpu_memory=half * 13 // 10 if architecture == "llama" else half)
    return compiled_like_eager(model, lambda: run(model), options=options)


def _nothing(cache: Any, step: int) -> None:
    del cache, step


def _edit(cache: Any, step: int) -> None:
    if step == 2:
        for layer in cache.layers:
            layer.keys.mul_(0.5)
            layer.values[:, :, 0].zero_()


def _replace(cache: Any, step: int) -> None:
    if step == 2:
        for layer in cache.layers:
            layer.values = layer.values.flip(2).clone()


def _edit_in_inference_mode(cache: Any, step: int) -> None:
    if step == 2:
        with torch.inference_mode():
            for layer in cache.layers:
                layer.keys.copy_(layer.keys * 0.5)


def _crop(cache: Any, step: int) -> None:
    if step == 2:
        cache.crop(-2)


EDITS: list[tuple[Callable[[PreTrainedModel], Cache], tuple[Between, ...]]] = [
    (_static, (_edit, _edit_in_inference_mode)), (_dynamic, (_edit, _replace, _crop)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "edits"), EDITS)
def test_caches_that_the_caller_edits(make: Callable[[PreTrainedModel], Cache], edits: tuple[Between, ...]) -> None:
    """Each edit of a cache of its own, with one compiled model."""

    def run(model: PreTrainedModel) -> Any:
        return [_decode(model, make(model), between, prompts(1)["input_ids"]) for between in edits]

    _compare(run)


@pytest.mark.parametrize(("architecture", "make"), [("mistral", _dynamic), ("gemma3", _static)])
def test_sliding_windows_hold_what_eager_leaves(make: Callable[[PreTrainedModel], Cache], architecture: str) -> None:
    """The window is full after the prompt and one token: layers roll."""
    assert prompts(1)["input_ids"].shape[1] < WINDOW < prompts(1)["input_ids"].shape[1] + STEPS
    _compare(lambda model: _decode(model, make(model), _nothing, prompts(1)["input_ids"]), architecture)


def test_a_cache_that_is_reset_and_used_again() -> None:
    def run(model: PreTrainedModel) -> Any:
        cache, found = _static(model), []
        for length in (7, 5):
            found += _decode(model, cache, _nothing, prompts(1)["input_ids"][:, :length])
            cache.reset()
            found += _held(cache)
        return found

    _compare(run)


def test_a_continued_conversation() -> None:
    """Further prompts, several tokens long, onto the same cache."""

    def run(model: PreTrainedModel) -> Any:
        cache, found = _dynamic(model), []
        for length in (7, 3, 5):
            found += _decode(model, cache, _nothing, prompts(1)["input_ids"][:, :length])
        return found

    _compare(run)


def test_two_caches_in_turn() -> None:
    def run(model: PreTrainedModel) -> Any:
        caches = [_static(model), _static(model)]
        tokens = [prompts(2)["input_ids"][i : i + 1] for i in range(2)]
        found: list[Any] = []
        for _ in range(STEPS):
            for i, cache in enumerate(caches):
                with torch.no_grad():
                    logits = model(input_ids=tokens[i], past_key_values=cache, use_cache=True).logits[:, -1:]
                tokens[i] = logits.argmax(-1)
                found.append(logits.clone())
        return [*found, [_held(cache) for cache in caches]]

    _compare(run)
