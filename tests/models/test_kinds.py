"""Models that are not plain decoders: encoders and decoders, encoders alone, recurrences, mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.models.architectures import prompts
from tests.models.harness import compiled_like_eager, emulated, half_the_weights

TOKENS = 5
SIZES: dict[str, Any] = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, **HEADS, **SIZES}


def _t5() -> PreTrainedModel:
    sizes: dict[str, Any] = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "decoder_start_token_id": 1}
    model: PreTrainedModel = T5ForConditionalGeneration(T5Config(num_layers=1, **sizes, **SIZES))
    return model


def _bart() -> PreTrainedModel:
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
    sizes: dict[str, Any] = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    layers: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "forced_eos_token_id": None}
    sizes["max_position_embeddings"] = 64
    return BartForConditionalGeneration(BartConfig(**layers, **heads, **sizes, **SIZES))


def _lfm2() -> PreTrainedModel:
    """Short convolutions, whose states are shifted in place, and attention."""
    kinds = ["conv", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(num_hidden_layers=2, layer_types=kinds, block_multiple_of=8, **WIDTHS))


def _mixtral() -> PreTrainedModel:
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, **experts, **WIDTHS))


def _falcon_h1() -> PreTrainedModel:
    """A state space and attention beside each other in a layer."""
    space: dict[str, Any] = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    return FalconH1ForCausalLM(FalconH1Config(num_hidden_layers=1, mamba_chunk_size=8, **space, **WIDTHS))


def _whisper() -> PreTrainedModel:
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
    sizes: dict[str, Any] = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 8}
    layers: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 16}
    tokens: dict[str, Any] = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(
        WhisperConfig(max_target_positions=32, **layers, **heads, **sizes, **tokens, **SIZES)
    )


def _scaled(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


@pytest.mark.parametrize(("make", "budget"), [(_t5, 0.33), (_bart, 0.4), (_lfm2, 0.5), (_mixtral, 0.2)])
def test_generates_what_eager_generates(make: Callable[[], PreTrainedModel], budget: float) -> None:
    """A padded batch; encoder and decoder models have caches of their cross attention.

    ``budget`` is a share of the weights; experts are no Linears (one tensor holds all of a layer) and lie on the host.
    """
    model = _scaled(make)

    def run() -> Any:
        found = model.generate(  # type: ignore[operator]
            **prompts(2), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return [found.sequences, torch.stack(found.logits)]

    gpu_memory = round(2 * half_the_weights(model) * budget)
    found = compiled_like_eager(model, run, options=emulated(gpu_memory=gpu_memory))
    assert found.eager[1].std(0).max() > 0.01, "each step has other logits"


def test_states_of_other_batches_from_call_to_call() -> None:
    """One prompt, then two with padding on the left: states and caches begin anew."""
    model = _scaled(_falcon_h1)
    lengths: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def run() -> list[Any]:
        return [model.generate(**prompts(batch), **lengths) for batch in (1, 2)]  # type: ignore[operator]

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=3 * half_the_weights(model) // 2))
    assert len(found.eager[1][:, -3:].unique()) >= 3


def test_what_hears() -> None:
    """Whisper generates through a method of its own; its decoder's cross attention is cached."""
    model = _scaled(_whisper)
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))

    def run() -> Any:
        found = model.generate(  # type: ignore[operator]
            features, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        return [found.sequences, torch.stack(found.logits)]

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model) * 3 // 4))
    assert found.eager[1].std(0).max() > 0.01


def test_an_encoder_with_sentences_of_different_length() -> None:
    layers: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = BertConfig(hidden_size=64, intermediate_size=128, vocab_size=256, **layers)
    model = _scaled(lambda: BertModel(config))

    def run() -> Any:
        generator = torch.Generator().manual_seed(1)
        found = []
        for batch, length in ((1, 5), (3, 9), (2, 4)):
            tokens = torch.randint(2, 256, (batch, length), generator=generator)
            mask = torch.ones_like(tokens)
            mask[-1, length - 2 :] = 0
            with torch.no_grad():
                found.append(model(input_ids=tokens, attention_mask=mask).last_hidden_state)
        return found

    compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model)))
