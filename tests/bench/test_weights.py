"""Random weights, and generations that are timed token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTJConfig, PretrainedConfig

from benchmarks.random_models import SHAPES, weight_bytes_of
from hetegen_compile.bench import timing
from hetegen_compile.bench.weights import parameter_bytes, random_model


def test_a_generation_is_timed_token_by_token() -> None:
    model = random_model(SHAPES["opt-tiny"](), torch.float32)
    found = timing.generate_timed(model, torch.arange(4, 8)[None], 5, "dynamic")
    assert len(found.tokens) == 5
    assert len(found.steps_s) == 4
    assert 0 < found.step_s == sorted(found.steps_s)[1] / 2 + sorted(found.steps_s)[2] / 2


SMALL: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}


# transformers 5.17 scripts a function of GPTBigCode
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("config", [GPTJConfig(**SMALL, rotary_dim=8), GPTBigCodeConfig(**SMALL)])
def test_modules_with_buffers_and_weights_keep_their_weights(config: PretrainedConfig) -> None:
    model = random_model(config, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings
    assert not any(tensor.is_meta for tensor in (*model.buffers(), *model.parameters()))
    with torch.no_grad():
        assert model(torch.arange(4, 12)[None]).logits.float().isfinite().all()


@pytest.mark.parametrize("shape", ["opt-tiny", "llama-tiny"])
def test_random_models_are_whole(shape: str) -> None:
    """Every weight and buffer has its values, and what is tied stays tied."""
    model = random_model(SHAPES[shape](), torch.bfloat16)
    assert parameter_bytes(model) == weight_bytes_of(shape, torch.bfloat16)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert {buffer.device.type for buffer in model.buffers()} <= {"cpu"}
    with torch.no_grad():
        logits = model(torch.arange(4, 12)[None]).logits.float()
    assert logits.isfinite().all()
    assert logits.std(dim=-1).min() > 0.1
    assert len(logits[0].argmax(-1).unique()) > 2, "not the same token everywhere"
