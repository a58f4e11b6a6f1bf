"""Moved data that the host needs is repeated there or downloaded: by bytes, and where they are equal by what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.backend import make_backend
from hetegen_compile.steps.segments import plain_compiler
from tests.passes.graphs import assert_equal_to_eager
from tests.passes.test_place_nodes import placed, with_sides

A, B = nn.Linear(64, 64), nn.Linear(64, 64)


def test_what_is_copied_together_comes_down_by_itself_where_its_parts_are_no_fewer_bytes() -> None:
    """Keys of which a part is rotated (Phi, GPT-J): the host had put them together once more."""

    def partly_rotated(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        key = A(x)
        key = torch.cat([key[..., :32].sin(), key[..., 32:]], -1)
        keys = torch.cat([past, key])
        return B(torch.softmax(x @ keys.t(), -1) @ keys), keys

    sides = with_sides(placed(partly_rotated, torch.randn(1, 64), torch.randn(6, 64))).splitlines()
    key, keys = (line for line in sides if " cat(" in line)
    assert key.endswith("# accelerator")
    assert keys.endswith("# both")
    assert_equal_to_eager(partly_rotated, torch.randn(1, 64), torch.randn(6, 64))


def _overwritten(x: Tensor, at: Tensor, cache: Tensor) -> Any:
    key = A(x)
    key = torch.cat([key[..., :32].sin(), key[..., 32:]], -1)
    key[..., :4] = 0
    return cache.index_copy_(0, at, key)


def _masked(x: Tensor, at: Tensor, cache: Tensor) -> Any:
    key = A(x).sin().clone()
    key.masked_fill_(x > 0, 0.0)
    return cache.index_copy_(0, at, key)


def _item_of_a_list(x: Tensor, at: Tensor, cache: Tensor) -> Any:
    (key,) = torch.split(A(x), [64], -1)
    return cache.index_copy_(0, at, key)


def _narrowed(x: Tensor, at: Tensor, cache: Tensor) -> Any:
    return cache.index_copy_(0, at, A(x).narrow(0, 0, 1))


@pytest.mark.parametrize("make", [_overwritten, _masked, _item_of_a_list, _narrowed])
def test_what_is_written_viewed_or_an_item_is_repeated_where_that_is_as_many_bytes(make: Any) -> None:
    def function(x: Tensor, at: Tensor, cache: Tensor) -> Any:
        make(x, at, cache)
        return B(torch.softmax(x @ cache.t(), -1) @ cache)

    given = torch.randn(1, 64), torch.tensor([3]), torch.randn(6, 64)
    assert_equal_to_eager(function, *given)
    own, eager = ([value.clone() for value in given] for _ in range(2))
    options: dict[str, Any] = {"accelerator": "emulated", "hardware": "cpu-emulated", "split": 0.5}
    compiled: Any = torch.compile(function, backend=make_backend(plain_compiler), fullgraph=True, options=options)
    torch._dynamo.reset()
    with torch.no_grad():  # with the checks of a plan that is to be run
        torch.testing.assert_close(compiled(*own), function(*eager))
    torch.testing.assert_close(own, eager)
