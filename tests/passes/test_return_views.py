"""Results in memory that the program computes into: returned as views of an input or of one copy, or left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes.graphs import assert_equal_to_eager, case

A = nn.Linear(64, 64)
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def input_written(x: Tensor) -> Any:
    y = x.mul_(2)
    return A(y), y, y[1:]


def made_and_written(x: Tensor) -> Any:
    y = A(x)
    z = y.mul_(3)
    return y.view(-1), z, z[0]


def test_of_an_input_the_views_are_returned_that_are_left_without_the_writes() -> None:
    assert case(input_written, X.clone()).text == """\
t1 = x.mul_(2)
t2 = linear(t1, A.weight, A.bias)
t3 = x[slice(1, None, None)]
return (t2, x, t3)"""  # fmt: skip


def test_what_the_program_makes_is_copied_once_and_the_copy_viewed() -> None:
    assert case(made_and_written, X).text == """\
t1 = linear(x, A.weight, A.bias)
t2 = t1.mul_(3)
t3 = clone(t1)
t4 = t3.view(-1)
t5 = t3[0]
return (t4, t3, t5)"""  # fmt: skip


def views_of_what_nobody_writes(x: Tensor) -> Any:
    y = A(x)
    return y, y[0]


def one_result(x: Tensor) -> Any:
    return A(x).mul_(3)[0]


def only_moved(x: Tensor) -> Any:
    x[0] = 1.0
    return x[1:], A(x)


@pytest.mark.parametrize("function", [views_of_what_nobody_writes, one_result, only_moved])
def test_left_alone(function: Any) -> None:
    assert "clone" not in case(function, X.clone()).text


@pytest.mark.parametrize("function", [made_and_written, views_of_what_nobody_writes, one_result])
def test_the_scheduled_graph_is_eager(function: Any) -> None:
    assert_equal_to_eager(function, X)
