"""Shapes of well-known models as transformers configs, at any depth, on meta and as captured forwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from hetegen_compile.dry_run.forwards import trace_generation
from hetegen_compile.dry_run.models import NamedModel, named_config, named_model, stated_dtype
from hetegen_compile.dry_run.planning import sizes_at, weight_bytes
from hetegen_compile.dry_run.trace import TracedGraph
from hetegen_compile.errors import UnsupportedModelError
from hetegen_compile.planning.planned import Sizes

Depth = int | Literal["full"]


def opt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """What config.json would say of an OPT model's shape."""
    return {
        "model_type": "opt", "num_hidden_layers": layers, "hidden_size": hidden, "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden, "num_attention_heads": heads, "max_position_embeddings": 2048,
    }  # fmt: skip


def llama(layers: int, hidden: int, intermediate: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    """The same of a Llama model."""
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "max_position_embeddings": 4096,
    }  # fmt: skip


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "opt-6.7b": opt(32, 4096, 32),
    "opt-13b": opt(40, 5120, 40),
    "opt-30b": opt(48, 7168, 56),
    "llama-2-7b": llama(32, 4096, 11008, 32, 32),
    "llama-2-13b": llama(40, 5120, 13824, 40, 40),
    "llama-2-70b": llama(80, 8192, 28672, 64, 8),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64),
}
"""What the models' config.json say of their shapes."""

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": None,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768,
        "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "norm_topk_prob": True,
        "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""The same of mixtures of experts."""

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PER_LAYER = ("layer_types", "mlp_layer_types")  # one entry a layer: made anew by the config
_PROMPT = 8  # sizes are set afterwards


@dataclass(frozen=True)
class Shape:
    """A model's config, cut to ``layers`` of its ``full_layers`` equal ones, with weights of ``dtype``."""

    name: str
    config: Any
    layers: int
    full_layers: int
    dtype: str = "float16"

    def full_weights(self) -> list[int]:
        """Bytes of each two-dimensional weight of the model at its own depth."""
        module = self._module(self.full_layers)
        return [w.numel() * w.element_size() for w in module.parameters() if w.dim() == 2]

    def full_bytes(self) -> int:
        """Bytes of the model's weights at its own depth."""
        return weight_bytes(self._module(self.full_layers))

    def decode(self, batch: int, context: int) -> tuple[TracedGraph, Sizes]:
        """The forward of one token of each sequence with a cache of ``context`` tokens."""
        fixed = not _grows(self.config)
        traced = trace_generation(self._named(self.layers), context if fixed else _PROMPT, batch, fixed=fixed)
        if traced.decode is None:
            raise UnsupportedModelError(f"{self.name} generates nothing, so it has no decode steps")
        graph = _only(traced.decode.graphs, self.name)
        return graph, graph.sizes if fixed else sizes_at(graph, traced.hint, context)

    def prefill(self, tokens: int) -> tuple[TracedGraph, Sizes]:
        """The forward of a prompt."""
        graph = _only(trace_generation(self._named(self.layers), tokens, 1, steps=False).prefill.graphs, self.name)
        return graph, graph.sizes

    def _module(self, layers: int) -> nn.Module:
        return self._named(layers).module

    def _named(self, layers: int) -> NamedModel:
        return named_model(_at_depth(self.config, layers), self.dtype)


def shape_of(source: str, depth: Depth, dtype: str | None = None) -> Shape:
    """The shape that a name in ``SHAPES`` or ``MIXTURES`` means, or a config.json, its folder or its model's id.

    Without ``dtype`` weights are of the type that the config states, float16 where it states none.

    Raises:
        UnsupportedModelError: there is no such shape or config, or one without a number of equal layers.
    """
    known = {**SHAPES, **MIXTURES}
    config = AutoConfig.for_model(**known[source]) if source in known else _config_of(source)
    key = _depth_key(config)
    if key is None:
        raise UnsupportedModelError(
            f"{source}: a config of type {config.model_type!r} states no number of layers ({', '.join(_DEPTH_KEYS)}); "
            "of a model for text and images give the part for text"
        )
    full = int(getattr(config, key))
    layers = full if depth == "full" else min(depth, full)
    return Shape(_name_of(source), config, layers, full, dtype or stated_dtype(config))


def _config_of(source: str) -> Any:
    try:
        return named_config(source)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error}. Shapes that are known here: {', '.join((*SHAPES, *MIXTURES))}"
        ) from error


def _name_of(source: str) -> str:
    path = Path(source)
    return path.resolve().parent.name if path.name == "config.json" else path.name.removesuffix(".json")


def _at_depth(config: Any, layers: int) -> Any:
    values = {**config.to_dict(), _depth_key(config): layers}
    for key in _PER_LAYER:
        values.pop(key, None)
    return type(config)(**values)


def _depth_key(config: Any) -> str | None:
    return next((key for key in _DEPTH_KEYS if hasattr(config, key)), None)


def _grows(config: Any) -> bool:
    """Whether every layer's cache keeps all tokens, so that its length can be a symbol."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def _only(graphs: list[TracedGraph], name: str) -> TracedGraph:
    if len(graphs) != 1:
        raise UnsupportedModelError(f"{name}: the forward breaks into {len(graphs)} graphs; shapes in one graph only")
    return graphs[0]
