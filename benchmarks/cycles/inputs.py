"""What the models of a cycle are called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.one_architecture import ENCODED, example_inputs

LENGTHS = (1, 2, 3, 5, 7, 9, 12, 17, 33)
CACHES = (None, None, "static", "static", "dynamic", "sliding_window", "hybrid", "quantized")
"""Values of ``cache_implementation``."""
MADE = ("given dynamic", "given static")
"""Caches that the user makes."""
DECODED = 4
"""Tokens that a decoder is given in a forward."""


@dataclass(frozen=True)
class Habits:
    """What a cycle's user does again and again: the same graphs are then used in many ways."""

    shapes: Sequence[Mapping[str, Any]]
    caches: Sequence[str | None]

    @classmethod
    def of(cls, rng: Random) -> Habits:
        """Two shapes of prompts and two kinds of caches."""
        shapes = [
            {"batch": rng.choice([1, 1, 2, 3]), "length": rng.choice(LENGTHS), "padded": rng.random() < 0.5}
            for _ in range(2)
        ]
        return cls(shapes, [rng.choice(CACHES), rng.choice([*CACHES, *MADE, *MADE])])


def batch_of(model: Any, kind: str, *, batch: int, length: int, padded: bool, seed: int) -> dict[str, Tensor]:
    """Prompts for ``generate``; padded ones are each a token shorter than the one before, at the left for decoders."""
    inputs: dict[str, Tensor] = example_inputs(model, kind, batch=batch, length=length, seed=seed)
    if padded and kind not in ("speech", "vision"):
        short = torch.arange(batch)[:, None].clamp(max=length - 1)
        places = torch.arange(length)[None]
        mask = (places >= short if kind == "causal" else places < length - short).long()
        inputs = {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}
    return inputs


def forward_inputs(model: Any, kind: str, *, batch: int, length: int, padded: bool, seed: int) -> dict[str, Tensor]:
    """The same for a forward: a decoder behind an encoder is given some tokens, too."""
    inputs = batch_of(model, kind, batch=batch, length=length, padded=padded, seed=seed)
    if kind in ENCODED:
        inputs["decoder_input_ids"] = 5 + torch.arange(batch * DECODED).reshape(batch, DECODED)
    return inputs
