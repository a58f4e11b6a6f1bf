"""Known shapes of causal language models, for random weights (``hetegen_compile.bench.weights``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from benchmarks import model_shapes
from benchmarks.model_shapes import llama, opt

_NO_END: dict[str, Any] = {"eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}

_CONFIGS: dict[str, dict[str, Any]] = {
    **model_shapes.SHAPES,
    "opt-tiny": {**opt(6, 512, 8), "vocab_size": 2048},
    "opt-125m": opt(12, 768, 12),
    "opt-1.3b": opt(24, 2048, 32),
    "llama-tiny": {**llama(6, 512, 1536, 8, 4), "vocab_size": 2048},
    "smollm2-135m": {**llama(30, 576, 1536, 9, 3), "vocab_size": 49152, "tie_word_embeddings": True},
}


def _config(values: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**values, **_NO_END)


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {name: partial(_config, each) for name, each in _CONFIGS.items()}
"""Sizes as published, by name; "tiny" ones are nobody's."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weight_bytes_of(shape: str, dtype: torch.dtype) -> int:
    """The same of a shape that has not been made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape]())
    count: int = sum(parameter.numel() for parameter in model.parameters())
    return count * dtype.itemsize
