"""What Inductor is given for a segment."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from hetegen_compile.segments import inductor_compiler
from tests.models.harness import through_inductor


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
