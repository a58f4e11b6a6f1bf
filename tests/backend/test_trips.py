"""Linears that read the same activation share one trip down and one up: counted where it happens and in the report."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.backend.modules import random
from tests.models.harness import compiled_like_eager, emulated

WIDTH, LAYERS, STEPS = 64, 2, 3


class Block(nn.Module):
    """q, k and v from one activation, then an output Linear; gate and up from one, then down."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (WIDTH,))
        x = x + self.o(torch.tanh(self.q(h) * self.k(h)) + self.v(h))
        h = F.layer_norm(x, (WIDTH,))
        result: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return result


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_siblings_make_one_trip() -> None:
    torch.manual_seed(0)
    model = Stack().eval()

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [model(random(1, WIDTH, seed=seed)) for seed in range(STEPS)]

    found = compiled_like_eager(model, run, options=emulated(split=0.5, gpu_memory=64 << 10), calls=1)
    (schedule,) = found.schedules
    split = [row for row in schedule.rows if row.op == "linear" and row.host_share]
    assert len(split) == 7 * LAYERS
    trips = {row.trip for row in split}
    assert len(trips) == 4 * LAYERS, "q k v, o, gate up, down"
    assert schedule.explain().count("; one trip with ") == 5 * LAYERS
    counters = found.backend.accelerator.counters
    assert counters.trips_up == len(trips) * STEPS
    assert counters.trips_down == (len(trips) + 1) * STEPS, "the results come down as well"
