"""Inductor as the compiler of segments: what it is given besides a segment's own inputs, and its cache on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from hetegen_compile.segments import inductor_compiler
from tests.models.harness import through_inductor


class Grown(torch.nn.Module):
    """A segment as of a growing cache: one of its inputs is the cache, another the length that it will have."""

    def forward(self, cache: Tensor, row: Tensor, longer: int, length: int) -> tuple[Tensor]:
        del length
        return (torch.cat([cache, row]).expand(2, longer, 8).sum(0),)


class Longer(torch.nn.Module):
    """A segment that only counts to the length that a cache will have."""

    def forward(self, longer: int, length: int) -> tuple[Tensor]:
        del length
        return (torch.arange(longer) * 2,)


Inputs = Callable[[Any, Any, Any], list[Any]]
"""Of a segment, from a cache, a row and the cache's length."""


def grown(cache: Any, row: Any, length: Any) -> list[Any]:
    return [cache, row, length + 1, length]


def longer(cache: Any, row: Any, length: Any) -> list[Any]:
    return [length + 1, length]


def run_compiled(rows: int, segment: torch.nn.Module, inputs: Inputs) -> Tensor:
    """Compile a segment for a cache whose length is a symbol, as Dynamo makes it, and run it."""

    def backend(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        examples = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
        mode = detect_fake_mode(examples)
        assert mode is not None
        length, cache, row = examples
        compiled = inductor_compiler(mode)(fx.symbolic_trace(segment), inputs(cache, row, length))
        return lambda length, cache, row: compiled(*inputs(cache, row, length))

    torch._dynamo.reset()
    cache, row = torch.ones(rows, 8), torch.zeros(1, 8)
    torch._dynamo.mark_dynamic(cache, 0)
    result: Tensor = torch.compile(lambda cache, row: torch.cat([cache, row]), backend=backend)(cache, row)
    return result


@through_inductor
@pytest.mark.parametrize(("segment", "inputs"), [(Grown(), grown), (Longer(), longer)])
def test_symbols_are_inputs_of_their_own(segment: torch.nn.Module, inputs: Inputs) -> None:
    """Otherwise a look-up in the cache fails on a guard that names a place in the model, or code on a missing name."""
    from torch._inductor.utils import fresh_cache

    counters.clear()
    with fresh_cache():
        for rows in (5, 9):
            (expected,) = segment(*inputs(torch.ones(rows, 8), torch.zeros(1, 8), rows))
            assert torch.equal(run_compiled(rows, segment, inputs), expected)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1


def test_nothing_is_timed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's benchmarks take memory beside the budget."""
    seen: list[tuple[bool, bool]] = []

    def compile_fx(segment: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        seen.append((inductor_config.deterministic, inductor_config.triton.autotune_pointwise))
        return segment.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    before = inductor_config.deterministic, inductor_config.triton.autotune_pointwise
    inductor_compiler(FakeTensorMode())(fx.symbolic_trace(torch.nn.ReLU()), [])
    assert seen == [(True, False)]
    assert (inductor_config.deterministic, inductor_config.triton.autotune_pointwise) == before
