"""Causal language models with random weights, made in seconds: no download, no slow initialisation.

Weights are drawn once and laid out again and again, scaled as a Linear's usual initialisation; nothing is learned, so
their tokens mean nothing. Speed and memory do not depend on that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hetegen_compile.errors import UnsupportedModelError

_TILE = (1 << 24) - 3
"""Random numbers that are drawn at most; prime, so that rows of a matrix differ."""


def random_model(config: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model in evaluation mode on the host, tied weights tied."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    _compute_buffers(model, config)
    fill(model, seed)
    model.generation_config.eos_token_id = None
    return model


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Random matrices of variance 1/columns; scales of norms 1, biases 0."""
    longest = max((parameter.numel() for parameter in model.parameters()), default=0)
    tile = torch.randn(min(_TILE, longest), generator=torch.Generator().manual_seed(seed))
    scaled: dict[tuple[float, torch.dtype], Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        key = parameter.shape[-1] ** -0.5, parameter.dtype
        if key not in scaled:
            scaled[key] = (tile * key[0]).to(key[1])
        for part in parameter.view(-1).split(len(tile)):
            part.copy_(scaled[key][: part.numel()])


def _compute_buffers(model: nn.Module, config: Any) -> None:
    """Buffers that a module computes when it is made (rotary frequencies) got lost on meta: made anew.

    So is all of a module without parameters, which may keep the same tensors under other names; of others, which have
    the model's weights, the buffers alone.
    """
    for name, module in list(model.named_modules()):
        if next(module.buffers(recurse=False), None) is None:
            continue
        try:
            fresh = type(module)(config)
        except TypeError as error:
            raise UnsupportedModelError(f"random weights: the buffers of {name} cannot be computed: {error}") from error
        if next(module.parameters(), None) is None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, fresh.eval())
        else:
            module._buffers.update(fresh.named_buffers(recurse=False))
