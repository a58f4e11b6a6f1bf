"""Caches that the user makes and keeps between calls of ``generate()``, and those that only ``generate()`` knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import Cache

from tests.models.architectures import prompts, tiny_model
from tests.models.harness import RecordingBackend, compiled_like_eager, emulated, half_the_weights

TOKENS = 4
LONGEST = 40


def _answer(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    found: Tensor = model.generate(tokens, **{**lengths, **options})  # type: ignore[operator]
    return found


def _contents(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def _quantized(cache: Any) -> list[tuple[Any, Tensor]]:
    """Shape, type and scale of the keys: a rounding of theirs may go the other way."""
    return [((states.shape, states.dtype), scale) for states, scale in (one._quantized_keys for one in cache.layers)]


def _budget(model: PreTrainedModel) -> int:
    return half_the_weights(model) * 13 // 10


def _dynamic(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def _static(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=LONGEST)


@pytest.mark.parametrize(("architecture", "make"), [("gemma3", _static), ("mistral", _dynamic)])
def test_a_conversation_on_one_cache(architecture: str, make: Callable[[PreTrainedModel], Cache]) -> None:
    """Each turn is the whole conversation so far; the cache knows all but the last few tokens of it.

    Gemma 3's second layer is full, as all of Llama's are.
    """
    model = tiny_model(architecture, layers=2 if architecture == "gemma3" else 1)
    turns = [prompts(1)["input_ids"][:, :length] for length in (7, 3, 1)]

    def run() -> list[Any]:
        cache, conversation, found = make(model), turns[0][:, :0], []
        for turn in turns:
            conversation = _answer(model, torch.cat([conversation, turn], 1), past_key_values=cache)
            found += [conversation, _contents(cache)]
        return found

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model)))
    assert len(found.eager[-2].unique()) >= 5


def test_a_prompt_that_many_answers_start_from() -> None:
    """The prompt's cache is computed once, repeated for two answers, then cut back to what it was."""
    model, tokens = tiny_model("llama", layers=1), prompts(1)["input_ids"]

    def run() -> list[Any]:
        cache = _dynamic(model)
        with torch.no_grad():
            model(tokens[:, :-2], past_key_values=cache, use_cache=True)
        one = _answer(model, tokens, past_key_values=cache)
        cache.crop(-(cache.get_seq_length() - tokens.shape[1] + 2))
        other = _answer(model, tokens[:, 2:].flip(1).repeat(1, 2)[:, : tokens.shape[1]], past_key_values=cache)
        cache.crop(-TOKENS)
        cache.batch_repeat_interleave(2)
        return [one, other, _answer(model, other[:, :-1].repeat(2, 1), past_key_values=cache), _contents(cache)]

    compiled_like_eager(model, run, options=emulated(gpu_memory=_budget(model)))


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="older transformers quantize caches with other packages only"
)
def test_a_quantized_cache_and_beams() -> None:
    """Keys and values in 8 bits, with scales that the first call measured."""
    model = tiny_model("llama", layers=1)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "num_beams": 2}

    def run() -> list[Any]:
        found = model.generate(  # type: ignore[operator]
            **prompts(2), **options, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True
        )
        assert isinstance(found.past_key_values, QuantizedCache)
        return [found.sequences, _quantized(found.past_key_values)]

    compiled_like_eager(model, run, options=emulated(gpu_memory=7 * half_the_weights(model) // 4))


def _named(name: str, **config: str) -> Callable[[PreTrainedModel], dict[str, Any]]:
    return lambda model: {"cache_implementation": name, **({"cache_config": dict(config)} if config else {})}


REFUSED: list[Callable[[PreTrainedModel], dict[str, Any]]] = [
    _named("offloaded"),
    _named("offloaded_static"),
    _named("offloaded_hybrid"),
    _named("quantized", backend="quanto"),
    _named("quantized", backend="hqq"),
    lambda model: {"past_key_values": DynamicCache(config=model.config, offloading=True)},
    lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=LONGEST, offloading=True)},
]
ERRORS = (RuntimeError, AssertionError, ValueError, ImportError)


def test_caches_that_eager_refuses() -> None:
    """transformers offloads caches of models on a GPU only, and quantizes with packages that are not here.

    Dynamo, where it meets the refusal, quotes it.
    """
    model, backend, tokens = tiny_model("llama", layers=1), RecordingBackend(), prompts(1)["input_ids"]
    reasons = []
    for options in REFUSED:
        with pytest.raises(ERRORS) as eager:
            _answer(model, tokens, **options(model))
        reasons.append(str(eager.value))
    expected = _answer(model, tokens)
    model.compile(backend=backend, options=emulated(gpu_memory=_budget(model)))
    for options, reason in zip(REFUSED, reasons, strict=True):
        with pytest.raises(ERRORS, match=re.escape(reason)):
            _answer(model, tokens, **options(model))
    assert torch.equal(_answer(model, tokens), expected), "generation with another cache goes on"
    assert backend.graphs
