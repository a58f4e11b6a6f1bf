"""SmolLM2-135M-Instruct with its real weights: greedy decoding, token by token what eager writes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.models import encode_chat, load_smollm2
from hetegen_compile.steps.segments import inductor_compiler, plain_compiler
from tests.models.harness import compiled_like_eager, emulated, through_inductor

QUESTIONS = ["What is the capital of France?", "Name three rivers, and say in which country each of them ends.", "Hi!"]
NEW_TOKENS = 16
BUDGET = "200MiB"
"""Of about 513 MiB. With it the cost model itself (split="auto") leaves rows on the host and streams others."""


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_smollm2()


def _answers_like_eager(model: PreTrainedModel, inputs: dict[str, Tensor], cache: str | None, compiler: Any) -> Tensor:
    def answer() -> Tensor:
        tokens: Tensor = model.generate(  # type: ignore[operator]
            **inputs, cache_implementation=cache, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        return tokens[:, inputs["input_ids"].shape[1] :]

    options = emulated(gpu_memory=BUDGET, split="auto")
    found: Tensor = compiled_like_eager(model, answer, options=options, compiler=compiler).compiled
    assert found.shape[1] == NEW_TOKENS
    assert all(len(row.unique()) > 8 for row in found)
    return found


def test_one_prompt(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    tokens = _answers_like_eager(model, encode_chat(tokenizer, QUESTIONS[:1]), None, plain_compiler)
    assert "Paris" in tokenizer.decode(tokens[0])


@through_inductor
def test_a_batch_of_longer_and_shorter_prompts(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    inputs = encode_chat(tokenizer, QUESTIONS)
    assert len(inputs["attention_mask"].sum(1).unique()) == len(QUESTIONS) == 3
    _answers_like_eager(model, inputs, "static", inductor_compiler)
