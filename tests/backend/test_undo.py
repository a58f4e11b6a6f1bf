"""Which writes of a step can be repeated, and that the others are taken back or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.steps.undo import COPIED_BYTES, HostWrites, Undo, host_writes
from tests.passes.graphs import case


def _rows(x: Tensor, at: Tensor, y: Tensor) -> Any:
    x.index_copy_(0, at, y)
    return x + 1


def _slice(x: Tensor, at: Tensor, y: Tensor) -> Any:
    x[:2] = y
    return x * 2


def _read_before(x: Tensor, at: Tensor, y: Tensor) -> Any:
    z = x.sum()
    x.index_copy_(0, at, y)
    return z


def _twice(x: Tensor, at: Tensor, y: Tensor) -> Any:
    x.index_copy_(0, at, y)
    z = x + 1
    x[1:2] = y[:1]
    return z


def _counted(x: Tensor, at: Tensor, y: Tensor) -> Any:
    x.add_(1)
    return x * 2


def _rolled(x: Tensor, at: Tensor, y: Tensor) -> Any:
    x.copy_(x.roll(1, 0))
    return x + y.sum()


def _accumulated(x: Tensor, at: Tensor, y: Tensor) -> Any:
    x.index_put_((at,), y, accumulate=True)
    return x * 2


@pytest.mark.parametrize(
    ("function", "fragile"),
    [
        (_rows, False),
        (_slice, False),
        (_read_before, True),
        (_twice, True),
        (_counted, True),
        (_rolled, True),
        (_accumulated, True),
    ],
)
def test_what_a_second_run_would_not_repeat(function: Callable[..., Any], fragile: bool) -> None:
    found = case(function, torch.zeros(4, 3), torch.tensor([0, 2]), torch.ones(2, 3))
    writes = host_writes(found.module.graph)
    written = [found.inputs[i].shape for i in writes.inputs]
    assert written == ([torch.Size([4, 3])] if fragile else [])
    assert not writes.random


@pytest.mark.parametrize("inference", [False, True])
def test_small_tensors_are_put_back(inference: bool) -> None:
    with torch.inference_mode(inference):
        counter = torch.tensor([3])
    undo = Undo(HostWrites((0,), random=False), [counter])
    with torch.inference_mode(inference):
        counter.add_(1)
    assert undo.restore()
    assert counter.item() == 3


@pytest.mark.parametrize("written", [False, True])
def test_large_tensors_forbid_the_second_run_once_they_are_written(written: bool) -> None:
    cache = torch.zeros(COPIED_BYTES // 4 + 1)
    undo = Undo(HostWrites((0,), random=False), [cache])
    if written:
        cache.add_(1)
    assert undo.restore() is not written


def test_random_numbers_start_again() -> None:
    undo = Undo(HostWrites((), random=True), [])
    first = torch.rand(3)
    assert undo.restore()
    assert torch.equal(torch.rand(3), first)
