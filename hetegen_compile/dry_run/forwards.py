"""The two forwards of a generation, captured without running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetegen_compile.dry_run.fakes import Fakes
from hetegen_compile.dry_run.models import NamedModel
from hetegen_compile.dry_run.trace import TracedForward, trace
from hetegen_compile.errors import UnsupportedModelError
from hetegen_compile.passes.append_tokens import lies_by_token


@dataclass(frozen=True)
class TracedGeneration:
    """Both forwards of a model; ``hint`` is the length of the cache that decode was captured with.

    ``windows`` are the tokens in the caches of layers with a sliding window, which are fixed: 0, there are none.
    """

    prefill: TracedForward
    decode: TracedForward | None
    hint: int
    windows: int = 0


def trace_generation(
    named: NamedModel, prompt: int, batch: int, *, longest: int = 0, steps: bool = True, fixed: bool = False
) -> TracedGeneration:
    """Capture the forward of the prompt and that of one token, with the length of the cache as a symbol.

    Layers with a sliding window have as many tokens as of a ``longest`` cache (default: the prompt), a number. An
    encoder has the first forward only, and so has a generation without decode ``steps`` (of one token). With ``fixed``
    the cache is as the prompt leaves it, whatever its layers are, and its length is a number.

    Raises:
        UnsupportedModelError: a forward cannot be captured without running, or its cache is not one that grows.
    """
    fakes = Fakes()
    module = fakes.copy(named.module)
    kwargs: dict[str, Any] = {"input_ids": _tokens(fakes, batch, prompt)}
    if not named.generates:
        return TracedGeneration(trace(module, fakes, (), kwargs), None, prompt)
    kwargs["use_cache"] = True
    if named.takes("logits_to_keep"):
        kwargs["logits_to_keep"] = 1  # generate() asks for the last token's only
    prefill = trace(module, fakes, (), kwargs)
    if not steps:
        return TracedGeneration(prefill, None, prompt)
    cache = getattr(prefill.result, "past_key_values", None)
    if cache is None:
        raise UnsupportedModelError(f"{named.name} returns no cache, so its decode steps cannot be planned")
    hint, windows = (prompt, 0) if fixed else _lengthen(cache, prompt, max(longest, prompt), fakes, named)
    decode = trace(module, fakes, (), {**kwargs, "input_ids": _tokens(fakes, batch, 1), "past_key_values": cache})
    return TracedGeneration(prefill, decode, hint, windows)


def _tokens(fakes: Fakes, batch: int, tokens: int) -> Tensor:
    return fakes.of(torch.empty(batch, tokens, dtype=torch.long, device="meta"))


def _lengthen(cache: Any, prompt: int, longest: int, fakes: Fakes, named: NamedModel) -> tuple[int, int]:
    """Let the cache's length be a symbol, with windows as they are when it is longest.

    Returns its value in the capture, which is at least 2 (Dynamo takes 0 and 1 as they are), and the most tokens in a
    window, 0: there is none.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    hint, windows = max(2, prompt), 0
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None or layer.values is None:
            raise UnsupportedModelError(
                f"{named.name} has a cache of {type(layer).__name__}; decode steps are planned for caches that grow "
                "with each token (DynamicLayer) and their windows (DynamicSlidingWindowLayer) only: use "
                "hetegen_compile.plan(model, input_ids=..., past_key_values=...) for one step of it"
            )
        if type(layer) is DynamicSlidingWindowLayer:
            tokens = min(longest, layer.sliding_window - 1)
            layer.cumulative_length, windows = longest, max(windows, tokens)
            _resize(layer, tokens, fakes)
        else:
            _resize(layer, hint, fakes)
            for past in (layer.keys, layer.values):
                torch._dynamo.maybe_mark_dynamic(past, past.dim() - 2)
    return hint, windows


def _resize(layer: Any, tokens: int, fakes: Fakes) -> None:
    with fakes.mode:
        layer.keys, layer.values = _of_length(layer.keys, tokens), _of_length(layer.values, tokens)


def _of_length(past: Tensor, tokens: int) -> Tensor:
    shape = (*past.shape[:-2], tokens, past.shape[-1])
    return past.new_empty_strided(shape, past.stride()) if lies_by_token(past) else past.new_empty(shape)
