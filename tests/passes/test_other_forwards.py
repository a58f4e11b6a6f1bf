"""What a captured prefill says of other forwards is what these take when they are captured themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetegen_compile.passes.context import Context
from hetegen_compile.passes.other_forwards import Forward, OtherForwards
from tests.passes.graphs import case

HEADS, WIDTH, PROMPT, LENGTH = 4, 16, 8, 40
PROJECT = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _repeated(heads: Tensor) -> Tensor:
    sequences, number, length, width = heads.shape
    wide = heads[:, :, None].expand(sequences, number, HEADS // number, length, width)
    return wide.reshape(sequences, HEADS, length, width)


def fused(query: Tensor, keys: Tensor, values: Tensor, masked: bool) -> Tensor:
    """As transformers calls it: grouped without a mask, repeated under one."""
    if not masked:
        causal = query.shape[2] > 1
        return F.scaled_dot_product_attention(query, keys, values, is_causal=causal, enable_gqa=True)
    mask = torch.ones(query.shape[0], 1, query.shape[2], keys.shape[2], dtype=torch.bool)
    return F.scaled_dot_product_attention(query, _repeated(keys), _repeated(values), mask)


def step_by_step(query: Tensor, keys: Tensor, values: Tensor, masked: bool) -> Tensor:
    """Attention as products and a softmax."""
    scores = query @ _repeated(keys).transpose(2, 3) * 0.25
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ _repeated(values)


def _layer(x: Tensor, past: list[Tensor], heads: int, attend: Attend, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    sequences, tokens, _ = x.shape
    query = PROJECT(x).view(sequences, tokens, HEADS, WIDTH).transpose(1, 2)
    new = PROJECT(x)[..., : heads * WIDTH].reshape(sequences, tokens, heads, WIDTH).transpose(1, 2)
    keys, values = (torch.cat([before, new * 2], -2) for before in past)
    out = attend(query, keys, values, masked)
    return keys, values, PROJECT(out.transpose(1, 2).reshape(sequences, tokens, -1))
