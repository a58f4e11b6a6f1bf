"""What a product with a mixture's experts is taken to cost on the host, where they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor

from hetegen_compile.cost_model import KernelChoice, host_linear_s, host_op_s
from hetegen_compile.host_kernels import bind_experts
from hetegen_compile.ir import annotate, info
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.findings import NodeCost
from hetegen_compile.passes.grouped_products import grouped_product, left_to_torch
from hetegen_compile.passes.node_work import node_work
from tests.passes.graphs import PROFILE, Case, case

EXPERTS, IN, OUT = 8, 256, 512
NBYTES, LAUNCH_S = 2 * IN * OUT, PROFILE.host.launch_s
"""Of one expert's matrix, in bfloat16."""

STACK = torch.randn(EXPERTS, OUT, IN).to(torch.bfloat16)


def product(x: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, STACK.transpose(1, 2), offs=ends)


def transformers_product(x: Tensor, ends: Tensor) -> Tensor:
    found: Tensor = torch.ops.transformers.grouped_mm_fallback(x, STACK.transpose(1, 2), offs=ends)
    return found


def traced(function: Any, tokens: int) -> Case:
    x, ends = torch.zeros(tokens, IN, dtype=torch.bfloat16), torch.full((EXPERTS,), tokens, dtype=torch.int32)
    found = case(function, x, ends)
    found.run(annotate_costs)
    return found


def grouped_cost(found: Case) -> NodeCost:
    (node,) = (node for node in found.module.graph.nodes if grouped_product(node) is not None)
    assert found.context.costs is not None
    cost = found.context.costs[info(node).position]
    annotate(node, side="host")
    assert node_work(node, found.context).seconds == cost.host_s, "and so it is simulated"
    return cost


@pytest.mark.parametrize("function", [product, transformers_product])
@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (2, 2), (8, 8), (64, 8), (512, 8)])
def test_it_is_a_linear_for_each_expert_that_may_have_tokens(function: Any, tokens: int, experts: int) -> None:
    cost = grouped_cost(traced(function, tokens))
    flops = 2.0 * IN * OUT * tokens / experts
    each_s = host_linear_s(PROFILE, "bfloat16", tokens / experts, NBYTES, flops, contended=False)
    assert cost.host_s == pytest.approx(LAUNCH_S + experts * (each_s - LAUNCH_S))
    assert (cost.weight_bytes, cost.link_s) == (0, 0.0), "it is not streamed"


def test_what_is_left_to_torch_is_reading_the_experts_that_have_tokens() -> None:
    def int64(x: Tensor, ends: Tensor) -> Tensor:
        return transformers_product(x, ends.long())

    cost = grouped_cost(traced(int64, 2))
    rows = 2 * 2 * (IN + OUT)
    assert cost.host_s == host_op_s(PROFILE, "bfloat16", 2.0 * IN * OUT * 2, 2 * NBYTES + rows)
    assert cost.host_s != grouped_cost(traced(transformers_product, 2)).host_s


def test_activations_of_another_type_are_torchs() -> None:
    found = traced(product, 2)
    (node,) = (node for node in found.module.graph.nodes if grouped_product(node) is not None)
    operands = grouped_product(node)
    assert operands is not None
    assert left_to_torch(node, operands) is None
    annotate(operands.x, value=info(operands.x).value.float())
    reason = left_to_torch(node, operands)
    assert reason == "activations are torch.float32, the experts' matrices torch.bfloat16"


def test_many_tokens_of_an_expert_are_slower_than_reading_it() -> None:
    few, many = (grouped_cost(traced(product, tokens)).host_s for tokens in (8, 512))
    assert many > 4 * few


def test_it_is_found_by_names_too() -> None:
    def named(x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, mat2=STACK.transpose(1, 2), offs=ends)

    def named_fallback(x: Tensor, ends: Tensor) -> Tensor:
        found: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight=STACK.transpose(1, 2), offs=ends)
        return found

    for function in (named, named_fallback):
        assert grouped_cost(traced(function, 2)).host_s == grouped_cost(traced(product, 2)).host_s


def test_sizes_that_are_symbols_stay_symbols() -> None:
    """A cost is a number for one size; the graph is for all."""

    def first(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, matrices, offs=ends)

    x, matrices = torch.zeros(6, 32, dtype=torch.bfloat16), torch.zeros(4, 32, 48, dtype=torch.bfloat16)
    found = case(first, x, matrices, torch.zeros(4, dtype=torch.int32), dynamic=True)
    (node,) = (node for node in found.module.graph.nodes if grouped_product(node) is not None)
    environment = info(node).value.fake_mode.shape_env
    before = len(environment.guards)
    found.run(annotate_costs)
    operands = grouped_product(node)
    assert operands is not None
    assert bind_experts(
        torch._grouped_mm, {"bfloat16": KernelChoice(((1.0, "vectorised"),))}, info(operands.matrices).value
    )
    assert found.context.costs is not None
    assert found.context.costs[info(node).position].host_s > 0
    assert len(environment.guards) == before


def test_groups_on_both_sides_are_none() -> None:
    """[groups, tokens, in] with [groups, in, out]: no groups of one operand's rows."""

    def both(x: Tensor) -> Tensor:
        return torch._grouped_mm(x, STACK.transpose(1, 2))

    found = case(both, torch.zeros(EXPERTS, 16, IN, dtype=torch.bfloat16))
    grouped = [node for node in found.module.graph.nodes if "_grouped_mm" in info(node).aten]
    assert [grouped_product(node) for node in grouped] == [None]


def test_a_batch_of_products_is_none() -> None:
    def batched(x: Tensor) -> Tensor:
        return torch.bmm(x, STACK[:2].transpose(1, 2))

    found = case(batched, torch.zeros(2, 3, IN, dtype=torch.bfloat16))
    assert [grouped_product(node) for node in found.module.graph.nodes if node.op == "call_function"].count(None) >= 1
    assert not any(grouped_product(node) for node in found.module.graph.nodes)
