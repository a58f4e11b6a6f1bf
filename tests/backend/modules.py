"""Small modules with two Linears around whatever a test is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 64
BUDGET = 24 << 10
"""Bytes: holds slots, activations and half a weight or so; half of four Linears is 32 KiB."""

Linear = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """``body(before, after, *args)`` as a forward, ``before`` and ``after`` being two Linears each."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.before = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.after = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, *args: Any) -> Any:
        return self.body(self.before, self.after, *args)


def around(body: Callable[..., Any]) -> Around:
    """``Around`` in evaluation mode, with the same weights each time."""
    torch.manual_seed(0)
    return Around(body).eval()


def plain(before: Linear, after: Linear, x: Tensor) -> Tensor:
    """One after the other."""
    return after(before(x))


class Mlp(nn.Module):
    """``layers`` Linears of ``width`` with a ReLU after each."""

    def __init__(self, layers: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def random(*shape: int, seed: int = 1) -> Tensor:
    """Normal random numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
