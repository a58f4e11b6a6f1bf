"""Peak bytes of values: what the graph makes, from its maker to its last reader, views counted once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor

from hetegen_compile.ir import info
from hetegen_compile.passes.annotate_costs import value_bytes, value_size
from hetegen_compile.passes.liveness import activation_peak_bytes, larger
from hetegen_compile.passes.tensors import held_bytes
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


def test_bytes_are_the_same_whether_sizes_are_numbers_or_symbols() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        made = x.half() + 1
        return made, made.unsqueeze(0).expand(5, *made.shape)

    known, found = [], []
    for dynamic in (False, True):
        x = torch.randn(6, 4)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        given = case(function, x)
        nodes = [node for node in given.module.graph.nodes if isinstance(info(node).value, Tensor)]
        sizes = [(held_bytes(info(node).value), value_size(node)) for node in nodes]
        known.append(all(size.is_Integer for pair in sizes for size in pair))
        found.append([(*map(given.context.number, pair), value_bytes(node, given.context)) for node, pair in
                      zip(nodes, sizes, strict=True)])  # fmt: skip
    assert known == [True, False]
    assert set(found[0]) == set(found[1]) == {(96, 96, 96), (48, 48, 48), (48, 240, 240)}


def test_the_larger_of_numbers_and_of_symbols() -> None:
    two, three, symbol = sympy.Integer(2), sympy.Integer(3), sympy.Symbol("s", positive=True, integer=True)
    assert larger(two, three) == larger(three, two) == larger(three, three) == 3
    assert larger(sympy.S.Zero, symbol) == symbol
    assert larger(two, symbol) == sympy.Max(2, symbol)
