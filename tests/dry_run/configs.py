"""Small models of the usual architectures, on meta or in host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

MODELS: dict[str, tuple[Any, Any]] = {
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            hidden_size=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
            word_embed_proj_dim=64, max_position_embeddings=256,
        ),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, max_position_embeddings=256,
        ),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_positions=256)),
    "bert": (
        BertModel,
        BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=512,
            max_position_embeddings=256,
        ),
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        ),
    ),
}  # fmt: skip


def make(name: str, device: str) -> nn.Module:
    """A model of the architecture, in evaluation mode; the same random weights each time."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = cls(config)
    return model.eval()
