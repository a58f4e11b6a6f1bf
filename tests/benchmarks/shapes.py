"""Shapes that are wide enough to be worth splitting and shallow enough to be planned in a second."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from benchmarks.model_shapes import Shape

_WIDTHS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
        "vocab_size": 4096, "max_position_embeddings": 2048,
    },
    "opt": {
        "hidden_size": 3584, "ffn_dim": 14336, "num_attention_heads": 28, "word_embed_proj_dim": 3584,
        "vocab_size": 4096, "max_position_embeddings": 2048,
    },
}  # fmt: skip


_WIDTHS["gptj"] = {"n_embd": 3072, "n_head": 12, "rotary_dim": 64, "vocab_size": 4096}
_WIDTHS["falcon"] = {"hidden_size": 4544, "num_attention_heads": 71, "alibi": False, "bias": False, "vocab_size": 65024}
_WIDTHS["phi"] = {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32, "vocab_size": 4096}
_WIDTHS["mistral"] = _WIDTHS["llama"]
_WIDTHS["mixtral"] = {**_WIDTHS["llama"], "num_local_experts": 16, "sliding_window": None}


def config(model_type: str, layers: int = 4, full_layers: int = 32, **changes: Any) -> Shape:
    """Some layers of a model that the benchmark does not name; ``changes`` are the config's."""
    found = AutoConfig.for_model(model_type, num_hidden_layers=full_layers, **{**_WIDTHS[model_type], **changes})
    return Shape(model_type, found, layers, full_layers)
