"""Slots of the pinned ring: places, order, numerics, and a verifier that finds each broken edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hetegen_compile.errors import MissingWaitError, ScheduleError, SlotInUseError
from hetegen_compile.ir import HOST_LINEAR, LINEAR, PREFETCH, STAGE
from hetegen_compile.passes.insert_transfers import insert_transfers
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.schedule import pinned_ring_bytes, schedule, slot_bytes
from hetegen_compile.passes.split_linears import split_linears
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import Case, again, planned, property_test, quarters

WIDTHS = (64, 128, 64, 256, 64, 64, 128, 64)
LAYERS = nn.ModuleList([nn.Linear(one, two) for one, two in zip(WIDTHS, WIDTHS[1:], strict=False)])
X = torch.randn(2, 64)


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


def staged_chain(plan: Callable[[int], LinearPlan], keep: int = 1) -> Case:
    """Scheduled, with every ``keep``-th weight staged."""
    found = planned(chain, X, plan=plan, ring_bytes=1 << 17)
    weights = [node.args[1].name for node in found.nodes(LINEAR)]
    found.context = replace(found.context, staged=dict.fromkeys(weights[::keep], "a test"))
    for stage in (split_linears, insert_transfers, schedule):
        found.apply(stage)
    return found


def pieces(count: int) -> Callable[[int], LinearPlan]:
    """Everything streamed in ``count`` pieces."""

    def plan(rows: int) -> LinearPlan:
        ends = [rows * i // count for i in range(count + 1)]
        return LinearPlan(rows, 0, tuple(zip(ends, ends[1:], strict=False)), None)

    return plan


@pytest.fixture(scope="module")
def good() -> Case:
    found = staged_chain(quarters)
    verify(found.module, found.context)
    return found


def order(found: Case) -> dict[Any, int]:
    return {node: place for place, node in enumerate(found.module.graph.nodes)}


def test_results_are_eagers(good: Case) -> None:
    with torch.no_grad():
        (result,) = good.outputs()
        torch.testing.assert_close(result, chain(X))
    assert len(good.nodes(STAGE)) == len(good.nodes(PREFETCH)) == 14
    assert good.nodes(HOST_LINEAR)


@property_test
@given(st.integers(1, 8), st.integers(1, 3))
def test_no_two_live_pinned_slots_overlap(count: int, keep: int) -> None:
    """Lifetimes derived anew: from a stage's issue to the last stage that is ordered before its reader's end."""
    found = staged_chain(pieces(count), keep)
    verify(found.module, found.context)
    stages, place = found.nodes(STAGE), order(found)
    ring = pinned_ring_bytes(found.module.graph)
    done: set[Any] = set()
    live: list[tuple[int, int, Any]] = []
    for stage in stages:
        done |= {prefetch.args[0] for prefetch in stage.args[4]}
        live = [slot for slot in live if slot[2] not in done]
        lo, hi = stage.args[3], stage.args[3] + slot_bytes(stage)
        assert 0 <= lo < hi <= ring
        assert lo % 256 == 0
        assert all(hi <= other_lo or other_hi <= lo for other_lo, other_hi, _ in live)
        assert all(place[prefetch] < place[stage] for prefetch in stage.args[4])
        (reader,) = stage.users
        assert place[stage] < place[reader]
        live.append((lo, hi, stage))
    assert stages == sorted(stages, key=lambda stage: place[stage.users.copy().popitem()[0]])


def test_the_pinned_ring_is_bounded_by_its_slots(good: Case) -> None:
    largest = max(map(slot_bytes, good.nodes(STAGE)))
    assert pinned_ring_bytes(good.module.graph) == 4 * largest
    assert sum(map(slot_bytes, good.nodes(STAGE))) > 4 * largest
    assert pinned_ring_bytes(staged_chain(quarters, keep=len(LAYERS)).module.graph) < 4 * largest


def test_nothing_staged_takes_no_ring() -> None:
    found = planned(chain, X)
    for stage in (split_linears, insert_transfers, schedule):
        found.apply(stage)
    assert pinned_ring_bytes(found.module.graph) == 0


# ---- what the verifier finds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_a_stage_that_does_not_wait_for_the_reader_before_it(good: Case, index: int) -> None:
    found = again(good)
    stage = [node for node in found.nodes(STAGE) if node.args[4]][index]
    stage.update_arg(4, [])
    with pytest.raises(SlotInUseError, match=rf"{stage.name}\b.* overwrites"):
        verify(found.module, found.context)


def test_a_pinned_slot_on_top_of_another_one(good: Case) -> None:
    found = again(good)
    first, second = found.nodes(STAGE)[:2]
    second.update_arg(3, first.args[3])
    with pytest.raises(SlotInUseError, match=rf"{second.name}\b.* overwrites .*{first.name}\b"):
        verify(found.module, found.context)


def test_a_stage_without_a_slot(good: Case) -> None:
    found = again(good)
    stage = found.nodes(STAGE)[0]
    stage.update_arg(3, -1)
    with pytest.raises(ScheduleError, match=rf"{stage.name}\b"):
        verify(found.module, found.context)


def test_a_stage_that_two_prefetches_read(good: Case) -> None:
    found = again(good)
    first, second = found.nodes(PREFETCH)[:2]
    second.update_arg(0, first.args[0])
    with pytest.raises(ScheduleError, match="expected one"):
        verify(found.module, found.context)


def test_a_computation_that_reads_the_pinned_slot(good: Case) -> None:
    found = again(good)
    host, stage = found.nodes(HOST_LINEAR)[-1], found.nodes(STAGE)[0]
    host.update_arg(1, stage)
    with pytest.raises(MissingWaitError, match=rf"{host.name}\b.* uses {stage.name}\b.* without a wait"):
        verify(found.module, found.context)
