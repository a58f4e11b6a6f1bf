"""A small split-Linear schedule, as the compiler would bind it, and its eager reference."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import Accelerator, Op

WIDTH = 64
HOST_ROWS = 16


def make_weights(layers: int) -> list[torch.Tensor]:
    """Random square weights, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(layers)]


def run_eager(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The reference: Linear and tanh per layer."""
    for weight in weights:
        x = torch.tanh(F.linear(x, weight))
    return x


@dataclass
class SplitLayers:
    """Every layer split by rows between host and accelerator, prefetched through a ring of two slots."""

    accelerator: Accelerator
    weights: list[torch.Tensor]

    def __post_init__(self) -> None:
        rows = WIDTH - HOST_ROWS
        nbytes = rows * WIDTH * 4
        self.accelerator.reserve_ring(2 * nbytes)
        self.slots = [self.accelerator.slot(i * nbytes, (rows, WIDTH), torch.float32) for i in range(2)]

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One forward: prefetch, to_host, both parts, to_accelerator, join, release."""
        acc = self.accelerator
        acc.begin_step()
        value = acc.upload(Op("x"), x)
        tokens: list[object] = []
        for i, weight in enumerate(self.weights):
            slot, after = self.slots[i % 2], tokens[-2:-1]
            fetched = acc.prefetch(Op(f"w{i}", category="weights"), weight[HOST_ROWS:], slot, after)
            down = acc.to_host(Op(f"xh{i}"), value)
            part = acc.launch(Op(f"yd{i}"), F.linear, (value, acc.wait(Op(f"ww{i}"), fetched)))
            tokens.append(acc.release(Op(f"r{i}"), fetched))
            host_x = acc.wait_host(Op(f"wx{i}"), down)
            host_y = acc.host(Op(f"yh{i}"), F.linear, (host_x, weight[:HOST_ROWS]), {})
            (up,) = acc.wait(Op(f"wy{i}"), acc.to_accelerator(Op(f"ya{i}"), [host_y]))
            value = acc.launch(Op(f"y{i}"), _join, ([up, part], -1))
        result = acc.download(Op("out"), value)
        acc.end_step()
        return result


def _join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return torch.tanh(torch.cat(parts, dim))
