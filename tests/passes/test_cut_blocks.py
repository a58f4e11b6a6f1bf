"""A block that is cut as one: the host's columns go through it on the host, one partial sum crosses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hetegen_compile import ir
from hetegen_compile.cost_model import accelerator_op_s
from hetegen_compile.ir import info
from hetegen_compile.passes.insert_transfers import insert_transfers
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.schedule import schedule
from hetegen_compile.passes.split_linears import split_linears
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import planned, scheduled

WIDE = 128
torch.manual_seed(0)
GATE, UP = (nn.Linear(64, WIDE, bias=False) for _ in range(2))
DOWN = nn.Linear(WIDE, 64)
FUSED = nn.Linear(64, 2 * WIDE)
CONV_UP, CONV_DOWN = Conv1D(WIDE, 64), Conv1D(64, WIDE)
QUERY = nn.Linear(64, 64)
X = torch.randn(2, 3, 64)


def gate_up(x: Tensor) -> Any:
    return DOWN(F.silu(GATE(x)) * UP(x))


def fused(x: Tensor) -> Any:
    gate, up = FUSED(x).chunk(2, dim=-1)
    return DOWN(up * F.silu(gate))


def conv1d(x: Tensor) -> Any:
    return CONV_DOWN(torch.tanh(CONV_UP(x)) * 0.5)


def parallel(x: Tensor) -> Any:
    """The segment between the block's Linears does something else, too."""
    mixed = QUERY(x).softmax(-1)
    return DOWN(F.gelu(UP(x))), mixed


def test_gate_and_up() -> None:
    found = planned(gate_up, X, paired=0.25)
    found.apply(split_linears)
    assert found.text == """\
t1 = mirror(x)
t2 = prefetch(GATE.weight, [32, 128], 0, -1, [])
t3 = wait(t2)
t4 = partial_linear(t1, t3, None, 32, 128, 0)
t5 = release(t2)
t6 = host_linear(t1, GATE.weight, None, 0, 32, 0)
t7 = pad(t1, [t4], [32], 128)
t8 = prefetch(UP.weight, [32, 128], 0, -1, [])
t9 = wait(t8)
t10 = partial_linear(t1, t9, None, 32, 128, 0)
t11 = release(t8)
t12 = host_linear(t1, UP.weight, None, 0, 32, 0)
t13 = pad(t1, [t10], [32], 128)
t14 = segment_1(t7, t13)
t15 = t14[0]
t16 = prefetch(DOWN.weight, [0, 64, 32, 128], 2, -1, [])
t17 = wait(t16)
t18 = partial_linear(t15, t17, None, 32, 128, 0, 1)
t19 = release(t16)
t20 = join([t18], 0)
t21 = silu(t6)
t22 = mul(t21, t12)
t23 = host_linear(t22, DOWN.weight, DOWN.bias, 0, 32, 0, 1)
t24 = join([t23, t20], 1)
return (t24,)"""  # fmt: skip
    on_host = [node for node in found.module.graph.nodes if info(node).side == "host"]
    assert [tuple(info(node).value.shape) for node in on_host] == [(2, 3, 32)] * 4 + [(2, 3, 64)]


BLOCKS: list[Callable[[Tensor], Any]] = [gate_up, fused, conv1d, parallel]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("function", BLOCKS)
def test_equal_to_eager_with_one_trip(function: Callable[[Tensor], Any], share: float) -> None:
    with torch.no_grad():
        expected = function(X)
    found = scheduled(function, X, paired=share, ring_bytes=2**15)
    verify(found.module, found.context)
    for actual, wanted in zip(found.outputs(), expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(actual, wanted)
    others = 1 if function is parallel else 0
    assert len(found.nodes(ir.TO_ACCELERATOR)) == 1 + others
    assert bool(found.nodes(ir.PAD)) == (share < 1 or function is parallel)
    assert bool(found.nodes(ir.PREFETCH)) == (share < 1 or function is parallel)


def test_a_block_on_the_host_leaves_nothing_on_the_accelerator() -> None:
    found = scheduled(gate_up, X, paired=1.0)
    assert not found.module.graph.find_nodes(op="call_module")
    assert not found.nodes(ir.PAD)


def test_through_the_pinned_ring() -> None:
    """Rectangles and columns are staged as what they are; what the ring holds is contiguous."""
    for function in (gate_up, conv1d):
        found = planned(function, X, paired=0.5)
        weights = {node.args[1].name: "a test" for node in found.nodes(ir.LINEAR)}
        found.context = replace(found.context, staged=weights)
        for stage in (split_linears, insert_transfers, schedule):
            found.apply(stage)
        verify(found.module, found.context)
        assert len(found.nodes(ir.STAGE)) == len(found.nodes(ir.PREFETCH)) > 0
        with torch.no_grad():
            torch.testing.assert_close(found.outputs()[0], function(X))


def test_putting_parts_in_place_costs_no_more_than_moving_them() -> None:
    """The notes of the whole Linear, which it stands for, have the traffic of all its weights."""
    found = scheduled(gate_up, X, paired=0.25)
    pad = found.nodes(ir.PAD)[0]
    moved_s = accelerator_op_s(found.context.profile, "float32", 0.0, 2.0 * 6 * WIDE * 4)
    assert node_work(pad, found.context).seconds == pytest.approx(moved_s)
