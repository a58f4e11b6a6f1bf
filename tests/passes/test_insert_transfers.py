"""Start and wait nodes at every border: nothing is read on a side where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.ir import HOST_LINEAR, JOIN, MIRROR, TO_ACCELERATOR, TO_HOST, WAIT_ACCELERATOR
from hetegen_compile.passes.insert_transfers import insert_transfers, operand_side, value_side
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.split_linears import split_linears
from tests.passes.graphs import Case, assert_equal_to_eager, halves, on_host, planned, quarters, resident, streamed
from tests.passes.test_group_segments import FUNCTIONS, TABLE, A, B, C, X, siblings


def crossed(function: Any, *inputs: Any, plan: Callable[[int], LinearPlan] = halves) -> Case:
    found = planned(function, *inputs, plan=plan)
    found.apply(split_linears)
    found.apply(insert_transfers)
    return found


def test_a_host_part_gets_its_input_and_sends_its_result_up() -> None:
    assert crossed(lambda x: A(x + 1), X).text == """\
t1 = mirror(A.bias)
t2 = mirror(x)
t3 = segment_0(t2)
t4 = t3[0]
t5 = prefetch(A.weight, [32, 64], 0, -1, [])
t6 = wait(t5)
t7 = partial_linear(t4, t6, t1, 32, 64, 0)
t8 = release(t5)
t9 = to_host([t4])
t10 = wait_host(t9)
t11 = t10[0]
t12 = host_linear(t11, A.weight, A.bias, 0, 32, 0)
t13 = to_accelerator([t12])
t14 = wait_accelerator(t13)
t15 = t14[0]
t16 = join([t15, t7], 0)
t17 = to_host([t16])
t18 = wait_host(t17)
t19 = t18[0]
return (t19,)"""  # fmt: skip


def test_siblings_share_one_trip_down_and_one_up() -> None:
    found = crossed(lambda x: siblings(x + 1), X, plan=on_host)
    downloads = found.nodes(TO_HOST)
    assert len(downloads) == 3  # the input of A and B, the input of C, the result
    assert [len(up.args[0]) for up in found.nodes(TO_ACCELERATOR)] == [2, 1]


@pytest.mark.parametrize("plan", [halves, quarters, on_host])
def test_joins_follow_the_trip_that_their_parts_share(plan: Callable[[int], LinearPlan]) -> None:
    def function(x: Tensor) -> Any:
        return _three(x + 1)

    found = crossed(function, X, plan=plan)
    (up,) = found.nodes(TO_ACCELERATOR)
    assert [part.target for part in up.args[0]] == [HOST_LINEAR] * 3
    (wait,) = found.nodes(WAIT_ACCELERATOR)
    assert all(wait < join for join in found.nodes(JOIN))
    assert_equal_to_eager(function, X)


def test_without_shared_trips_each_linear_has_its_own() -> None:
    found = planned(lambda x: _three(x + 1), X, share_trips=False)
    found.apply(split_linears)
    found.apply(insert_transfers)
    assert len(found.nodes(TO_ACCELERATOR)) == 3
    assert len(found.nodes(TO_HOST)) == 4  # and the result
    assert_equal_to_eager(lambda x: _three(x + 1), X, share_trips=False)


def _three(x: Tensor) -> Any:
    return A(x) + B(x) * C(x)


def test_what_the_caller_gets_comes_down_together() -> None:
    found = crossed(lambda x: (A(x), B(x), A(x) + B(x)), X, plan=streamed)
    (down,) = found.nodes(TO_HOST)
    assert len(down.args[0]) == 3


def test_a_result_that_a_host_part_reads_too_comes_down_once() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = A(x)
        return B(y), y

    found = crossed(function, X)
    operands = [operand for node in found.nodes(TO_HOST) for operand in node.all_input_nodes]
    assert len(operands) == len(set(operands)) == 2  # y and B(y)


@pytest.mark.parametrize("plan", [resident, streamed])
def test_without_host_parts_only_the_result_crosses(plan: Callable[[int], LinearPlan]) -> None:
    found = crossed(siblings, X, plan=plan)
    assert len(found.nodes(TO_HOST)) == 1
    assert found.nodes(TO_ACCELERATOR) == []


def test_an_input_has_one_mirror() -> None:
    found = crossed(lambda x: A(x) + B(x) + (x * 2), X, plan=quarters)
    mirrored = [node.args[0] for node in found.nodes(MIRROR)]
    assert len(mirrored) == len(set(mirrored)) == 3  # x and two biases


def test_a_value_of_the_host_goes_up_once_and_is_read_where_it_is() -> None:
    assert crossed(lambda ids: A(TABLE(ids)), torch.tensor([2])).text.splitlines()[1:6] == [
        "t2 = embedding(ids, TABLE.weight, None, None, 2.0, False, False)",
        "t3 = to_accelerator([t2])",
        "t4 = wait_accelerator(t3)",
        "t5 = t4[0]",
        "t6 = prefetch(A.weight, [32, 64], 0, -1, [])",
    ]
    found = crossed(lambda ids: A(TABLE(ids)) + B(TABLE(ids)), torch.tensor([2]), plan=on_host)
    assert "host_linear(t1, A.weight" in found.text  # no trip


def test_a_host_only_graph_has_no_transfers() -> None:
    found = crossed(lambda ids: ids + 1, torch.tensor([2]))
    assert found.text == "t1 = add(ids, 1)\nreturn (t1,)"


@pytest.mark.parametrize("plan", [halves, quarters])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operand_is_where_it_is_read(name: str, plan: Callable[[int], LinearPlan]) -> None:
    function, inputs = FUNCTIONS[name]
    found = crossed(function, *inputs, plan=plan)
    edges = [(user, operand) for user in found.module.graph.nodes for operand in user.all_input_nodes]
    sides = [(operand_side(user, operand), value_side(operand)) for user, operand in edges]
    assert all(reads == lies for reads, lies in sides if reads is not None and lies is not None)
    assert {"host", "accelerator"} <= {reads for reads, _ in sides}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numerics(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    own, eager = ([x.clone() for x in inputs] for _ in range(2))
    found = crossed(function, *own, plan=quarters)
    assert found.nodes(TO_HOST)
    with torch.no_grad():
        expected = function(*eager)
    torch.testing.assert_close(tuple(found.outputs()), expected if isinstance(expected, tuple) else (expected,))
    torch.testing.assert_close(own, eager)


# ---- values that are written in place, and inputs of the call ---------------------------------------------------


def read_written_read(x: Tensor) -> tuple[Tensor, Tensor]:
    y = A(x)
    before = B(y)
    y.add_(1.0)
    return before, C(y)


def read_written_returned(x: Tensor) -> tuple[Tensor, Tensor]:
    y = A(x)
    before = B(y)
    y.add_(1.0)
    return before, y


def input_read_written(x: Tensor) -> Any:
    y = A(x)
    x.mul_(y)  # write_back reads the same download as A's host part
    return y


@pytest.mark.parametrize("function", [read_written_read, read_written_returned, input_read_written])
def test_a_value_that_is_written_between_two_host_readers_comes_down_twice(function: Callable[[Tensor], Any]) -> None:
    found = assert_equal_to_eager(function, X)
    down = [operand for node in found.nodes(TO_HOST) for operand in node.args[0]]
    assert len(down) == len(set(down)) + 1  # one value twice, before the write and after it


def test_readers_on_one_side_of_a_write_share_a_download() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = A(x)
        before = B(y) + C(y)
        y.add_(1.0)
        return before, B(y), C(y)

    found = assert_equal_to_eager(function, X)
    down = [operand for node in found.nodes(TO_HOST) for operand in node.args[0]]
    assert len(down) == 5  # y before the write, y after it, three results
    assert len(set(down)) == 4


def test_a_host_part_reads_an_input_of_the_call_where_it_is() -> None:
    found = crossed(lambda x: A(x), X)
    assert "host_linear(x, A.weight" in found.text
    (down,) = found.nodes(TO_HOST)
    assert [node.target for node in down.args[0]] == [JOIN]


def test_a_host_part_does_not_read_an_input_that_the_accelerator_writes() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        x.mul_(y)
        return A(x)

    found = crossed(function, X.clone(), torch.randn(64))
    assert found.nodes(HOST_LINEAR)
    assert "host_linear(x, " not in found.text
    assert_equal_to_eager(function, X, torch.randn(64))
