"""Mixtures of experts whose experts are stacked in one parameter and exceed the budget: they run, as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import hetegen_compile
from tests.models.architectures import VOCABULARY, WEIGHT_SCALE, generate, prompts
from tests.models.harness import RecordingBackend, emulated, new_schedules

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip

MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=16, **_SIZES)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=16, moe_intermediate_size=64, **_SIZES)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=16, **_SIZES)),
}


def mixture(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = MIXTURES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(WEIGHT_SCALE if parameter.dim() > 1 else 1)
    return model


def test_a_stack_that_stays_goes_up_once() -> None:
    """Prefill and decode agree on it, in this generation and the next."""
    model = mixture("mixtral")
    stacks = [p.nbytes for p in model.parameters() if p.dim() == 3]
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    options = {"gpu_memory": 400 << 10, "context": 12}
    model.compile(backend=backend, options=emulated(split="auto", **options))
    uploaded = []
    for _ in range(2):
        generate(model, prompts(2), None, tokens=3)
        uploaded.append(backend.accelerator.counters.uploaded_bytes["weights"])
    schedules = new_schedules(known)
    assert len(schedules) >= 2
    assert {schedule.streamed_bytes for schedule in schedules} == {0}, "so that all uploads are of what stays"
    assert {schedule.resident_bytes for schedule in schedules} == {uploaded[0]}
    assert min(stacks) < uploaded[0] < sum(p.nbytes for p in model.parameters())
    assert uploaded[1] == uploaded[0]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_beyond_the_budget_are_computed_on_the_host(name: str) -> None:
    model = mixture(name)
    experts = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 3)
    budget = experts // 2
    expected = generate(model, prompts(2), None, tokens=3)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split="auto"))
    found = generate(model, prompts(2), None, tokens=3)
    assert torch.equal(found["sequences"], expected["sequences"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert 0 < backend.accelerator.counters.peak_bytes <= budget < experts
    schedules = new_schedules(known)
    assert schedules
    for schedule in schedules:
        assert schedule.resident_bytes, "Linears go first"
        assert "stacked weights do not fit" in schedule.explain()
        assert "not offloaded" not in schedule.title
