"""Inductor as the compiler of segments: what it is given besides a segment's own inputs, and its cache on disk."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from hetegen_compile.errors import CompilationError
from hetegen_compile.segments import SizeSource, inductor_compiler, unnamed_sizes
from tests.models.harness import through_inductor


class Grown(torch.nn.Module):
    """A segment as of a growing cache: one of its inputs is the cache, another the length that it will have."""

    def forward(self, cache: Tensor, row: Tensor, length: int) -> tuple[Tensor]:
        return (torch.cat([cache, row]).expand(2, length, 8).sum(0),)


class Longer(torch.nn.Module):
    """A segment whose only input is the length that a cache will have."""

    def forward(self, length: int) -> tuple[Tensor]:
        return (torch.arange(length) * 2,)


Inputs = Callable[[Any, Any, Any], list[Any]]
"""Of a segment, from a cache, a row and the cache's length."""


def grown(cache: Any, row: Any, length: Any) -> list[Any]:
    return [cache, row, length + 1]


def longer(cache: Any, row: Any, length: Any) -> list[Any]:
    return [length + 1]


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


def test_where_symbols_can_be_read() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dims = [DimDynamic.DYNAMIC, DimDynamic.STATIC]
    sizes: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=dims)
    cache = mode.from_tensor(torch.ones(5, 8), symbolic_context=sizes)
    length = cache.shape[0]
    assert unnamed_sizes([None, cache, cache, 2 * length + 3]) == [(1, 0, 1, 0)]
    assert unnamed_sizes([cache, length]) == unnamed_sizes([3, torch.ones(2), None]) == []
    assert unnamed_sizes([2 * length + 3]) == [(0, None, 2, 3)]
    assert SizeSource(0, None, 2, 3).read([13]) == 5
    with mode:
        assert unnamed_sizes([torch.cat([cache, cache])]) == [(0, 0, 2, 0)]
    with pytest.raises(CompilationError, match=f"no input of the segment shows {length}"):
        unnamed_sizes([length * length])


def _size(env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    source = ConstantSource(name)
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


@through_inductor
def test_a_size_that_turned_out_to_be_another_one() -> None:
    env = ShapeEnv()
    mode, one, other = FakeTensorMode(shape_env=env), _size(env, "one", 5), _size(env, "other", 5)
    assert bool(one == other)
    assert {one.node._expr, other.node._expr} > {one.node.expr}, "one of them has the symbol of the other now"
    graph = fx.Graph()
    size, more = (graph.placeholder(name) for name in ("size", "more"))
    rows = graph.call_function(torch.arange, (more,))
    graph.output((graph.call_function(operator.add, (rows, size)),))
    segment = fx.GraphModule(torch.nn.Module(), graph)
    for sizes in ((one, other + 1), (other, one + 1)):
        (found,) = inductor_compiler(mode)(segment, sizes)(7, 8)
        torch.testing.assert_close(found, 7 + torch.arange(8))
