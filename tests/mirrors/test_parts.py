"""Several tensors in one storage: what their mirrors hold is what the accelerator counts, and no write is missed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.mirrors import WEIGHTS, Mirrors, Request

PLENTY = 1 << 20


def held_on(accelerator: EmulatedAccelerator) -> int:
    accelerator.synchronize()
    return sum(accelerator.counters.held_bytes.values())


def rows(weight: Tensor, resident: int, first: int) -> Request:
    """The last rows of a weight of which all from ``resident`` on are resident."""
    return Request(weight[first:], "w", WEIGHTS, watched=True, base=weight[resident:])


def test_rows_that_leave_free_what_they_were_uploaded_with(accelerator: EmulatedAccelerator) -> None:
    """A view of the last rows keeps all of what was uploaded: it goes with it."""
    mirrors, storage = Mirrors(accelerator), torch.randn(64, 32)
    one, other = storage[:32], storage[32:]
    mirrors.begin_step()
    mirrors.fetch([rows(one, 8, 16), rows(other, 16, 24)], PLENTY)
    first = mirrors.held_bytes(WEIGHTS)
    assert first == (24 + 16) * 32 * 4 == held_on(accelerator)
    mirrors.begin_step()
    mirrors.fetch([rows(one, 24, 24), rows(other, 16, 24)], 24 * 32 * 4)  # no room for what the first step held
    assert mirrors.held_bytes(WEIGHTS) == (8 + 16) * 32 * 4
    assert held_on(accelerator) == mirrors.held_bytes(WEIGHTS)


def test_views_that_are_written_in_turn_are_not_uploaded_again(accelerator: EmulatedAccelerator) -> None:
    """Each shows what the other wrote, since both are views of one mirror."""
    mirrors, storage = Mirrors(accelerator), torch.zeros(8, 32)
    views = [storage[:4], storage[4:]]
    moved = []
    for turn in range(6):
        mirrors.begin_step()
        values: list[Any] = mirrors.fetch([Request(view, "cache", whole=True) for view in views], PLENTY)
        written = views[turn % 2]
        written.add_(1.0)
        values[turn % 2] = accelerator.launch(Op("write"), torch.Tensor.add_, (values[turn % 2], 1.0), mutates=(0,))
        mirrors.settle([written])
        accelerator.synchronize()
        moved.append(sum(accelerator.counters.uploaded_bytes.values()))
    assert moved == [storage.nbytes] * 6


def test_two_parameters_with_counters_of_their_own_stay_in_one_mirror(accelerator: EmulatedAccelerator) -> None:
    """One is made of the other's ``data``: nothing is uploaded until one of them is written."""
    mirrors, weight = Mirrors(accelerator), torch.zeros(8, 32)
    weight.add_(1.0)
    pair = [weight, weight.data]
    moved = []
    for turn in range(4):
        mirrors.begin_step()
        requests = [Request(one, "w", WEIGHTS) for one in pair]
        assert len(mirrors.fetch(requests, PLENTY)) == 2
        assert mirrors.stand(pair, requests) is not None
        accelerator.synchronize()
        moved.append(sum(accelerator.counters.uploaded_bytes.values()) // weight.nbytes)
        if turn == 1:
            pair[1].add_(1.0)
    assert moved == [1, 1, 2, 2]
