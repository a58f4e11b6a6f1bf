"""Residency by simulated steps, where the step is far from its floor with what an estimate says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import fx

from benchmarks.schedule_quality import Work
from hetegen_compile.cost_model import HardwareProfile, load_profile
from hetegen_compile.errors import BudgetError
from hetegen_compile.passes.claims import Claim, NothingResident, Way, keeping, way_of
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.plans import RESIDENT, Splits
from hetegen_compile.passes.residency_shares import residency_shares
from hetegen_compile.pipeline import UNTIL_VERIFIED
from hetegen_compile.planning import weigh_residency
from hetegen_compile.planning.balance import balanced_splits
from hetegen_compile.planning.planned import DRY_RUN, BucketPlan, Split, Target
from hetegen_compile.planning.planner import Planner
from hetegen_compile.planning.trials import Trials
from tests.benchmarks.shapes import config


@cache
def work() -> Work:
    """A model whose output layer has half of its bytes."""
    return Work(config("llama", layers=3, full_layers=6, vocab_size=65536), "decode-1")


@cache
def busy_thread() -> HardwareProfile:
    """Issuing takes the host's thread long: what an estimate of Linears alone knows least of."""
    profile = load_profile("h100-server")
    accelerator = replace(profile.accelerator, issue_s=26e-6, segment_issue_s=34e-6, gate_s=9e-6)
    return replace(profile, accelerator=accelerator, fixed_s_per_split=5e-5)


def ways_of(plan: BucketPlan) -> tuple[Way, ...]:
    return require(plan.context.residency, "choose_residency").ways


def chosen(monkeypatch: pytest.MonkeyPatch, most: int, far: float = 1.0) -> tuple[BucketPlan, float]:
    monkeypatch.setattr(weigh_residency, "_MOST", most)
    monkeypatch.setattr(weigh_residency, "_FAR", far)
    base, step = work().plan(busy_thread(), 0.6)
    return base, step.schedule.predicted_step_s


def test_the_step_is_the_shortest_of_the_orders_that_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    first, first_s = chosen(monkeypatch, most=0)
    weighed, weighed_s = chosen(monkeypatch, most=3)
    assert first.context.residency_way is None
    assert weighed.context.residency_way in ways_of(first)[:3]
    assert weighed_s < 0.99 * first_s
    claims = require(weighed.context.residency, "choose_residency").claims
    assert all(claim.weighed for claim in claims if claim.rank == 0), "other graphs of the model follow"


def test_a_step_near_its_floor_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[Way | None] = []
    decide = Planner._decided

    def counted(self: Planner, context: object, *more: object) -> BucketPlan:
        decided.append(context.residency_way)  # type: ignore[attr-defined]
        return decide(self, context, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Planner, "_decided", counted)
    base, _ = chosen(monkeypatch, most=3, far=1e9)
    assert base.context.residency_way is None
    assert set(decided) == {None}
    chosen(monkeypatch, most=3)
    assert set(decided) == {None, *ways_of(base)[:3]}


def test_what_was_found_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Split] = []

    def noted(module: fx.GraphModule, context: Context, trials: Trials) -> list[Splits]:
        searched.append(context.options.split)
        return balanced_splits(module, context, trials)

    monkeypatch.setattr("hetegen_compile.planning.planner.balanced_splits", noted)
    chosen(monkeypatch, most=0)
    assert "auto" not in searched


def test_an_order_without_room_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = chosen(monkeypatch, most=0)

    def none(way: Way) -> BucketPlan:
        raise BudgetError("no room")

    monkeypatch.setattr(weigh_residency, "_MOST", 3)
    assert weigh_residency.weighed(base, none).context is base.context


def test_a_way_means_the_same_with_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decided again keeps as many rows of each kind before others; it is no number in another list."""
    weighed, _ = chosen(monkeypatch, most=3)
    way = weighed.context.residency_way
    assert way is not None
    planner = work()._planner(busy_thread(), "auto")
    target = Target(
        DRY_RUN, torch.device("cpu"), int(0.9 * weighed.context.budget_bytes), weighed.context.resident,
        host_memory=weighed.context.host_memory,
    )  # fmt: skip
    again = planner.decide_again(weighed, work().sizes, target, work().graph.weights)
    claims = require(again.context.residency, "choose_residency").claims
    assert way_of(claims) == way
    assert all(claim.weighed for claim in claims if claim.rank == 0)


def test_with_clearly_less_memory_it_is_weighed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another model comes: which weights are worth keeping whole depends on how many there is room for."""
    first, _ = chosen(monkeypatch, most=3)
    decided: list[Way | None] = []
    decide = Planner._decided

    def counted(self: Planner, context: Context, *more: object) -> BucketPlan:
        decided.append(context.residency_way)
        return decide(self, context, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Planner, "_decided", counted)
    context = first.context
    planner = work()._planner(busy_thread(), "auto")
    target = Target(DRY_RUN, torch.device("cpu"), context.budget_bytes // 2, context.resident,
                    host_memory=context.host_memory)  # fmt: skip
    again = planner.decide_again(first, work().sizes, target, work().graph.weights)
    way, estimated, *others = decided
    assert (way, estimated) == (context.residency_way, None)
    assert others
    assert again.context.residency_way in {None, *others}
    assert again.balanced


def test_ways_are_of_the_models_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model has half of the memory: what is kept before other rows fits the rest."""
    alone = require(chosen(monkeypatch, most=0)[0].context.residency, "choose_residency")
    foreign = [replace(claim, key=("foreign", claim.key)) for claim in alone.claims]
    monkeypatch.setattr(NothingResident, "claims", lambda self: [foreign])
    base, _ = chosen(monkeypatch, most=0)
    found = require(base.context.residency, "choose_residency")
    assert found.budget[RESIDENT] < 0.6 * alone.budget[RESIDENT]
    kept = [sum(claim.kept_rows * claim.row_bytes for claim in keeping(found.claims, way)) for way in found.ways]
    assert 0 < max(kept) <= found.budget[RESIDENT]


def test_another_models_weighed_claims_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = Claim("foreign", 64, 0, 1024, 1.0, weighed=True)
    monkeypatch.setattr(NothingResident, "claims", lambda self: [[foreign]])
    base, _ = chosen(monkeypatch, most=3)
    assert base.context.residency_way is not None


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_a_split_that_is_asked_for_first_leaves_the_schedules_to_the_others(
    first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = chosen(monkeypatch, most=3)
    planner, base = work()._planner(busy_thread(), "auto"), work().base(busy_thread(), 0.6)
    assert base.balanced
    planner.plan_split(base, first, UNTIL_VERIFIED)
    assert not base.balanced
    step = planner.plan_split(base, "auto", UNTIL_VERIFIED)
    assert step.schedule.predicted_step_s <= planner.plan_split(base, first, UNTIL_VERIFIED).schedule.predicted_step_s


def test_a_weighed_order_counts_before_an_estimated_one() -> None:
    """Whichever graph asks, and however many rows the estimate keeps."""
    estimated = [Claim("a", 100, 0, 1, 1.0, kept_rows=100), Claim("b", 100, 0, 1, 1.0)]
    weighed = [Claim("a", 100, 0, 1, 1.0, weighed=True), Claim("b", 100, 0, 1, 1.0, kept_rows=100, weighed=True)]
    for graphs in ([estimated, weighed], [weighed, estimated]):
        assert residency_shares(graphs, 100) == {"b": 0}
    assert residency_shares([estimated], 100) == {"a": 0}
