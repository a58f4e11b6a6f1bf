"""A part that reads something else than the program, or is put together elsewhere, is an error of the verifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from hetegen_compile import ir
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import annotate, info
from hetegen_compile.operands import linear_part
from hetegen_compile.passes.check_linears import check_linears
from hetegen_compile.passes.check_parts import check_parts, origin
from hetegen_compile.passes.context import require
from hetegen_compile.passes.measure_memory import measure_memory
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import Case, quarters, scheduled

FIRST, SECOND, UP, DOWN = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)
STORED_IN_OUT = Conv1D(64, 64)


def two(x: Tensor) -> Any:
    return SECOND(F.relu(FIRST(x)))


def mlp(x: Tensor) -> Any:
    return DOWN(F.relu(UP(x)))


def in_out(x: Tensor) -> Any:
    return STORED_IN_OUT(x)


def rows() -> Case:
    """Host, streamed and resident columns of the result of two Linears of one shape."""
    return scheduled(two, torch.randn(1, 64), plan=quarters, ring_bytes=2**15)


def sums() -> Case:
    """The same of a Linear that is cut along its inputs."""
    return scheduled(in_out, torch.randn(1, 64), plan=quarters, ring_bytes=2**15)


def block() -> Case:
    return scheduled(mlp, torch.randn(1, 64), paired=0.25, ring_bytes=2**15)


def pieces() -> Case:
    """A block whose partial sums on the accelerator are computed in pieces: the ring is too short for more."""
    return scheduled(mlp, torch.randn(1, 64), paired=0.25, ring_bytes=2**13)


def check(found: Case) -> None:
    check_linears(found.module.graph, require(found.context.effects, "note_effects").linears)


def parts(found: Case, target: Any, of: int = -1) -> list[fx.Node]:
    """Those of one Linear: the last one of the program, or the ``of``-th."""
    position = sorted({info(node).position for node in found.nodes(ir.HOST_LINEAR)})[of]
    return [node for node in found.nodes(target) if info(node).position == position]


def other_activations(found: Case) -> None:
    parts(found, ir.HOST_LINEAR)[0].update_arg(0, origin(linear_part(parts(found, ir.HOST_LINEAR, 0)[0]).x))


def other_weight(found: Case) -> None:
    parts(found, ir.HOST_LINEAR)[0].update_arg(1, linear_part(parts(found, ir.HOST_LINEAR, 0)[0]).weight)


def other_layout(found: Case) -> None:
    parts(found, ir.HOST_LINEAR)[0].update_arg(5, 1)


def other_bias(found: Case) -> None:
    parts(found, ir.HOST_LINEAR)[0].update_arg(2, linear_part(parts(found, ir.HOST_LINEAR, 0)[0]).bias)


def no_bias(found: Case) -> None:
    parts(found, ir.PARTIAL_LINEAR)[-1].update_arg(2, None)


def no_bias_in_sum(found: Case) -> None:
    for part in parts(found, ir.PARTIAL_LINEAR):
        part.update_arg(2, None)


def bias_twice(found: Case) -> None:
    every = [*parts(found, ir.PARTIAL_LINEAR), *parts(found, ir.HOST_LINEAR)]
    (biased,) = (part for part in every if linear_part(part).bias is not None)
    next(part for part in every if part is not biased).update_arg(2, origin(linear_part(biased).bias))


def of_join(found: Case, change: Callable[[list[fx.Node]], list[fx.Node]]) -> None:
    join = parts(found, ir.JOIN)[-1]
    join.update_arg(0, change(list(join.args[0])))  # type: ignore[arg-type]


def lost(found: Case) -> None:
    of_join(found, lambda nodes: nodes[:-1])


def doubled(found: Case) -> None:
    of_join(found, lambda nodes: [*nodes, nodes[-1]])


def swapped(found: Case) -> None:
    of_join(found, lambda nodes: nodes[::-1])


def added(found: Case) -> None:
    parts(found, ir.JOIN)[-1].update_arg(1, 1)


def side_by_side(found: Case) -> None:
    parts(found, ir.JOIN)[-1].update_arg(1, 0)


def not_padded(found: Case) -> None:
    pad = parts(found, ir.PAD, 0)[-1]
    pad.update_arg(1, [])
    pad.update_arg(2, [])


def fewer_columns(found: Case) -> None:
    """What lies between is skipped: the first Linear's input is as wide as half of the columns."""
    part = parts(found, ir.HOST_LINEAR)[0]
    part.update_arg(0, linear_part(parts(found, ir.HOST_LINEAR, 0)[0]).x)


def without_its_join(found: Case) -> None:
    join = parts(found, ir.JOIN)[-1]
    join.replace_all_uses_with(join.args[0][-1])  # type: ignore[index, arg-type]
    found.module.graph.erase_node(join)


def without_its_pad(found: Case) -> None:
    pad = parts(found, ir.PAD, 0)[-1]
    pad.replace_all_uses_with(pad.args[1][0])  # type: ignore[index, arg-type]
    found.module.graph.erase_node(pad)


def of_no_linear(found: Case) -> None:
    for part in (*parts(found, ir.HOST_LINEAR), *parts(found, ir.PARTIAL_LINEAR)):
        annotate(part, position=info(part).position + 1000)


def inner_sum(found: Case) -> None:
    """The pieces of a partial sum are put side by side in a join of their own."""
    inner = next(join for join in parts(found, ir.JOIN) if join.args[1] == 0)
    inner.update_arg(1, 1)


def reads_later_columns(found: Case) -> None:
    part = parts(found, ir.HOST_LINEAR)[0]
    part.update_arg(3, 16)


def accelerator_reads_columns(found: Case) -> None:
    first = parts(found, ir.PARTIAL_LINEAR)[0]
    first.update_arg(0, parts(found, ir.HOST_LINEAR)[0].args[0])


@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        (rows, other_activations, "multiplies .*, which the program does not there"),
        (rows, other_weight, "multiplies with .*, which is not the program's weight"),
        (rows, other_layout, "multiplies with .*, which is not the program's weight"),
        (rows, other_bias, "adds .*bias.*, which is not the program's bias"),
        (rows, no_bias, "3 of .* add the bias, which 4 of them are to add"),
        (rows, lost, "is not what is put together in .*missing edge"),
        (rows, doubled, "is not what is put together in"),
        (rows, swapped, "puts side by side columns 48:64, 32:48, 16:32, 0:16"),
        (rows, added, "adds columns 0:16, 16:32, 32:48, 48:64"),
        (sums, no_bias_in_sum, "0 of .* add the bias, which 1 of them are to add"),
        (sums, bias_twice, "2 of .* add the bias, which 1 of them are to add"),
        (sums, lost, "is not what is put together in .*missing edge"),
        (sums, doubled, "is not what is put together in"),
        (sums, side_by_side, "puts side by side columns 0:64, 0:64, 0:64, 0:64"),
        (block, not_padded, "is not what is put together in .*missing edge"),
        (block, fewer_columns, "multiplies .*, which the program does not there"),
        (block, lost, "is not what is put together in"),
        (block, bias_twice, "2 of .* add the bias, which 1 of them are to add"),
        (block, side_by_side, "puts side by side columns 0:64, 0:64"),
        (rows, without_its_join, "is not what is put together in None; missing edge"),
        (sums, without_its_join, "is not what is put together in None; missing edge"),
        (block, without_its_pad, "is not what is put together in None; missing edge"),
        (rows, of_no_linear, "is part of no Linear of the program"),
        (pieces, inner_sum, "adds columns"),
        (block, reads_later_columns, "multiplies .*, which the program does not there"),
        (block, accelerator_reads_columns, "multiplies .*, which the program does not there"),
    ],
)
def test_changed_schedules(made: Callable[[], Case], change: Callable[[Case], None], message: str) -> None:
    found = made()
    check(found)
    change(found)
    with pytest.raises(ScheduleError, match=f"^verify: .*{message}"):
        check(found)


def test_a_linear_that_nothing_computes() -> None:
    found = rows()
    program = require(found.context.effects, "note_effects").linears
    last = max(program)
    with pytest.raises(ScheduleError, match=f"of the Linear at {last + 1} in the program no part is computed"):
        check_linears(found.module.graph, {**program, last + 1: program[last]})


@pytest.mark.parametrize("change", [other_bias, swapped, added])
def test_the_verifier_sees_what_uses_every_element_once(change: Callable[[Case], None]) -> None:
    found = rows()
    change(found)
    check_parts(found.module.graph)
    found.apply(measure_memory)
    with pytest.raises(ScheduleError, match="adds|side by side"):
        found.apply(verify)


def test_sums_in_another_order_are_the_same() -> None:
    found = sums()
    swapped(found)
    check(found)
