"""The floor's bounds where what the host's threads do one after the other decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.cost_model import HardwareProfile, RateCurve
from hetegen_compile.passes.choose_splits import linears_of, with_host_rows
from hetegen_compile.passes.node_work import issue_s, untold_trip_s
from hetegen_compile.passes.plans import Splits
from hetegen_compile.planning.floor import Floor, floor
from hetegen_compile.planning.trials import Trials
from tests.passes.graphs import PROFILE, planned, quarters, streamed
from tests.planning.floors import LAYERS, bounds, not_pairable


def two_blocks(x: Tensor) -> Any:
    first, second, third, fourth = LAYERS
    return fourth(third(second(first(x).relu()).softmax(-1)).relu()).softmax(-1)


@pytest.mark.parametrize(("function", "trips"), [(two_blocks, 2), (not_pairable, 4)])
def test_a_block_that_may_be_cut_costs_one_trip_if_the_host_has_any_of_it(function: Any, trips: int) -> None:
    """With a link so slow that the host has all rows, each way down and wait that costs more is in both bounds.

    There is none to the first trip, which reads what the caller gives.
    """
    found = planned(function, torch.zeros(1, 1024), plan=streamed)
    points = tuple((size, rate * 1e-6) for size, rate in PROFILE.link.up.pinned.points)
    slow = replace(PROFILE.link, up=replace(PROFILE.link.up, pinned=RateCurve(points)))
    cheap = replace(PROFILE, link=slow, synchronise_s=0.0, fixed_s_per_split=0.0)
    base, dear = (
        floor(found.module, replace(found.context, profile=replace(cheap, synchronise_s=wait_s)))
        for wait_s in (0.0, 1e-3)
    )
    result_s = 1e-3  # the wait for what the caller gets
    assert dear.path_s - base.path_s == pytest.approx((trips - 1) * 1e-3 + result_s, rel=1e-3)
    assert dear.thread_s - base.thread_s == pytest.approx((trips - 1) * 1e-3 + result_s, rel=1e-3)


def test_beside_a_worker_there_are_two_threads() -> None:
    """The worker has all parts and the fixed costs of their trips; the other one issues ways down and segments."""
    found = planned(not_pairable, torch.zeros(1, 1024), plan=streamed, issue_ahead=True)
    points = tuple((size, rate * 1e-6) for size, rate in PROFILE.link.up.pinned.points)
    slow = replace(PROFILE.link, up=replace(PROFILE.link.up, pinned=RateCurve(points)))

    def bound(launch_s: float) -> tuple[Floor, float]:
        accelerator = replace(PROFILE.accelerator, launch_s=launch_s)
        profile = replace(PROFILE, link=slow, accelerator=accelerator, synchronise_s=0.0, fixed_s_per_split=1e-3)
        context = replace(found.context, profile=profile)
        segments = found.module.graph.find_nodes(op="call_module")
        issuing_s = sum(issue_s(segment, context) for segment in segments)
        own_s = floor(found.module, context).bytes_s + len(LAYERS) * untold_trip_s(context)
        downs_s = (len(LAYERS) - 1) * launch_s  # the first trip reads what the caller gives
        result_s = launch_s
        issuing_s += downs_s + result_s
        return floor(found.module, context), max(own_s, (own_s + issuing_s) / 2, issuing_s)

    for launch_s in (0.0, 1e-3):
        found_bound, expected_s = bound(launch_s)
        assert found_bound.thread_s == pytest.approx(expected_s, rel=1e-3)


def test_beside_a_worker_a_product_of_what_is_resident_is_issued() -> None:
    """The worker has none of it, whatever it costs to issue."""

    def bound(plan: Any, issue_s: float) -> float:
        found = planned(not_pairable, torch.zeros(1, 1024), plan=plan, issue_ahead=True)
        accelerator = replace(PROFILE.accelerator, issue_s=issue_s, segment_issue_s=1e-6)
        return floor(found.module, replace(found.context, profile=replace(PROFILE, accelerator=accelerator))).thread_s

    cheap_s, dear_s = 1e-6, 1e-2
    assert bound(quarters, dear_s) >= len(LAYERS) * dear_s > 10 * bound(quarters, cheap_s)
    assert bound(streamed, dear_s) < dear_s, "the host has them, or they are streamed"


def on_the_host(function: Any, profile: HardwareProfile) -> tuple[Floor, float]:
    """The floor, and the step with all rows on the host."""
    found = planned(function, torch.zeros(1, 1024), plan=streamed, profile=profile)
    splits: Splits = {}
    for position, node in linears_of(found.module).items():
        rows = with_host_rows(node, 0, found.context).rows
        splits = {**splits, position: with_host_rows(node, rows, found.context)}
    return bounds(function, found), Trials(found.module).step_s(found.context, splits)


def test_small_linears_beside_a_large_one_save_the_thread_what_they_save() -> None:
    """The large one takes the host longer than it is worth: it is streamed, and the small ones are on the host."""
    small, large = LAYERS[0], nn.Linear(1024, 1 << 14, bias=False)
    points = tuple((size, rate * 1e3) for size, rate in PROFILE.link.up.pinned.points)
    link = replace(PROFILE.link, up=replace(PROFILE.link.up, pinned=RateCurve(points)))
    accelerator = replace(PROFILE.accelerator, issue_s=2e-3)
    profile = replace(PROFILE, accelerator=accelerator, link=link, fixed_s_per_split=0.0)

    def function(x: Tensor) -> Any:
        return small(x).softmax(-1) + large(x).softmax(-1)[..., :1024]

    found = planned(function, torch.zeros(1, 1024), plan=streamed, profile=profile, ring_bytes=1 << 28)
    rows = {
        position: with_host_rows(node, 0, found.context).rows for position, node in linears_of(found.module).items()
    }
    splits = {
        position: with_host_rows(node, rows[position] * (rows[position] == 1024), found.context)
        for position, node in linears_of(found.module).items()
    }
    step_s = Trials(found.module).step_s(found.context, splits)
    assert 0.8 * step_s < bounds(function, found).thread_s <= step_s


def test_rows_on_the_host_save_the_thread_more_than_they_take_where_issuing_is_dear() -> None:
    """Nothing is launched or prefetched of a Linear then, which may take longer than to compute it."""
    profile = replace(PROFILE, accelerator=replace(PROFILE.accelerator, issue_s=2e-3), fixed_s_per_split=0.0)
    bound, step_s = on_the_host(not_pairable, profile)
    assert bound.bound == "thread"
    assert step_s == pytest.approx(bound.seconds, rel=0.05)
    assert step_s >= bound.seconds
