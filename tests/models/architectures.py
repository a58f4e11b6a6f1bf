"""Tiny models of each architecture with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 256
PROMPT = 7
WINDOW = 8
"""Tokens of the sliding windows: more than the prompt, fewer than prompt and answer."""
WEIGHT_SCALE = 6
"""Matrices are scaled up by this: with small random weights every token would be the same."""

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCABULARY}
_GEMMA: dict[str, Any] = {"head_dim": 16, "sliding_window": WINDOW, "tie_word_embeddings": False}
"""Gemma multiplies embeddings by sqrt(hidden size): with a tied head, random weights repeat the last token."""


def _gpt2(layers: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=layers, n_head=4, n_positions=64, **_TOKENS))


def _opt(layers: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64}
    return OPTForCausalLM(OPTConfig(num_hidden_layers=layers, max_position_embeddings=64, **sizes, **_TOKENS))


def _sizes(layers: int) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, **heads, **_TOKENS}


def _llama(layers: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **_sizes(layers)))


def _qwen2(layers: int) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_sizes(layers)))


def _mistral(layers: int) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **_sizes(layers)))


def _gemma2(layers: int) -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**_GEMMA, **_sizes(layers)))


def _gemma3(layers: int) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * layers
    return Gemma3ForCausalLM(Gemma3TextConfig(layer_types=kinds[:layers], **_GEMMA, **_sizes(layers)))


ARCHITECTURES: dict[str, Callable[[int], PreTrainedModel]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "opt": _opt,
    "qwen2": _qwen2,
}


def tiny_model(architecture: str, layers: int = 2, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in evaluation mode, the same weights at each call."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture](layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(WEIGHT_SCALE if parameter.dim() > 1 else 1)
    return model.to(dtype)  # type: ignore[no-any-return]


def prompts(batch: int) -> dict[str, Tensor]:
    """Random prompts [batch, 7]; each but the first is shorter by two tokens than the one before, padded left."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCABULARY, (batch, PROMPT), generator=generator)
    padding = 2 * torch.arange(batch)[:, None]
    mask = (torch.arange(PROMPT)[None, :] >= padding).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: str | None, tokens: int = 8) -> dict[str, Any]:
    """Greedy decoding: sequences, the logits of each step and what the cache holds afterwards.

    ``cache`` is ``generate``'s ``cache_implementation``; None is its default, the dynamic cache.
    """
    found = model.generate(  # type: ignore[operator]
        **inputs, cache_implementation=cache, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    layers = found.past_key_values.layers
    return {
        "sequences": found.sequences,
        "logits": torch.stack(found.logits),
        "cache": [(layer.keys, layer.values) for layer in layers],
    }
