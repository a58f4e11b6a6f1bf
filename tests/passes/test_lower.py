"""Equal segments are compiled once, different ones apart; outputs lie in memory as the graph says."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from hetegen_compile.ir import annotate, info
from hetegen_compile.passes.capture import capture
from hetegen_compile.passes.context import SegmentCache
from hetegen_compile.passes.lower import (
    CompiledSegment,
    lower,
    mutated_inputs,
    segment_key,
)
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.segment_calls import with_declared_strides
from hetegen_compile.steps.segments import inductor_compiler
from tests.passes.graphs import (
    Case,
    case,
    dynamo_graph,
    halves,
    on_host,
    planned,
    quarters,
    resident,
    scheduled,
    streamed,
)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """Pre-norm attention with a gated MLP, as in Llama."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Any:
        y = self.norm1(x)
        q, k, v = (part(y).view(1, -1, 2, 16).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def in_turn(*plans: Callable[[int], LinearPlan]) -> Callable[[int], LinearPlan]:
    """Another plan for each Linear, starting over when all have been used."""
    calls = iter(range(10**6))
    return lambda rows: plans[next(calls) % len(plans)](rows)


def compiled_segments(layers: int, plan: Callable[[int], LinearPlan], **changes: Any) -> tuple[int, int]:
    """How many segments a transformer has, and how many different ones were compiled."""
    found = scheduled(Transformer(layers), torch.randn(1, 5, 32), plan=plan, **changes)
    found.apply(lower)
    return len(found.module.graph.find_nodes(op="call_module")), len(found.context.segments.compiled)


ALL_KINDS = in_turn(halves, resident, on_host, streamed, quarters)


@pytest.mark.parametrize(("plan", "dynamic"), [(halves, False), (ALL_KINDS, False), (ALL_KINDS, True)])
def test_the_depth_of_a_model_adds_segments_but_no_compilations(
    plan: Callable[[int], LinearPlan], dynamic: bool
) -> None:
    shallow, deep = (compiled_segments(layers, plan, dynamic=dynamic) for layers in (2, 8))
    assert deep[0] - shallow[0] == 6 * 4  # four segments a layer: norms twice, attention, gate
    assert deep[1] == shallow[1] < shallow[0]


def test_lowering_makes_no_guards() -> None:
    """Of an offset with a symbol, say: Dynamo would trace again for a length that a plan serves."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)

    def function(x: Tensor) -> Tensor:
        y: Tensor = first(x).relu()
        one = y[-3]
        result: Tensor = second(y) + one
        return result

    x = torch.randn(5, 64)
    torch._dynamo.mark_dynamic(x, 0)
    found = scheduled(function, x, plan=halves)
    values = [info(node).value for node in found.module.graph.nodes]
    (environment,) = {value.node.shape_env for value in values if isinstance(value, torch.SymInt)}
    known = list(environment.guards)
    found.apply(lower)
    assert environment.guards == known
    torch.testing.assert_close(found.outputs()[0], function(x))


def test_shares_and_residency_change_no_segment() -> None:
    counts = {compiled_segments(2, plan) for plan in (halves, on_host, streamed, resident)}
    assert len(counts) == 1


@pytest.mark.parametrize("layers", [2])
def test_numerics_with_shared_code(layers: int) -> None:
    model, x = Transformer(layers), torch.randn(1, 5, 32)
    found = scheduled(model, x, plan=quarters)
    found.apply(lower)
    calls = found.module.graph.find_nodes(op="call_module")
    assert all(isinstance(found.module.get_submodule(str(n.target)), CompiledSegment) for n in calls)
    assert len(found.context.segments.compiled) < len(calls)
    torch.testing.assert_close(found.outputs()[0], model(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_numerics_with_inductor() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3)))
    x = torch.randn(5, 32)
    found = scheduled(lambda x: model(x), x, plan=quarters)
    (fake_mode,) = {info(n).value.fake_mode for n in found.module.graph.find_nodes(op="placeholder")}
    cache = SegmentCache(inductor_compiler(fake_mode), {})
    found.context = replace(found.context, segments=cache)
    found.apply(lower)
    assert 1 == len(cache.compiled) < len(found.module.graph.find_nodes(op="call_module"))
    torch.testing.assert_close(found.outputs()[0], model(x))


def test_a_segment_is_compiled_with_the_fakes_of_its_inputs() -> None:
    given: list[list[tuple[int, ...]]] = []

    def compiler(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        given.append([tuple(example.shape) for example in examples])
        return segment.forward

    a = nn.Linear(8, 16)
    found = planned(lambda x: a(x).relu() + x.sum(), torch.randn(3, 8), segments=SegmentCache(compiler, {}))
    found.apply(lower)
    assert given == [[(3, 16), (3, 8)]]


def test_a_size_that_turned_out_to_be_another_is_given_as_that() -> None:
    """Else Inductor binds a symbol that nothing has, and cannot tell the one in the tensors' sizes."""
    environment = ShapeEnv()
    given: list[Any] = []

    def compiler(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        given.extend(examples)
        return segment.forward

    with FakeTensorMode(shape_env=environment):
        new = environment.create_unspecified_symint_and_symbol
        sizes = [new(7, ConstantSource(name), DimDynamic.DYNAMIC) for name in "ab"]
    graph = fx.Graph()
    inputs = [annotate(graph.placeholder(name), value=size) for name, size in zip("ab", sizes, strict=True)]
    assert sizes[0] == sizes[1]  # a guard: one symbol is left
    graph.output((annotate(graph.call_function(operator.add, (inputs[0], inputs[1])), value=torch.zeros(1)),))
    (name, module) = "segment_1", fx.GraphModule({}, fx.Graph())
    module.add_module(name, fx.GraphModule({}, graph))
    module.graph.output(module.graph.call_module(name, ()))
    lower(module, replace(case(lambda x: x + 1, torch.ones(2)).context, segments=SegmentCache(compiler, {})))
    assert len({size.node._expr for size in sizes if isinstance(size, torch.SymInt)}) == 2
    assert len({size.node._expr for size in given}) == 1


def test_positions_of_written_inputs() -> None:
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)

    def function(x: Tensor, at: Tensor, cache: Tensor) -> Any:
        cache.index_copy_(0, at, a(x))
        return b(cache)

    found = planned(function, torch.randn(1, 8), torch.tensor([1]), torch.randn(4, 8))
    (call,) = found.module.graph.find_nodes(op="call_module")
    segment = found.module.get_submodule(str(call.target))
    assert isinstance(segment, fx.GraphModule)
    (position,) = mutated_inputs(segment)
    assert info(call.all_input_nodes[position]).value.shape == (4, 8)
    found.apply(lower)
    compiled = found.module.get_submodule(str(call.target))
    assert isinstance(compiled, CompiledSegment)
    assert compiled.mutates == (position,)


# ---- keys -----------------------------------------------------------------------------------------------------


def key(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> Hashable:
    """The key of a whole graph."""
    module, graph_inputs = dynamo_graph(function, *inputs, dynamic=dynamic)
    capture(module, graph_inputs)
    return segment_key(module)


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


X, Y = torch.randn(4, 4), torch.randn(4, 4)


def test_equal_graphs_have_equal_keys() -> None:
    assert key(add, X, Y) == key(lambda a, b: a + b, torch.randn(4, 4), torch.randn(4, 4))
    assert hash(key(add, X, Y)) == hash(key(add, X, Y))


OTHERS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "operation": (torch.sub, (X, Y)),
    "dtype": (add, (X.half(), Y.half())),
    "size": (add, (X[:3], Y[:3])),
    "stride": (add, (X.t(), Y)),
    "gaps": (add, (torch.randn(4, 8)[:, :4], Y)),
    "aliasing": (lambda x, y: x.view(4, 4) + y, (X, X.view(16)[:].view(4, 4))),
    "keyword": (lambda x, y: torch.add(x, y, alpha=2), (X, Y)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_code_depends_on_is_in_the_key(name: str) -> None:
    function, inputs = OTHERS[name]
    assert key(function, *inputs) != key(add, X, Y)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x + 1, lambda x: x + 1.0),
        (lambda x: x + True, lambda x: x + 1),
        (lambda x: x * 0.0, lambda x: x * -0.0),
        (lambda x: x.to(torch.float16), lambda x: x.to(torch.bfloat16)),
        (lambda x: x[1:], lambda x: x[2:]),
        (lambda x: x[:, 1], lambda x: x[1]),
        (lambda x: x.view(2, 8), lambda x: x.view(8, 2)),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: x.sum(0), lambda x: x.sum(dim=0, keepdim=True)),
        (lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh")),
        (lambda x: (x.sin(), x.cos()), lambda x: (x.cos(), x.sin())),
        (lambda x: x.relu(), lambda x: x.relu_()),
    ],
)
def test_constants_are_in_the_key_by_value(one: Callable[[Tensor], Any], other: Callable[[Tensor], Any]) -> None:
    assert key(one, X) != key(other, X)


def test_two_inputs_of_one_storage_are_not_two_inputs() -> None:
    def write(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return y + 1

    base = torch.zeros(2, 4, 4)
    apart = torch.zeros(2, 4, 4)
    assert key(write, base[0], base[1]) != key(write, base[0], apart[1])


def test_where_in_a_storage_an_input_lies_is_in_the_key() -> None:
    base = torch.randn(3, 4, 4)
    assert key(add, base[0], base[1]) != key(add, base[0], base[2])
    assert key(add, base[0], base[1]) == key(add, *torch.randn(2, 4, 4).unbind())


def test_functions_that_an_operation_is_given_are_in_the_key_by_what_they_do() -> None:
    def branches(factor: float) -> Callable[[Tensor], Any]:
        return lambda x: torch.cond(x.sum() > 0, lambda y: y * factor, lambda y: y + 1, (x,))

    assert key(branches(2.0), X) == key(branches(2.0), X)
    assert key(branches(2.0), X) != key(branches(3.0), X)


def test_autocast_and_the_default_dtype_are_in_the_key() -> None:
    module, inputs = dynamo_graph(add, X, Y)
    capture(module, inputs)
    before = segment_key(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert segment_key(module) != before
    torch.set_default_dtype(torch.float64)
    try:
        assert segment_key(module) != before
    finally:
        torch.set_default_dtype(torch.float32)
    assert segment_key(module) == before


def test_how_symbols_recur_is_in_the_key_and_their_names_are_not() -> None:
    def sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(0), y.sum(0)

    same = key(sums, torch.randn(5, 4), torch.randn(5, 4), dynamic=True)
    different = key(sums, torch.randn(5, 4), torch.randn(7, 4), dynamic=True)
    assert same != different
    assert different == key(sums, torch.randn(11, 4), torch.randn(13, 4), dynamic=True)


# ---- layouts --------------------------------------------------------------------------------------------------


def fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(tensor)


def test_an_output_of_another_layout_is_laid_out_as_declared() -> None:
    declared = torch.empty(2, 3, 4).permute(2, 0, 1)
    call = with_declared_strides(lambda x: [x.contiguous(), x], [fake(declared), fake(declared)])
    x = torch.randn(2, 3, 4).permute(2, 0, 1)
    for _ in range(2):  # what has to be copied is found at the first call and used at the second
        first, second = call(x)
        assert first.stride() == second.stride() == declared.stride()
        assert second is x
        torch.testing.assert_close(first, x)


def test_outputs_that_are_right_are_passed_on() -> None:
    outputs = [torch.randn(2, 3), torch.randn(3)]
    call = with_declared_strides(lambda: outputs, [fake(output) for output in outputs])
    assert call() is outputs


def test_sizes_of_one_have_any_stride() -> None:
    output = torch.randn(4, 1, 3)
    declared = output.as_strided((4, 1, 3), (3, 100, 1))
    assert with_declared_strides(lambda: [output], [fake(declared)])()[0] is output


@pytest.mark.parametrize("declared", [torch.zeros(1).expand(4), torch.zeros(8)[::2]])
def test_layouts_with_overlaps_or_gaps_are_left_alone(declared: Tensor) -> None:
    output = torch.randn(4)
    assert with_declared_strides(lambda: [output], [fake(declared)])()[0] is output


def test_symbolic_strides_count_at_their_hints() -> None:
    found: Case = case(lambda x: x.t() + 1, torch.randn(5, 4), dynamic=True)
    (node,) = [n for n in found.module.graph.nodes if "add" in info(n).aten]
    result = with_declared_strides(lambda: [torch.randn(4, 5)], [info(node).value])()[0]
    assert result.stride() == (1, 4)


def test_what_is_dense_only_where_it_was_captured_keeps_its_gaps() -> None:
    """A window as long as the prompt at capture; a longer prompt's is cut with gaps, as eager's is."""
    found: Case = case(lambda x: x[:, -4:], torch.randn(3, 4), dynamic=True)
    (node,) = found.module.graph.output_node().all_input_nodes
    window = torch.randn(3, 9)[:, -4:]
    for _ in range(2):
        assert with_declared_strides(lambda: [window], [info(node).value])()[0] is window
