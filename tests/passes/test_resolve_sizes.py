"""Sizes that are read from tensors become arithmetic on the graph's size inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hetegen_compile.ir import info, is_tensor
from hetegen_compile.passes.resolve_sizes import resolve_sizes
from tests.passes.graphs import Case, case


def sizes_read_from_tensors(found: Case) -> list[str]:
    nodes = found.module.graph.nodes
    return [n.name for n in nodes if n.target == "size" and any(map(is_tensor, n.all_input_nodes))]


def doubled(x: Tensor) -> Tensor:
    return x.new_ones(torch.cat([x, x]).shape)


def test_the_shape_of_an_intermediate_is_computed_from_the_graphs_inputs() -> None:
    found = case(doubled, torch.randn(3, 4), dynamic=True)
    assert sizes_read_from_tensors(found)
    found.run(resolve_sizes)
    assert found.text == """\
t1 = mul(2, x.size.0)
t2 = x.new_ones((t1, x.size.1))
return (t2,)"""  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        doubled,
        lambda x: x.new_ones(x[::2].shape),
        lambda x: x.new_ones(torch.cat([x, x, x]).view(-1).shape),
        lambda x: x.new_ones(torch.ones(x.size(0) % 4, x.size(0) - 1).shape),
        lambda x: x.new_ones(torch.ones(x.size(0) ** 2, 2).shape),
        lambda x: x.new_ones(torch.cat([x, x]).shape[:1]),
        lambda x: torch.cat([x, x]).view(x.size(0), -1).sum() + torch.cat([x, x]).numel(),
    ],
)
def test_values_stay_the_same_at_other_sizes(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, 4)
    found = case(function, x, dynamic=True).run(resolve_sizes)
    assert sizes_read_from_tensors(found) == []
    (tokens,) = (i for i, value in enumerate(found.inputs) if isinstance(value, int) and value == 6)
    other = torch.randn(9, 4)
    found.inputs = [9 if i == tokens else other if v is x else v for i, v in enumerate(found.inputs)]
    torch.testing.assert_close(found.outputs()[0], function(other))


def test_new_nodes_know_their_values() -> None:
    found = case(doubled, torch.randn(3, 4), dynamic=True).run(resolve_sizes)
    computed = [n for n in found.module.graph.nodes if n.op == "call_function" and not is_tensor(n)]
    assert [int(info(node).value.node.hint) for node in computed] == [6]


def test_a_graph_without_symbols_stays_as_it_is() -> None:
    found = case(lambda x: x.sum(0, keepdim=True).expand(x.shape), torch.randn(3, 4), dynamic=False)
    before = found.text
    assert found.run(resolve_sizes).text == before


def test_a_number_that_depends_on_data_is_read_from_its_tensor() -> None:
    config = {"capture_scalar_outputs": True}
    found = case(lambda x: x * x.sum().item(), torch.randn(3, 4), dynamic=True, dynamo=config).run(resolve_sizes)
    x = found.inputs[-1]
    assert ".item()" in found.text
    torch.testing.assert_close(found.outputs()[0], x * x.sum())


def test_what_only_a_size_needed_is_gone_and_writes_stay() -> None:
    def function(x: Tensor) -> Tensor:
        shape = torch.cat([x, x]).shape
        x.add_(1)
        return torch.ones(shape)

    found = case(function, torch.randn(3, 4), dynamic=True).run(resolve_sizes)
    assert found.text == """\
t1 = mul(2, x.size.0)
t2 = x.add_(1)
t3 = ones((t1, x.size.1))
return (t3,)"""  # fmt: skip


@pytest.mark.parametrize("choose", [torch.sym_max, torch.sym_min])
def test_the_larger_or_smaller_of_two_sizes(choose: Callable[[int, int], int]) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return x.new_ones(torch.zeros(choose(x.size(0), y.size(0)), 2).shape)

    found = case(function, torch.randn(3, 4), torch.randn(5, 4), dynamic=True)
    assert sizes_read_from_tensors(found)
    found.run(resolve_sizes)
    assert sizes_read_from_tensors(found) == []
    assert found.outputs()[0].shape[0] == choose(3, 5)


def test_a_size_that_depends_on_data_stays() -> None:
    mask, config = torch.tensor([True, False, True]), {"capture_dynamic_output_shape_ops": True}
    found = case(lambda mask: torch.ones(mask.nonzero().shape), mask, dynamo=config).run(resolve_sizes)
    torch.testing.assert_close(found.outputs()[0], torch.ones(2, 1))
