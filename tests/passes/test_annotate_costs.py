"""Costs of nodes: counts by hand, seconds by the cost model, symbols at the bucket's size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.cost_model import accelerator_linear_s, host_linear_s, host_op_s, upload_s
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.annotate_costs import annotate_costs, dtype_name, linear_cost, value_bytes
from hetegen_compile.passes.findings import NodeCost
from tests.passes.graphs import PROFILE, Case, case

UP = nn.Linear(64, 256)


def relu_of_linear(x: Tensor) -> Tensor:
    return torch.relu(UP(x))


def costs(found: Case) -> list[NodeCost]:
    """Costs of the computing nodes in program order."""
    found.run(annotate_costs)
    assert found.context.costs is not None
    return [found.context.costs[position] for position in sorted(found.context.costs)]


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
def test_a_linears_cost(shape: tuple[int, ...]) -> None:
    cost, _ = costs(case(relu_of_linear, torch.randn(shape)))
    tokens = max(1, int(torch.tensor(shape[:-1]).prod()))
    nbytes, flops = 64 * 256 * 4, 2.0 * tokens * 64 * 256
    assert (cost.tokens, cost.weight_bytes, cost.flops) == (tokens, nbytes, flops)
    assert cost.host_s == host_linear_s(PROFILE, "float32", tokens, nbytes, flops)
    assert cost.accelerator_s == accelerator_linear_s(PROFILE, "float32", tokens, nbytes, flops)
    assert cost.link_s == upload_s(PROFILE, nbytes)


def test_any_other_node_has_no_weight_and_no_link() -> None:
    _, relu = costs(case(relu_of_linear, torch.randn(3, 64)))
    assert (relu.weight_bytes, relu.tokens, relu.link_s, relu.flops) == (0, 0, 0.0, 0.0)
    assert relu.traffic_bytes == 2 * (3 * 256 * 4)
    assert relu.host_s == host_op_s(PROFILE, "float32", 0.0, relu.traffic_bytes)


def test_symbols_count_at_the_contexts_sizes() -> None:
    few = case(relu_of_linear, torch.randn(3, 64), dynamic=True)
    (symbol,) = few.context.sizes
    assert costs(few)[0].tokens == 3
    few.context = replace(few.context, sizes={symbol: few.context.sizes[symbol] * 100})
    assert few.context.costs is not None
    many = annotate_costs(few.module, few.context)
    position = min(many)
    assert many[position].tokens == 300
    assert many[position].flops == 100 * few.context.costs[position].flops


def test_a_decode_step_can_be_asked_for_whatever_the_graph() -> None:
    found = case(relu_of_linear, torch.randn(100, 64)).run(annotate_costs)
    (linear,) = found.nodes(LINEAR)
    assert linear_cost(linear, found.context, tokens=1) == costs(case(relu_of_linear, torch.randn(1, 64)))[0]


def test_two_linears_of_one_weight_have_costs_of_their_own() -> None:
    found = case(lambda x: (UP(x), UP(x[:1])), torch.randn(8, 64))
    assert sorted(cost.tokens for cost in costs(found) if cost.weight_bytes) == [1, 8]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.ones(1, dtype=torch.bfloat16), "bfloat16"),
        ((torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.float16)), "float16"),
        (torch.ones(1, dtype=torch.int64), "float32"),
        (None, "float32"),
    ],
)
def test_the_profiles_name_of_a_dtype(value: object, name: str) -> None:
    assert dtype_name(value) == name


def test_bytes_of_a_value_count_all_its_tensors() -> None:
    found = case(lambda x: torch.topk(UP(x), 5), torch.randn(3, 64))
    (topk,) = [node for node in found.module.graph.nodes if "topk" in info(node).aten]
    assert value_bytes(topk, found.context) == 3 * 5 * (4 + 8)
