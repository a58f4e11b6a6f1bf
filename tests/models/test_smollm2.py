"""SmolLM2-135M-Instruct with its real weights: greedy decoding, token by token what eager writes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.models import encode_chat, load_smollm2
from hetegen_compile.segments import inductor_compiler, plain_compiler
from tests.models.harness import Comparison, compiled_like_eager, emulated, through_inductor

QUESTIONS = ["What is the capital of France?", "Name three rivers, and say in which country each of them ends.", "Hi!"]
NEW_TOKENS = 32
BUDGET = "200MiB"
"""Of about 513 MiB. With it the cost model itself (split="auto") leaves rows on the host and streams others."""


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_smollm2()


def _answers_like_eager(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], cache: str | None, compiler: Any
) -> Comparison:
    def answer() -> list[Tensor]:
        return [_answer(model, inputs, cache) for inputs in batches]

    options = emulated(gpu_memory=BUDGET, split="auto")
    found = compiled_like_eager(model, answer, options=options, compiler=compiler)
    for answers in found.compiled:
        assert answers.shape[1] == NEW_TOKENS
        assert len(answers[0].unique()) > 8
    return found


def _answer(model: PreTrainedModel, inputs: dict[str, Tensor], cache: str | None) -> Tensor:
    tokens: Tensor = model.generate(  # type: ignore[operator]
        **inputs, cache_implementation=cache, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )
    return tokens[:, inputs["input_ids"].shape[1] :]


def test_two_prompts_one_after_the_other(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    batches = [encode_chat(tokenizer, [question]) for question in QUESTIONS[:2]]
    assert batches[0]["input_ids"].shape != batches[1]["input_ids"].shape
    found = _answers_like_eager(model, batches, None, plain_compiler)
    assert "Paris" in tokenizer.decode(found.compiled[0][0])


@through_inductor
def test_a_batch_of_different_lengths(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    inputs = encode_chat(tokenizer, QUESTIONS)
    assert len(inputs["attention_mask"].sum(1).unique()) == 3
    _answers_like_eager(model, [inputs], "static", inductor_compiler)
