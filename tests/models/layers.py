"""A model of equal layers of any kind, each added to what goes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Layers(nn.Module):
    """Results stay of one size, so that many layers can be compared with eager."""

    def __init__(self, layer: Callable[[], nn.Module], count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as ``x``."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


__all__ = ["Layers"]
