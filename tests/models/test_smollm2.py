"""SmolLM2-135M-Instruct with its real weights: greedy decoding, token by token what eager writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.models import encode_chat, load_smollm2
from hetegen_compile.segments import inductor_compiler, plain_compiler
from tests.models.harness import compiled_like_eager, emulated, through_inductor

QUESTIONS = ["What is the capital of France?", "Name three rivers, and say in which country each of them ends.", "Hi!"]
NEW_TOKENS = 32
BUDGET = "200MiB"
"""Of about 513 MiB."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_smollm2()[1]


@pytest.fixture
def model() -> PreTrainedModel:
    return load_smollm2()[0]


def _answers_like_eager(
    model: PreTrainedModel, inputs: dict[str, Tensor], cache: str | None, compiler: Callable[..., Any], **options: Any
) -> Tensor:
    def answer() -> Tensor:
        tokens: Tensor = model.generate(  # type: ignore[operator]
            **inputs, cache_implementation=cache, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        return tokens[:, inputs["input_ids"].shape[1] :]

    chosen = emulated(gpu_memory=BUDGET, **options)
    found = compiled_like_eager(model, answer, options=chosen, compiler=compiler)
    assert found.compiled.shape[1] == NEW_TOKENS
    assert len(found.compiled[0].unique()) > 10
    return found.compiled


def test_one_short_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = _answers_like_eager(model, encode_chat(tokenizer, QUESTIONS[:1]), None, plain_compiler, split="auto")
    assert "Paris" in tokenizer.decode(tokens[0])


@through_inductor
def test_a_longer_prompt_through_inductor(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    _answers_like_eager(model, encode_chat(tokenizer, QUESTIONS[1:2]), "static", inductor_compiler, split="auto")


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_of_different_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: str | None
) -> None:
    inputs = encode_chat(tokenizer, QUESTIONS)
    assert len(inputs["attention_mask"].sum(1).unique()) == 3
    _answers_like_eager(model, inputs, cache, plain_compiler, split="auto")
