"""What the models of a cycle are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.one_architecture import example_inputs

DECODED = 4
"""Tokens that a decoder is given in a forward."""


def batch_of(model: Any, kind: str, *, batch: int, length: int, padded: bool, seed: int) -> dict[str, Tensor]:
    """Prompts for ``generate``; padded ones are each a token shorter than the one before, at the left for decoders."""
    inputs: dict[str, Tensor] = example_inputs(model, kind, batch=batch, length=length, seed=seed)
    if padded and "attention_mask" in inputs:
        short = torch.arange(batch)[:, None].clamp(max=length - 1)
        places = torch.arange(length)[None]
        mask = (places >= short if kind == "causal" else places < length - short).long()
        inputs = {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}
    return inputs


def forward_inputs(model: Any, kind: str, *, batch: int, length: int, padded: bool, seed: int) -> dict[str, Tensor]:
    """The same for a forward: a decoder behind an encoder is given some tokens, too."""
    inputs = batch_of(model, kind, batch=batch, length=length, padded=padded, seed=seed)
    if kind in ("seq2seq", "speech"):
        inputs["decoder_input_ids"] = 5 + torch.arange(batch * DECODED).reshape(batch, DECODED)
    return inputs
