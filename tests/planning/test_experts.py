"""Streamed experts in the step's balance, its floor and what is compared with it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.schedule_quality import Work
from hetegen_compile.cost_model import load_profile, upload_s
from hetegen_compile.ir import info
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.context import require
from hetegen_compile.passes.plans import Splits
from hetegen_compile.passes.stream_experts import cost_of, grouped_nodes, streamed_stacks, with_host_experts
from hetegen_compile.pipeline import UNTIL_VERIFIED
from hetegen_compile.planning.balance import balanced_splits
from hetegen_compile.planning.baselines import baselines
from hetegen_compile.planning.floor import floor
from hetegen_compile.planning.plan_report import report_on
from hetegen_compile.planning.planned import BucketPlan
from hetegen_compile.planning.trials import Trials
from hetegen_compile.planning.trips import step_chain, trips_of, whole_shares, with_shares
from tests.benchmarks.shapes import config

MACHINES = ("a10-xeon", "h100-server", "rtx4090-desktop")
EXPERTS = 16


@cache
def work() -> Work:
    return Work(config("mixtral", layers=2), "prefill-512")


@cache
def base(machine: str) -> BucketPlan:
    """A prompt of which no stack is resident."""
    found = work().within(load_profile(machine), 1100 << 20)
    assert len(streamed_stacks(found.module)) == 4
    return found


def with_experts(plan: BucketPlan, host: list[int]) -> Splits:
    splits = choose_splits(plan.module, plan.context)
    residency = require(plan.context.residency, "choose_residency")
    for count, (position, node) in zip(host, grouped_nodes(plan.module).items(), strict=True):
        splits = {**splits, position: with_host_experts(node.args[1], count, residency)}  # type: ignore[arg-type]
    return splits


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.sampled_from(MACHINES), st.lists(st.integers(0, EXPERTS), min_size=4, max_size=4), st.booleans())
def test_no_simulated_step_is_below_the_floor(machine: str, host: list[int], staged: bool) -> None:
    plan, context = base(machine), base(machine).context
    if staged:
        context = replace(context, staged={stack.name: "a reason" for stack in streamed_stacks(plan.module)})
    bound = floor(plan.module, context)
    step_s = Trials(plan.module).step_s(context, with_experts(replace(plan, context=context), host))
    assert 0 < bound.seconds <= step_s * (1 + 1e-9)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_balance_shares_them(machine: str) -> None:
    """Shorter than all streamed, not far from the floor, and what the table says is what is done."""
    plan = base(machine)
    trials = Trials(plan.module)
    best, *_ = balanced_splits(plan.module, plan.context, trials)
    nodes = grouped_nodes(plan.module)
    assert any(0 < best[position].host < EXPERTS for position in nodes)
    step_s = trials.step_s(plan.context, best)
    assert step_s < trials.step_s(plan.context, with_experts(plan, [0, 0, 0, 0]))
    assert step_s < trials.step_s(plan.context, with_experts(plan, [EXPERTS] * 4))
    assert step_s < 1.35 * floor(plan.module, plan.context).seconds


def test_a_product_is_a_trip_of_its_own() -> None:
    plan = base("h100-server")
    trips = trips_of(plan.module)
    nodes = {*grouped_nodes(plan.module).values()}
    own = [i for i, group in enumerate(trips) if group.linears[0] in nodes]
    assert all(len(trips[i].linears) == 1 for i in own)
    assert len(own) == 4
    chain = step_chain(plan.module, trips, plan.context)
    for i in own:
        cost = cost_of(trips[i].linears[0], plan.context)
        trip = chain.trips[i]
        assert (trip.host_s, trip.link_s, trip.accelerator_saved_s) == (cost.host_s, cost.link_s, cost.accelerator_s)
        assert whole_shares(trips, plan.context)[i] == (0.0, 1.0)
    splits = with_shares(trips, [0.3] * len(trips), plan.context)
    assert {splits[position].host for position in grouped_nodes(plan.module)} == {round(0.3 * EXPERTS)}


def test_one_product_by_itself_is_balanced() -> None:
    plan = base("h100-server")
    splits = choose_splits(plan.module, plan.context)
    for position, node in grouped_nodes(plan.module).items():
        cost = cost_of(node, plan.context)
        others_s = max(cost.link_s, cost.accelerator_s)
        share = others_s / (others_s + cost.host_s)
        assert cost.host_s * share < others_s, "worth a trip"
        assert splits[position].host == round(share * EXPERTS)
        assert 0 < splits[position].host < EXPERTS


def test_a_forced_share_is_of_experts_too() -> None:
    plan = base("h100-server")
    context = replace(plan.context, options=replace(plan.context.options, split=0.25))
    splits = choose_splits(plan.module, context)
    assert {splits[position].host for position in grouped_nodes(plan.module)} == {EXPERTS // 4}


def test_ways_that_are_compared_move_all_of_them() -> None:
    plan = base("h100-server")
    context, profile = plan.context, plan.context.profile
    stacks = streamed_stacks(plan.module)
    found = baselines(plan.module, replace(context, splits=choose_splits(plan.module, context)), Trials(plan.module))
    copied = sum(
        upload_s(profile, value_bytes(stack, context), pinned=False) + profile.synchronise_s for stack in stacks
    )
    per_module, resident, streamed, host_only = (
        found[name] for name in ("per_module", "resident", "streamed", "host_only")
    )
    assert per_module is not None
    assert resident is not None
    assert streamed is not None
    assert host_only is not None
    assert per_module - resident >= copied * (1 - 1e-9)
    moved_s = sum(cost_of(node, context).link_s for node in grouped_nodes(plan.module).values())
    assert streamed >= moved_s * (1 - 1e-9)
    costs = require(context.costs, "annotate_costs")
    assert host_only >= sum(costs[position].host_s for position in grouped_nodes(plan.module))
    memory = profile.accelerator.memory_bytes
    weights = sum(value_bytes(stack, context) for stack in stacks)
    small = replace(profile, accelerator=replace(profile.accelerator, memory_bytes=weights))
    assert weights < memory
    assert baselines(plan.module, replace(context, profile=small), Trials(plan.module))["resident"] is None


def test_the_report_counts_them() -> None:
    plan = base("rtx4090-desktop")
    trials = Trials(plan.module)
    splits = with_experts(plan, [4, 4, 4, 4])
    module, done = trials.finish(plan.context, splits, UNTIL_VERIFIED)
    schedule = report_on(plan, module, done, trials)
    stacks = sum(value_bytes(stack, plan.context) for stack in streamed_stacks(plan.module))
    rows = [row for row in schedule.rows if row.op == "experts"]
    assert sum(row.weight_bytes for row in rows) == stacks
    assert {(row.host_share, row.streamed_share, row.placement) for row in rows} == {(0.25, 0.75, "split")}
    assert schedule.streamed_bytes >= stacks * 3 // 4
    assert schedule.host_bytes >= stacks // 4
    flops = [plan.context.number(info(node).flops) for node in grouped_nodes(plan.module).values()]
    assert sorted(row.flops for row in rows) == sorted(flops)
    assert all(row.host_s > 0 and row.link_s > 0 and row.accelerator_s > 0 for row in rows)
