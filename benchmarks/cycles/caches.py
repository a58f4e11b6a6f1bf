"""Caches that the user makes, keeps over several turns and changes in between."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache


def given_cache(model: Any, name: str, length: int, encoded: int | None) -> Any:
    """An empty cache for this model; two of them for a decoder behind an encoder that reads so many tokens."""
    config = model.config.get_text_config(decoder=True)

    def make(most: int | None) -> Any:
        if name == "given static" and most is not None:
            return StaticCache(config=config, max_cache_len=most)
        return DynamicCache(config=config)

    return EncoderDecoderCache(make(length), make(encoded)) if model.config.is_encoder_decoder else make(length)


def layers_of(cache: Any) -> list[Any]:
    """Layers with keys and values, those of the encoder behind the decoder's."""
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    layers = [layer for part in parts for layer in getattr(part, "layers", ())]
    return [layer for layer in layers if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel()]


def states_of(cache: Any) -> dict[str, Tensor]:
    """Copies of all that a cache holds: keys and values, and states of recurrent layers."""
    found = {}
    for i, layer in enumerate(layers_of(cache)):
        found[f"keys.{i}"], found[f"values.{i}"] = layer.keys.clone(), layer.values.clone()
    for i, layer in enumerate(getattr(cache, "layers", ())):
        for name in ("conv_states", "recurrent_states"):
            state = getattr(layer, name, None)
            if isinstance(state, Tensor):
                found[f"{name}.{i}"] = state.clone()
    return found


def _in_place(cache: Any) -> None:
    with torch.no_grad():
        for layer in layers_of(cache):
            layer.keys.mul_(0.5)


def _in_inference_mode(cache: Any) -> None:
    with torch.inference_mode():
        for layer in layers_of(cache):
            layer.values.mul_(0.5)


def _part(cache: Any) -> None:
    with torch.no_grad():
        for layer in layers_of(cache):
            layer.values[..., :1, :].zero_()


def _unseen(cache: Any) -> None:
    for layer in layers_of(cache):
        layer.keys.data.mul_(0.5)


def _replaced(cache: Any) -> None:
    for layer in layers_of(cache):
        layer.values = layer.values.clone() * 0.7


def _reordered(cache: Any) -> None:
    cache.reorder_cache(torch.arange(layers_of(cache)[0].keys.shape[0]).flip(0))


def _cropped(cache: Any) -> None:
    cache.crop(-2)


EDITS: dict[str, Callable[[Any], None]] = {
    "in place": _in_place, "in inference mode": _in_inference_mode, "a part": _part, "unseen": _unseen,
    "replaced": _replaced, "reordered": _reordered, "cropped": _cropped, "reset": lambda cache: cache.reset(),
}  # fmt: skip


def chosen_edit(rng: Random) -> str | None:
    """What happens to a cache between two turns; mostly nothing."""
    return rng.choice([None, None, None, *EDITS])
