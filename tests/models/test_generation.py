"""``generate()`` in the ways that people call it: the same tokens as eager, one small model, many options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hetegen_compile.backend import make_backend
from hetegen_compile.steps.segments import plain_compiler
from tests.models.architectures import VOCABULARY, prompts, tiny_model
from tests.models.harness import assert_like_eager, compiled_like_eager, emulated, half_the_weights

TOKENS = 6


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return model.generate(**inputs, **{**lengths, **options})  # type: ignore[operator]


def _compare(run: Callable[[PreTrainedModel], Any], architecture: str = "llama", **tuning: Any) -> Any:
    model = tiny_model(architecture, layers=1)
    options = emulated(gpu_memory=half_the_weights(model) * 13 // 10)
    return compiled_like_eager(model, lambda: run(model), options=options, **tuning)


OPTIONS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 50, "top_p": 0.95, "temperature": 1.3, "repetition_penalty": 1.2},
    "beams": {"num_beams": 2, "num_return_sequences": 2, "cache_implementation": "static"},
    "beams that move in a dynamic cache": {"num_beams": 2, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any]) -> None:
    alone = {"prefill_chunk_size", "num_beams", "use_cache"} & options.keys()  # else the second prompt is padded
    batch = 1 if alone else 2
    found = _compare(lambda model: _generate(model, prompts(batch), **options))
    assert len(found.eager[:, -TOKENS:].unique()) >= 3


def test_prompt_lookup() -> None:
    repeated = prompts(1)["input_ids"].repeat(1, 2)
    _compare(lambda model: _generate(model, {"input_ids": repeated}, prompt_lookup_num_tokens=3))


def test_assisted() -> None:
    """The assistant is compiled, too: two models share the accelerator and take turns."""
    assistant = tiny_model("llama", layers=1)
    for parameter in assistant.parameters():  # it is right now and then
        parameter.data.add_(torch.randn_like(parameter) * 0.01 * parameter.std())
    options = emulated(gpu_memory=2 * half_the_weights(assistant))
    assistant.compile(backend=make_backend(plain_compiler), options=options)
    model = tiny_model("llama", layers=1)
    compiled_like_eager(
        model,
        lambda: _generate(model, prompts(1), assistant_model=assistant),
        options=emulated(gpu_memory=half_the_weights(model)),
    )


def test_hidden_states_and_attentions() -> None:
    def run(model: PreTrainedModel) -> Any:
        model.set_attn_implementation("eager")
        flags = {"output_hidden_states": True, "output_attentions": True, "output_scores": True}
        found = _generate(model, prompts(2), return_dict_in_generate=True, **flags)
        return [found.sequences, list(found.scores), list(found.hidden_states), list(found.attentions)]

    assert all(len(steps) > 0 for steps in _compare(run).compiled)


def test_embeddings_as_a_prompt() -> None:
    def run(model: PreTrainedModel) -> Any:
        inputs = prompts(2)
        embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
        return _generate(model, {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]})

    _compare(run)


class _AtToken(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._length)


class _Keep(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.clone())

    def end(self) -> None:
        self.pieces.append(torch.tensor(-1))


def test_stopping_criteria_and_a_streamer() -> None:
    def run(model: PreTrainedModel) -> Any:
        streamer = _Keep()
        tokens = _generate(
            model, prompts(1), streamer=streamer, stopping_criteria=[_AtToken(10)], min_new_tokens=None,
            max_new_tokens=9,
        )  # fmt: skip
        return [tokens, streamer.pieces]

    found = _compare(run)
    assert found.compiled[0].shape[1] == 10
    assert len(found.compiled[1]) == 1 + 3 + 1


def _different_prompts() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for batch, length in ((1, 5), (2, 9)):
        yield {"input_ids": torch.randint(2, VOCABULARY, (batch, length), generator=generator)}


@pytest.mark.parametrize("cache", [None, "static"])
def test_calls_in_a_row_with_different_prompts(cache: str | None) -> None:
    _compare(lambda model: [_generate(model, p, cache_implementation=cache) for p in _different_prompts()])


@pytest.mark.parametrize("cache", [None, "static"])
def test_in_inference_mode(cache: str | None) -> None:
    def run(model: PreTrainedModel) -> Any:
        with torch.inference_mode():
            return _generate(model, prompts(2), cache_implementation=cache)

    _compare(run)


def test_loss() -> None:
    def run(model: PreTrainedModel) -> Any:
        inputs = prompts(2)
        with torch.no_grad():
            found = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        return [found.loss, found.logits]

    _compare(run)


def test_a_batch_of_padded_prompts_is_each_prompt_by_itself() -> None:
    def run(model: PreTrainedModel) -> Any:
        return _generate(model, prompts(3))

    found = _compare(run)
    model = tiny_model("llama", layers=1)
    inputs = prompts(3)
    for row, (tokens, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        alone = _generate(model, {"input_ids": tokens[mask.bool()][None]})
        assert_like_eager(found.compiled[row, -TOKENS:], alone[0, -TOKENS:])
