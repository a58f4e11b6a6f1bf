"""What the host makes is copied before the accelerator writes it: fires, leaves alone, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.passes.graphs import assert_equal_to_eager, case

A, B = nn.Linear(64, 64), nn.Linear(64, 64)
TABLE, MORE = nn.Embedding(100, 64), nn.Embedding(100, 64)
IDS = torch.tensor([3, 5, 8])


def scaled(ids: Tensor) -> tuple[Tensor, Tensor]:
    x = TABLE(ids)
    x.mul_(8.0)
    return B(torch.relu(A(x))), x


def written_through_a_view(ids: Tensor) -> Any:
    x = TABLE(ids)
    first = x[:1]
    x += MORE(ids)
    first.copy_(torch.ones(1, 64))
    return B(torch.relu(A(x) + first))


def scaled_noise(ids: Tensor) -> Any:
    noise = torch.randn(3, 64)
    noise *= A(TABLE(ids))
    return B(noise)


def test_a_lookup_that_is_scaled_in_place_is_copied_and_the_copy_is_scaled() -> None:
    assert case(scaled, IDS).text == """\
t1 = embedding(ids, TABLE.weight, None, None, 2.0, False, False)
t2 = clone(t1)
t3 = t2.mul_(8.0)
t4 = linear(t2, A.weight, A.bias)
t5 = relu(t4)
t6 = linear(t5, B.weight, B.bias)
return (t6, t2)"""  # fmt: skip


def not_written(ids: Tensor) -> Any:
    return A(TABLE(ids) * 8.0)


def written_by_the_accelerator_alone(ids: Tensor) -> Any:
    x = A(TABLE(ids))
    x.mul_(8.0)
    return B(x)


def written_by_the_host_alone(ids: Tensor) -> Any:
    x = torch.randn(3, 64)
    x.normal_()
    return A(F.embedding(ids, x))


@pytest.mark.parametrize("function", [not_written, written_by_the_accelerator_alone, written_by_the_host_alone])
def test_nothing_is_copied_where_one_side_makes_and_writes(function: Any) -> None:
    assert "clone" not in case(function, IDS).text


@pytest.mark.parametrize("function", [scaled, written_through_a_view, scaled_noise])
def test_the_scheduled_graph_is_eager(function: Any) -> None:
    assert "clone" in case(function, IDS).text
    assert_equal_to_eager(function, IDS)
