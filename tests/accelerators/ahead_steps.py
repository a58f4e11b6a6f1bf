"""A step of layers whose host parts are the worker's, on any accelerator, and what eager makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import Accelerator, Op, StepFacts
from tests.accelerators.schedules import HOST_ROWS, WIDTH, make_weights, run_eager

LIKE = [torch.empty(2, HOST_ROWS, device="meta")]


def join(host: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A layer's output."""
    return torch.tanh(torch.cat([host, part], dim=-1))


def step(acc: Accelerator, weights: list[torch.Tensor], x: torch.Tensor, linear: Any = F.linear) -> torch.Tensor:
    """Every layer split; the host's rows are the worker's."""
    value = acc.upload(Op("x"), x)
    sent: list[Any] = []
    for i, weight in enumerate(weights):
        down = acc.to_host(Op(f"xh{i}"), [value])
        if i >= 2:
            acc.caught_up(Op(f"c{i}"), sent[i - 2])
        received = acc.receive(Op(f"wx{i}"), down)
        part_of_host = acc.host_ahead(Op(f"yh{i}"), linear, (received[0], weight[:HOST_ROWS]), {})
        sent.append(acc.deliver(Op(f"ya{i}"), [part_of_host], LIKE))
        rows = acc.upload(Op(f"w{i}"), weight[HOST_ROWS:])
        part = acc.launch(Op(f"yd{i}"), F.linear, (value, rows))
        (up,) = acc.wait(Op(f"wy{i}"), sent[i])
        value = acc.launch(Op(f"y{i}"), join, (up, part))
    return acc.download(Op("out"), value)


def run(acc: Accelerator, layers: int = 4, *, again: bool = True, **options: Any) -> torch.Tensor:
    acc.begin_step(facts=StepFacts(again=again))
    result = step(acc, make_weights(layers), torch.ones(2, WIDTH), **options)
    acc.end_step()
    return result


def expected(layers: int = 4) -> torch.Tensor:
    return run_eager(make_weights(layers), torch.ones(2, WIDTH))
