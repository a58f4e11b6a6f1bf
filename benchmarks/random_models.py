"""Known shapes of causal language models, for random weights (``hetegen_compile.bench.weights``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

_NO_END: dict[str, Any] = {"eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}


def _opt(hidden: int, layers: int, heads: int, *, vocabulary: int = 50272, positions: int = 2048) -> PretrainedConfig:
    return OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        word_embed_proj_dim=hidden, vocab_size=vocabulary, max_position_embeddings=positions, **_NO_END,
    )  # fmt: skip


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, *, kv_heads: int, vocabulary: int, tied: bool = False
) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=2048,
        **_NO_END,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt-tiny": lambda: _opt(512, 6, 8, vocabulary=2048),
    "opt-125m": lambda: _opt(768, 12, 12),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "opt-13b": lambda: _opt(5120, 40, 40),
    "opt-30b": lambda: _opt(7168, 48, 56),
    "llama-tiny": lambda: _llama(512, 1536, 6, 8, kv_heads=4, vocabulary=2048),
    "smollm2-135m": lambda: _llama(576, 1536, 30, 9, kv_heads=3, vocabulary=49152, tied=True),
    "llama-2-7b": lambda: _llama(4096, 11008, 32, 32, kv_heads=32, vocabulary=32000),
    "llama-2-13b": lambda: _llama(5120, 13824, 40, 40, kv_heads=40, vocabulary=32000),
}
"""Sizes as published, by name; "tiny" ones are nobody's."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weight_bytes_of(shape: str, dtype: torch.dtype) -> int:
    """The same of a shape that has not been made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape]())
    count: int = sum(parameter.numel() for parameter in model.parameters())
    return count * dtype.itemsize
