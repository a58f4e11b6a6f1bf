"""How large a graph's sizes get: by Dynamo's guards, and by the windows that its caches are cut to."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from hetegen_compile.ir import info
from hetegen_compile.passes.tensors import to_expr
from hetegen_compile.passes.windows import window_of, windowed_inputs
from hetegen_compile.planning.size_limits import size_limits
from tests.passes.graphs import Case, case

HELD = 5


def _tokens(found: Case) -> sympy.Expr:
    (cache,) = [node for node in found.module.graph.find_nodes(op="placeholder") if node.name.endswith("cache_")]
    return to_expr(info(cache).value.shape[2])


def _limits(found: Case) -> dict[sympy.Symbol, sympy.Integer]:
    return dict(size_limits(found.module, found.context.sizes))


def _inputs() -> tuple[Tensor, Tensor]:
    cache = torch.randn(1, 2, HELD, 16)
    torch._dynamo.mark_dynamic(cache, 2)
    return cache, torch.randn(1, 2, 1, 16)


def test_a_guard_bounds_a_size() -> None:
    def below(cache: Tensor, new: Tensor) -> Tensor:
        return torch.cat([cache, new], 2) * 2 if cache.shape[2] < 31 else new

    found = case(below, *_inputs())
    assert _limits(found) == {_tokens(found): 30}


def test_without_either_there_is_no_limit() -> None:
    found = case(lambda cache, new: torch.cat([cache, new], 2), *_inputs())
    assert _limits(found) == {}


def test_a_window_bounds_what_comes_in_next() -> None:
    """It is full, and values' length is nowhere compared with keys'."""

    def step(cache: Tensor, new: Tensor) -> Tensor:
        return torch.cat([cache, new * 2], 2)[:, :, -HELD:, :]

    found = case(step, *_inputs())
    ((_, window),) = windowed_inputs(found.module).items()
    assert window == HELD
    assert _limits(found) == {_tokens(found): HELD}


def test_only_the_end_of_all_heads_is_a_window() -> None:
    def cuts(cache: Tensor) -> tuple[Tensor, ...]:
        return cache[:, :, -3:, :], cache[:, :, -3:-1, :], cache[:, :1, -3:, :], cache[:, :, 3:, :], cache[:, :, ::2, :]

    found = case(cuts, torch.randn(1, 2, 7, 16))
    results: Any = found.module.graph.output_node().args[0]
    assert [window_of(node) for node in results] == [3, None, None, None, None]
