"""Peak bytes of values: what the graph makes, from its maker to its last reader, views counted once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hetegen_compile.passes.liveness import activation_peak_bytes
from tests.passes.graphs import case

N = 1000 * 4  # bytes of one float32 tensor of 1000


def three_alive(x: Tensor) -> Tensor:
    a, b = x + 1, x + 2
    return a + b


def chain(x: Tensor) -> Tensor:
    for _ in range(5):
        x = x + 1
    return x


def alive_to_the_end(x: Tensor) -> tuple[Tensor, Tensor]:
    early = x + 1
    return chain(x), early


@pytest.mark.parametrize(
    ("function", "peak"),
    [
        (lambda x: x + 1, N),
        (chain, 2 * N),  # an operand and its result
        (three_alive, 3 * N),
        (alive_to_the_end, 3 * N),
        (lambda x: x.view(10, 100).t(), 0),  # inputs and their views are somebody else's
        (lambda x: (x + 1).view(10, 100)[:5] + 1, N + N // 2),
        (lambda x: (x + 1).mul_(2).add_(3), N),
        (lambda x: x.add_(1), 0),
    ],
)
def test_peak(function: Callable[[Tensor], Tensor], peak: int) -> None:
    found = case(function, torch.zeros(1000))
    assert activation_peak_bytes(found.module, found.context) == peak


def test_a_view_keeps_its_base_alive() -> None:
    def function(x: Tensor) -> Tensor:
        kept = (x + 1)[:1]
        return chain(x) + kept

    found = case(function, torch.zeros(1000))
    assert activation_peak_bytes(found.module, found.context) == 3 * N


def test_symbols_count_at_the_contexts_sizes() -> None:
    found = case(chain, torch.zeros(7), dynamic=True)
    assert activation_peak_bytes(found.module, found.context) == 2 * 7 * 4
