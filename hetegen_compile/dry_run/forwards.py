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


@dataclass(frozen=True)
class TracedGeneration:
    """Both forwards of a model; ``hint`` is the length of the cache that decode was captured with."""

    prefill: TracedForward
    decode: TracedForward | None
    hint: int


def trace_generation(
    named: NamedModel, prompt: int, batch: int, *, steps: bool = True, fixed: bool = False
) -> TracedGeneration:
    """Capture the forward of the prompt and that of one token, with the length of the cache as a symbol.

    An encoder has the first only, and so has a generation without decode ``steps`` (of one token). With ``fixed`` the
    cache is as the prompt leaves it, whatever its layers are (windows, say), and its length is a number.

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
    hint = prompt if fixed else _make_dynamic(cache, prompt, fakes, named)
    decode = trace(module, fakes, (), {**kwargs, "input_ids": _tokens(fakes, batch, 1), "past_key_values": cache})
    return TracedGeneration(prefill, decode, hint)


def _tokens(fakes: Fakes, batch: int, tokens: int) -> Tensor:
    return fakes.of(torch.empty(batch, tokens, dtype=torch.long, device="meta"))


def _make_dynamic(cache: Any, prompt: int, fakes: Fakes, named: NamedModel) -> int:
    """Let the cache's length be a symbol; returns its value in the capture.

    That is at least 2: Dynamo takes 0 and 1 as they are.
    """
    from transformers.cache_utils import DynamicLayer

    hint = max(2, prompt)
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise UnsupportedModelError(
                f"{named.name} has a cache of {type(layer).__name__}; decode steps are planned for caches that grow "
                "with each token (DynamicLayer) only: use hetegen_compile.plan(model, input_ids=..., "
                "past_key_values=...) for one step of it"
            )
        with fakes.mode:
            layer.keys, layer.values = _of_length(layer.keys, hint), _of_length(layer.values, hint)
        for past in (layer.keys, layer.values):
            torch._dynamo.maybe_mark_dynamic(past, past.dim() - 2)
    return hint


def _of_length(past: Tensor, tokens: int) -> Tensor:
    return past.new_empty(*past.shape[:-2], tokens, past.shape[-1])
