"""Blocks are found by what lies between Linears, never by a name, and left alone for a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.findings import Block
from tests.passes.graphs import Case, case

WIDE = 48
GATE, UP = (nn.Linear(16, WIDE) for _ in range(2))
DOWN, OTHER = nn.Linear(WIDE, 16), nn.Linear(WIDE, 16)
SQUARE = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
FUSED = nn.Linear(16, 2 * WIDE)
CONV_UP, CONV_DOWN = Conv1D(WIDE, 16), Conv1D(16, WIDE)
X = torch.randn(2, 3, 16)


def find(function: Callable[..., Any], *inputs: Tensor, **changes: Any) -> tuple[list[Block], Case]:
    with torch.no_grad():
        found = case(function, *inputs, **changes).run(annotate_costs)
    return list(found.context.blocks), found


def gate_up(x: Tensor) -> Any:
    return DOWN(F.silu(GATE(x)) * UP(x))


def up_down(x: Tensor) -> Any:
    return DOWN(F.dropout(F.gelu(UP(x), approximate="tanh"), 0.1, training=False))


def conv1d(x: Tensor) -> Any:
    a = CONV_UP(x)
    return CONV_DOWN(0.5 * a * (1.0 + torch.tanh(0.8 * (a + 0.04 * torch.pow(a, 3.0)))))


def upcast(x: Tensor) -> Any:
    return DOWN(F.gelu(UP(x).double()).to(x.dtype))


def nothing_between(x: Tensor) -> Any:
    return DOWN(UP(x))


def scaled(x: Tensor) -> Any:
    return DOWN(F.relu(UP(x)) * x.shape[1])


@pytest.mark.parametrize("function", [gate_up, up_down, conv1d, upcast, nothing_between, scaled])
def test_pointwise_operations_between_linears_are_a_block(function: Callable[[Tensor], Any]) -> None:
    (block,), found = find(function, X)
    linears = {info(node).position: node for node in found.nodes(LINEAR)}
    assert sorted(block.linears) == sorted(linears)
    assert block.columns == WIDE
    assert set(block.ways) == {1}
    positions = {info(node).position for node in found.module.graph.nodes}
    between = {position for position in positions if block.siblings[0] < position < block.consumer}
    assert set(block.region) == between - set(linears)


def chunked(x: Tensor) -> Any:
    gate, up = FUSED(x).chunk(2, dim=-1)
    return DOWN(up * F.silu(gate))


def sliced(x: Tensor) -> Any:
    both = FUSED(x)
    return DOWN(F.silu(both[..., WIDE:]) * both[..., :WIDE])


@pytest.mark.parametrize(("function", "ways"), [(chunked, [0, 1]), (sliced, [1, 0])])
def test_a_fused_linear_is_told_by_where_its_parts_lie(function: Callable[[Tensor], Any], ways: list[int]) -> None:
    (block,), _ = find(function, X)
    assert (block.columns, block.ways) == (WIDE, (2,))
    assert [way for _, _, way in block.parts] == ways
    assert {sibling for _, sibling, _ in block.parts} == set(block.siblings)
    assert len(block.region) == 2


def test_no_linear_is_in_two_blocks() -> None:
    blocks, found = find(lambda x: SQUARE[2](F.relu(SQUARE[1](F.relu(SQUARE[0](x))))), X)
    assert len(found.nodes(LINEAR)) == 3
    assert [len(block.linears) for block in blocks] == [2]


def test_another_linear_of_the_same_input_does_no_harm() -> None:
    """In a parallel residual block the attention reads what the MLP reads."""
    (block,), found = find(lambda x: (DOWN(F.gelu(UP(x))), SQUARE[0](x).softmax(-1)), X)
    assert len(found.nodes(LINEAR)) == 3
    assert len(block.linears) == 2


TIED = nn.Parameter(torch.randn(16, 16))
SCALE = nn.Parameter(torch.randn(WIDE))
LEFT_ALONE: dict[str, Callable[[Tensor], Any]] = {
    "an operation that mixes columns": lambda x: DOWN(UP(x).softmax(-1)),
    "one tensor that comes from elsewhere": lambda x: DOWN(UP(x) * SCALE),
    "the input itself": lambda x: SQUARE[1](SQUARE[0](x) + x),
    "a result that is returned": lambda x: (DOWN(a := F.relu(UP(x))), a),
    "a result that another Linear reads": lambda x: (DOWN(a := F.relu(UP(x))), OTHER(a)),
    "Linears of different inputs": lambda x: DOWN(F.silu(GATE(x)) * UP(x + 1)),
    "a write in place": lambda x: DOWN(F.relu(UP(x), inplace=True)),
    "random numbers": lambda x: DOWN(F.dropout(UP(x), 0.5, training=True)),
    "columns that change places": lambda x: DOWN(UP(x).flip(-1)),
    "a reshape that moves columns": lambda x: DOWN(UP(x).view(2, WIDE, 3).relu().view(2, 3, WIDE)),
    "parts that lie between each other": lambda x: DOWN(FUSED(x)[..., ::2]),
    "a part that nobody reads": lambda x: DOWN(F.silu(FUSED(x).chunk(2, dim=-1)[0])),
    "one Linear twice": lambda x: F.linear(F.linear(x, TIED), TIED),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_left_alone(why: str) -> None:
    blocks, found = find(LEFT_ALONE[why], X)
    assert len(found.nodes(LINEAR)) >= 2
    assert blocks == []


def test_not_under_autocast() -> None:
    """Parts of a Linear are computed in autocast's dtype, what lies between them elsewhere in others."""
    with torch.autocast("cpu", torch.bfloat16):
        blocks, found = find(gate_up, X)
    assert len(found.nodes(LINEAR)) == 3
    assert blocks == []


def test_the_option() -> None:
    assert find(gate_up, X, pair_mlp=False)[0] == []
    blocks, found = find(LEFT_ALONE["the input itself"], X, pair_mlp=True)
    assert blocks == []
    assert [(refusal.where, "pointwise" in refusal.reason) for refusal in found.refusals] == [("pair_mlp", True)]
