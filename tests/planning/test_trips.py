"""Shares of trips as rows of Linears."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.schedule_quality import Work
from hetegen_compile.cost_model import load_profile
from hetegen_compile.ir import info
from hetegen_compile.passes.choose_splits import linears_of, pairable_blocks
from hetegen_compile.passes.context import require
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.planning.planned import BucketPlan
from hetegen_compile.planning.trips import step_chain, trips_of, whole_shares, with_shares
from tests.benchmarks.shapes import config


@pytest.fixture(scope="module")
def base() -> BucketPlan:
    return Work(config("llama", layers=2), "decode-1").base(load_profile("h100-server"), 0.1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_linears_of_a_trip_go_to_the_host_one_after_the_other(base: BucketPlan, share: float) -> None:
    trips = trips_of(base.module)
    splits = list(with_shares(trips, [share] * len(trips), base.context).values())
    both = [plan for plan in splits if plan.host and plan.streamed_rows]
    alone = [plan for plan in splits if plan.host == plan.rows]
    assert len(both) <= len(trips) < len(splits)
    assert alone or share < 0.5, "of more than one Linear the first is the host's"
    rows = sum(plan.rows - plan.resident_rows for plan in splits)
    assert sum(plan.host for plan in splits) == pytest.approx(share * rows, rel=0.2)


def test_what_the_accelerator_does_before_it_needs_the_host_is_its_part_of_a_trip() -> None:
    """Attention beside an MLP: only the MLP's first Linear is offloaded; attention runs while the host computes it."""
    base = Work(config("gptj", layers=1), "decode-1").base(load_profile("h100-server"), 0.1)
    group, *_ = trips = trips_of(base.module)
    *attention, wide = group.linears
    names = {str(node.args[1]): 0 for trip in trips for node in trip.linears if node is not wide}
    residency = replace(require(base.context.residency, "choose_residency"), weights=names)
    chain = step_chain(base.module, trips, replace(base.context, residency=residency))
    costs = require(base.context.costs, "annotate_costs")
    own_s = sum(costs[info(node).position].accelerator_s for node in group.linears)
    out_s = costs[info(trips[1].linears[0]).position].accelerator_s
    segments = base.module.graph.find_nodes(op="call_module")
    all_s = sum(node_work(node, base.context).seconds for node in segments)
    assert len(attention) == 3
    assert chain.trips[0].accelerator_s > own_s + out_s
    assert chain.trips[1].accelerator_s == pytest.approx(0.0)
    assert chain.serial_s < all_s
    assert chain.serial_s + sum(trip.accelerator_s for trip in chain.trips) == pytest.approx(
        all_s + sum(costs[info(node).position].accelerator_s for trip in trips for node in trip.linears)
    )


def test_what_the_accelerator_does_beside_a_block_is_its_part_of_the_trip() -> None:
    """Attention beside an MLP that is cut as one: all of it runs while the host goes through its columns."""
    base = Work(config("gptj", layers=1), "decode-1").base(load_profile("h100-server"), 0.1)
    (block,) = base.context.blocks
    linears = linears_of(base.module)
    own = [linears[position] for position in block.linears]
    weights = {str(node.args[1]): 0 for node in linears.values() if node not in own}
    context = replace(
        base.context, residency=replace(require(base.context.residency, "choose_residency"), weights=weights)
    )
    assert pairable_blocks(linears, context) == [block]
    trips = trips_of(base.module, [block])
    chain = step_chain(base.module, trips, context)
    costs = require(context.costs, "annotate_costs")
    *layer, output = linears.values()
    first, *_, last = base.module.graph.find_nodes(op="call_module")
    segments_s = sum(node_work(node, context).seconds for node in base.module.graph.find_nodes(op="call_module"))
    outside_s = sum(node_work(node, context).seconds for node in (first, last))
    trip = next(trip for group, trip in zip(trips, chain.trips, strict=True) if group.block is not None)
    own_s = sum(costs[info(node).position].accelerator_s for node in layer)
    assert len(layer) == 6
    assert chain.serial_s == pytest.approx(outside_s)
    assert trip.accelerator_s == pytest.approx(own_s + segments_s - outside_s)


def test_what_the_host_has_a_part_of_is_not_beside_another_trip() -> None:
    """The MLP's first Linear and attention's last one, which stands before the MLP's second."""
    base = Work(config("gptj", layers=1), "decode-1").base(load_profile("h100-server"), 0.1)
    first, second, *_ = trips = trips_of(base.module)
    offloaded = first.linears[-1], *second.linears
    names = {str(node.args[1]): 0 for trip in trips for node in trip.linears if node not in offloaded}
    residency = replace(require(base.context.residency, "choose_residency"), weights=names)
    chain = step_chain(base.module, trips, replace(base.context, residency=residency))
    costs = require(base.context.costs, "annotate_costs")
    assert chain.trips[1].accelerator_s == pytest.approx(costs[info(second.linears[0]).position].accelerator_s)


def test_a_share_is_of_the_rows_that_are_not_resident(base: BucketPlan) -> None:
    trips = trips_of(base.module)
    linear = trips[0].linears[0]
    rows = int(info(linear.args[1]).value.shape[0])  # type: ignore[arg-type]
    residency = require(base.context.residency, "choose_residency")
    names = {str(node.args[1]): 0 for trip in trips for node in trip.linears if node is not linear}
    weights = {**names, str(linear.args[1]): rows // 2}
    context = replace(base.context, residency=replace(residency, weights=weights))
    for share, host in ((0.0, 0), (0.5, rows // 4), (1.0, rows // 2)):
        splits = with_shares(trips, [share] * len(trips), context)
        assert splits[info(linear).position].host == pytest.approx(host, abs=64)
        assert splits[info(linear).position].resident_rows == rows // 2
        assert not any(plan.host for position, plan in splits.items() if position != info(linear).position)


def test_whole_shares_leave_no_linear_in_two_places(base: BucketPlan) -> None:
    trips = trips_of(base.module)
    whole = whole_shares(trips, base.context)
    assert max(map(len, whole)) > 2
    for take in (0, 1, -1):
        shares = [shares[min(take, len(shares) - 1)] for shares in whole]
        plans = with_shares(trips, shares, base.context).values()
        assert not [plan for plan in plans if plan.host and plan.streamed_rows]
