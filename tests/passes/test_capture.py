"""Capture: what one propagation of fakes tells about writes, aliases, random numbers, FLOPs and names."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from hetegen_compile.backend import make_backend
from hetegen_compile.errors import UnsupportedModelError
from hetegen_compile.ir import info
from hetegen_compile.passes.capture import capture
from hetegen_compile.passes.sources import source_name
from hetegen_compile.passes.tensors import to_expr
from hetegen_compile.steps.segments import plain_compiler
from tests.passes.graphs import Case, assert_equal_to_eager, case, dynamo_graph


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def only(found: Case, name: str) -> Any:
    """The one node whose ATen operations hold ``name``."""
    (node,) = [n for n in found.module.graph.nodes if name in info(n).aten]
    return node


def placeholder(found: Case, name: str) -> Any:
    (node,) = [n for n in found.module.graph.find_nodes(op="placeholder") if source_name(n) == name]
    return node


def test_nodes_know_their_place_and_the_module_they_come_from() -> None:
    found = case(Model(), torch.randn(2, 4))
    nodes = list(found.module.graph.nodes)
    linears = [node for node in nodes if "mm" in info(node).aten or "addmm" in info(node).aten]
    assert [info(node).position for node in nodes] == list(range(len(nodes)))
    assert [info(node).module for node in linears] == [
        "layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down",
    ]  # fmt: skip


def test_parameters_have_the_names_that_users_know() -> None:
    found = case(Model(), torch.randn(2, 4))
    assert {source_name(node) for node in found.module.graph.find_nodes(op="placeholder")} == {
        "x", *dict(Model().named_parameters()),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["inner", "fn", "args", "kwargs"])
def test_a_module_keeps_its_name_whatever_that_is(name: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.get_submodule(name)(x)
            return result

    found = case(Outer(), torch.randn(2, 4))
    placeholders = found.module.graph.find_nodes(op="placeholder")
    assert f"{name}.weight" in {source_name(node) for node in placeholders}


def test_a_write_through_a_view_is_a_write_of_its_base() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x[1].mul_(y)
        return x + 1

    found = case(function, torch.zeros(2, 4), torch.ones(4))
    x = placeholder(found, "x")
    assert info(only(found, "mul_")).writes == info(x).storages
    assert info(only(found, "add")).writes == frozenset()


@pytest.mark.parametrize(
    "write",
    [
        lambda cache, at, new: cache.index_copy_(0, at, new),
        lambda cache, at, new: cache.__setitem__(at, new),
        lambda cache, at, new: cache[:2].copy_(new),
        lambda cache, at, new: torch.add(cache[:2], new, out=cache[:2]),
    ],
)
def test_every_kind_of_write_to_a_cache_is_seen(write: Any) -> None:
    def function(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        write(cache, at, new)
        return cache.sum()

    found = case(function, torch.zeros(6, 4), torch.tensor([0, 3]), torch.ones(2, 4))
    written = frozenset[int]().union(*(info(node).writes for node in found.module.graph.nodes))
    assert written == info(placeholder(found, "cache")).storages


def test_reading_is_not_writing_and_views_share_a_storage() -> None:
    found = case(lambda x: (x.t(), x + 1), torch.randn(3, 4))
    x = placeholder(found, "x")
    (view,) = [node for node in found.module.graph.nodes if node.target == "t"]
    made = only(found, "add")
    assert info(view).storages == info(x).storages
    assert info(made).storages.isdisjoint(info(x).storages)
    assert not any(info(node).writes for node in found.module.graph.nodes)


def test_inputs_that_alias_each_other_share_a_storage() -> None:
    base = torch.randn(2, 4)
    found = case(lambda a, b, c: a + b + c, base[0], base[1], torch.randn(4))
    a, b, c = (info(placeholder(found, name)) for name in "abc")
    assert a.storages == b.storages
    assert c.storages.isdisjoint(a.storages)
    assert (a.value.storage_offset(), b.value.storage_offset()) == (0, 4)


def test_strides_of_inputs_are_kept() -> None:
    found = case(lambda x: x + 1, torch.randn(3, 4).t())
    assert info(placeholder(found, "x")).value.stride() == (1, 4)


@pytest.mark.parametrize(
    ("function", "random"),
    [
        (lambda x: F.dropout(x, 0.5, training=True), True),
        (lambda x: F.dropout(x, 0.5, training=False), False),
        (lambda x: x + torch.rand(4), True),
        (lambda x: F.scaled_dot_product_attention(x, x, x), False),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), True),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0), False),
    ],
)
def test_what_draws_random_numbers_is_random(function: Any, random: bool) -> None:
    found = case(function, torch.randn(1, 2, 3, 4))
    assert any(info(node).random for node in found.module.graph.nodes) is random


def test_item_depends_on_data() -> None:
    found = case(lambda x: x * x.sum().item(), torch.randn(4), dynamo={"capture_scalar_outputs": True})
    assert [node.target for node in found.module.graph.nodes if info(node).data_dependent] == ["item"]


def test_picking_elements_depends_on_data_only_with_a_mask() -> None:
    mask, places = torch.tensor([True, False, True]), torch.tensor([2, 0])
    dynamo = {"capture_dynamic_output_shape_ops": True}
    for picked, depends in ((mask, True), (places, False)):
        found = case(lambda x, picked: x[picked] + 1, torch.randn(3, 4), picked, dynamo=dynamo)
        assert any(info(node).data_dependent for node in found.module.graph.nodes) is depends


def test_flops_and_bytes_are_expressions_over_the_graphs_sizes() -> None:
    found = case(Block(), torch.randn(3, 4), dynamic=True)
    up = only(found, "addmm")
    tokens = to_expr(info(up).value.shape[0])
    assert tokens.is_Symbol
    assert sympy.expand(info(up).flops - 2 * tokens * 4 * 8) == 0
    elements = tokens * 4 + 4 * 8 + 8 + tokens * 8
    assert sympy.expand(info(up).traffic_bytes - 4 * elements) == 0


def test_attention_counts_as_attention_and_views_cost_nothing() -> None:
    found = case(lambda x: F.scaled_dot_product_attention(x, x, x).transpose(1, 2), torch.randn(1, 2, 16, 8))
    (attention,) = [n for n in found.module.graph.nodes if info(n).flops]
    assert info(attention).flops == 2 * (2 * 2 * 16 * 16 * 8)
    (view,) = [node for node in found.module.graph.nodes if node.target == "transpose"]
    assert info(view).traffic_bytes == 0


def test_a_lookup_moves_the_rows_that_it_finds_and_not_the_table() -> None:
    found = case(nn.Embedding(1000, 8), torch.tensor([3, 5]))
    assert info(only(found, "embedding")).traffic_bytes == 2 * (2 * 8 * 4)


def test_inputs_are_not_written_while_capturing() -> None:
    x = torch.zeros(4)
    found = case(lambda x: x.add_(1) + 1, x)
    assert info(only(found, "add_")).writes
    assert x.eq(0).all()


def test_an_input_that_is_not_on_the_cpu_is_refused_by_its_name() -> None:
    module, _ = dynamo_graph(lambda x, y: x + y, torch.randn(4), torch.randn(4))
    with pytest.raises(UnsupportedModelError, match=r"y is on meta .*hetegen_compile\.plan\(model, \.\.\.\)"):
        capture(module, [torch.randn(4), torch.randn(4, device="meta")])
    elsewhere = FakeTensorMode().from_tensor(torch.randn(4))
    elsewhere.fake_device = torch.device("cuda:0")
    with pytest.raises(UnsupportedModelError, match=r"y is on cuda:0.*\.to\('cpu'\)"):
        capture(module, [torch.randn(4), elsewhere])


def test_costs_use_the_symbols_that_are_left_when_some_turn_out_equal() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x @ x.T, torch.softmax(y @ y.T, -1)

    a, b = torch.randn(6, 4), torch.randn(6, 4)
    for tensor in (a, b):
        torch._dynamo.mark_dynamic(tensor, 0)
    module, inputs = dynamo_graph(function, a, b)
    x, y = [node for node in module.graph.find_nodes(op="placeholder") if "Tensor" in str(node.type)]
    with module.graph.inserting_before(next(iter(reversed(module.graph.nodes)))):
        module.graph.call_function(torch.add, (x, y))  # that the two are equal shows in the propagation only
    capture(module, inputs)
    left = set().union(*(to_expr(info(node).value.shape[0]).free_symbols for node in (x, y)))
    assert len(left) == 1
    for kind in ("flops", "traffic_bytes", "made_bytes"):
        costs = [getattr(info(node), kind) for node in module.graph.nodes]
        assert any(cost.free_symbols for cost in costs), kind
        assert all(cost.free_symbols <= left for cost in costs), kind


def test_autocast_is_as_before() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    module, inputs = dynamo_graph(function, torch.randn(4, 4))
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        capture(module, inputs)
        assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == (False, torch.float16)
    finally:
        torch.set_autocast_dtype("cpu", torch.bfloat16)
    (product,) = [node for node in module.graph.nodes if "mm" in info(node).aten]
    assert info(product).value.dtype == torch.bfloat16


@pytest.mark.parametrize("places", [(1, 0), (2, 1)])
def test_inputs_lie_where_they_lie_in_their_storage(places: tuple[int, int]) -> None:
    base = torch.randn(3, 4)
    found = case(lambda a, b: a + b, base[places[0]], base[places[1]])
    offsets = [info(placeholder(found, name)).value.storage_offset() for name in "ab"]
    assert offsets == [4 * place for place in places]


class Scaled(nn.Module):
    """``eps`` and ``scale`` are Python floats: with ``dynamic=True`` Dynamo passes them as tensors with ``item()``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 64), nn.RMSNorm(64, eps=0.5), nn.Linear(64, 64)
        self.scale = 0.25

    def forward(self, x: Tensor) -> Any:
        return self.down(self.norm(self.up(x)) * self.scale)


@pytest.mark.parametrize("module", [nn.Sequential(nn.RMSNorm(4, eps=1e-6)), Scaled()])
def test_a_graph_with_python_floats_as_inputs_is_traced_again(module: nn.Module) -> None:
    columns = 4 if isinstance(module, nn.Sequential) else 64
    graph, inputs = dynamo_graph(module, torch.randn(3, columns), dynamic=True)
    assert graph.graph.find_nodes(op="call_method", target="item")  # or this proves nothing
    with pytest.raises(TensorifyScalarRestartAnalysis):
        capture(graph, inputs)
    torch._dynamo.reset()  # forgets the floats that are to become constants


def test_python_floats_are_constants_under_dynamic_shapes() -> None:
    traced: list[str] = []
    inner = make_backend(plain_compiler)

    def backend(module: fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        traced.append(module.code)
        return inner(module, inputs, **kwargs)

    torch._dynamo.reset()
    module = Scaled()
    options: dict[str, Any] = {"accelerator": "emulated", "hardware": "cpu-emulated", "split": 0.5}
    compiled = torch.compile(module, backend=backend, dynamic=True, options=options)
    with torch.no_grad():
        for tokens in (3, 7):
            x = torch.randn(tokens, 64)
            torch.testing.assert_close(compiled(x), module(x))
        assert [".item()" in code for code in traced] == [True, False]
        assert "0.5" in traced[-1]
        assert "0.25" in traced[-1]
        module.scale = 4.0
        torch.testing.assert_close(compiled(x), module(x))  # a constant with a guard


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_regions_that_change_nothing_are_dropped(enabled: bool) -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return x @ x

    found = case(function, torch.randn(4, 4))
    assert ("_enter_autocast" in found.text) == ("_exit_autocast" in found.text) == enabled
    (product,) = found.outputs()
    assert product.dtype == (torch.bfloat16 if enabled else torch.float32)


def test_a_region_without_autocast_inside_the_callers_autocast_stays() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ x

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case(function, torch.randn(4, 4))
        (product,) = found.outputs()
    assert "_enter_autocast" in found.text
    assert product.dtype == torch.float32


def test_a_region_without_autocast_inside_one_with_it_stays() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ x
            with torch.autocast("cpu", enabled=False):
                return y, x @ x

    found = case(function, torch.randn(4, 4))
    assert [value.dtype for value in found.outputs()] == [torch.bfloat16, torch.float32]


# ---- operations that are given functions -----------------------------------------------------------------------

FIRST, LAST = nn.Linear(16, 16), nn.Linear(16, 16)


def flexible(x: Tensor) -> Any:
    heads = FIRST(x).view(1, 8, 2, 8).transpose(1, 2)
    found = flex_attention(heads, heads, heads, score_mod=lambda score, b, h, q, k: score + (q - k))
    return LAST(found.transpose(1, 2).reshape(1, 8, 16))


def either(x: Tensor) -> Any:
    return LAST(torch.cond(x.sum() > 0, lambda y: y.relu(), lambda y: y * 2, (FIRST(x),)))


def test_flexible_attention_is_one_operation_and_costs_what_attention_does() -> None:
    attention = only(case(flexible, torch.randn(1, 8, 16)), "flex_attention")
    assert info(attention).aten == ("flex_attention",)
    assert info(attention).flops == 2 * (2 * 2 * 8 * 8 * 8)  # two products, two heads, 8 x 8 scores of width 8
    assert info(attention).traffic_bytes > 4 * (3 * 8 * 16)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("function", [flexible, either])
def test_operations_that_are_given_functions_run_in_segments(function: Any) -> None:
    assert_equal_to_eager(function, torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)))
