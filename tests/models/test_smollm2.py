"""SmolLM2-135M-Instruct with its real weights: greedy decoding, token by token what eager writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from examples.models import encode_chat, load_smollm2
from hetegen_compile.steps.segments import inductor_compiler, plain_compiler
from tests.models.harness import (
    calls_of_torchs_layers,
    compiled_like_eager,
    emulated,
    half_the_weights,
    through_inductor,
)

QUESTIONS = ["What is the capital of France?", "Name three rivers, and say in which country each of them ends.", "Hi!"]
NEW_TOKENS = 16
FIRST = 6
"""Layers whose tokens are still many different ones; it takes all 30 to answer."""
SHARE = 0.39
"""Of the weights. With it the cost model itself (split="auto") leaves rows on the host and streams others."""


def _like_eager(
    model: PreTrainedModel, inputs: dict[str, Tensor], cache: str | None, compiler: Any
) -> tuple[Callable[[], Tensor], Tensor]:
    """The generation that was compared, and its tokens."""

    def answer() -> Tensor:
        tokens: Tensor = model.generate(  # type: ignore[operator]
            **inputs, cache_implementation=cache, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        return tokens[:, inputs["input_ids"].shape[1] :]

    options = emulated(gpu_memory=int(2 * half_the_weights(model) * SHARE), split="auto")
    found: Tensor = compiled_like_eager(model, answer, options=options, compiler=compiler).compiled
    assert found.shape[1] == NEW_TOKENS
    assert all(len(row.unique()) > 8 for row in found)
    return answer, found


def test_the_first_layers_with_one_prompt_and_a_static_cache() -> None:
    model, tokenizer = load_smollm2()
    del model.model.layers[FIRST:]
    model.config.num_hidden_layers = FIRST
    _like_eager(model, encode_chat(tokenizer, QUESTIONS[:1]), "static", plain_compiler)


@through_inductor
def test_a_batch_of_longer_and_shorter_prompts_through_inductor() -> None:
    """Nothing is written, the cache grows: from the second call on torch's layers are not called."""
    model, tokenizer = load_smollm2()
    inputs = encode_chat(tokenizer, QUESTIONS)
    assert len(inputs["attention_mask"].sum(1).unique()) == len(QUESTIONS) == 3
    answer, tokens = _like_eager(model, inputs, None, inductor_compiler)
    assert "Paris" in tokenizer.decode(tokens[0])
    assert torch.equal(answer(), tokens)  # with what the decode steps have decided to keep the prompt is planned anew
    with calls_of_torchs_layers() as calls:
        assert torch.equal(answer(), tokens)
    assert calls.call_count == 0
