"""The split of all Linears together, on machines whose trips or launches are dear."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from torch import fx

from benchmarks.schedule_quality import Work
from hetegen_compile.cost_model import HardwareProfile, RateCurve, load_profile
from hetegen_compile.cost_model.hardware import LinkDirection
from hetegen_compile.passes.context import Context
from hetegen_compile.pipeline import DECISIONS, GROUPING, NORMALISATION, Stage, run_pipeline
from hetegen_compile.planning import planner, share_search, within_budget
from hetegen_compile.planning.balance import balanced_splits
from hetegen_compile.planning.baselines import baselines
from hetegen_compile.planning.share_search import Search
from hetegen_compile.planning.trials import Trials
from tests.benchmarks.shapes import config


@cache
def work() -> Work:
    return Work(config("opt", layers=3), "decode-1")


def slow_link() -> HardwareProfile:
    """A tenth of the link's rate at every size, so a trip's small copies take ten times as long, too."""
    profile = load_profile("h100-server")

    def slower(direction: LinkDirection) -> LinkDirection:
        return replace(direction, pinned=RateCurve(tuple((x, rate / 10) for x, rate in direction.pinned.points)))

    return replace(profile, link=replace(profile.link, up=slower(profile.link.up), down=slower(profile.link.down)))


def dear_issue() -> HardwareProfile:
    """Python and torch take 40 us for each launch."""
    profile = load_profile("h200-server")
    return replace(profile, accelerator=replace(profile.accelerator, issue_s=4e-5, segment_issue_s=4e-5))


@pytest.mark.parametrize(("profile", "limit"), [(slow_link(), 1.10), (dear_issue(), 1.20)], ids=["link", "issue"])
def test_steps_are_close_to_their_floors(profile: HardwareProfile, limit: float) -> None:
    found = work().result(profile, 0.1)
    assert found.host_bytes > 0
    assert found.streamed_bytes > 0
    assert 1.0 <= found.ratio <= limit


def test_a_few_linears_are_streamed_whole_where_trips_are_dear() -> None:
    base, step = work().plan(slow_link(), 0.1)
    plans = [plan for plan in (step.context.splits or {}).values() if plan.resident_rows < plan.rows]
    on_host = [plan for plan in plans if plan.host == plan.rows - plan.resident_rows]
    assert 0 < len(on_host) < len(plans), "equal shares of all would stream a little of each, with a trip for each"


def test_a_step_far_from_its_bound_is_varied(monkeypatch: pytest.MonkeyPatch) -> None:
    varied = work().result(slow_link(), 0.4)
    monkeypatch.setattr(share_search, "_FAR", 2.0)
    assert varied.step_s < 0.998 * work().result(slow_link(), 0.4).step_s


def test_ways_that_are_much_longer_than_another_step_are_not_varied(monkeypatch: pytest.MonkeyPatch) -> None:
    varied = work().result(slow_link(), 0.4)
    monkeypatch.setattr(share_search, "_HOPELESS", 0.99)  # so every way counts as much longer
    alone = work().result(slow_link(), 0.4)
    monkeypatch.setattr(share_search, "_FAR", 2.0)
    assert alone.step_s == work().result(slow_link(), 0.4).step_s > varied.step_s


def test_another_residency_is_decided_on_the_same_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []

    def noted(module: fx.GraphModule, context: Context, stages: tuple[Stage, ...], **how: bool) -> Context:
        ran.append(stages)
        return run_pipeline(module, context, stages, **how)

    monkeypatch.setattr(within_budget, "run_pipeline", noted)
    base = work().base(slow_link(), 0.4)
    assert ran.count(NORMALISATION) == ran.count(GROUPING) == 2, "``base`` plans twice: the second time within a budget"
    assert ran.count(DECISIONS) > 2, "the estimate of activations was not exact"
    assert base.context.effects is not None
    assert base.context.placement is not None


def test_no_plan_is_longer_than_what_it_is_compared_with() -> None:
    for profile in (slow_link(), dear_issue()):
        base = work().base(profile, 0.4)
        trials = Trials(base.module)
        step_s = trials.step_s(base.context, balanced_splits(base.module, base.context, trials)[0])
        others = baselines(base.module, base.context, trials)
        assert step_s <= min(seconds for seconds in (others["streamed"], others["per_linear"]) if seconds is not None)


def test_splits_are_told_by_the_length_of_their_steps() -> None:
    base = work().base(slow_link(), 0.4)
    trials = Trials(base.module)
    found = balanced_splits(base.module, base.context, trials)
    steps = [trials.step_s(base.context, splits) for splits in found]
    assert steps == sorted(steps)
    assert any(not any(plan.host for plan in splits.values()) for splits in found), "all streamed"


def test_ways_that_come_to_the_same_rows_are_simulated_once_and_no_schedule_is_kept_for_it() -> None:
    base = work().base(slow_link(), 0.4)
    splits = balanced_splits(base.module, base.context, Trials(base.module))
    search = Search(Trials(base.module), base.context, splits[-1])
    found = [search.simulate(splits[0]), search.simulate(dict(splits[0]))]
    assert found[0] is found[1]
    assert found[0].step_s > 0
    assert not found[0].work, "nodes would keep their graph alive"
    assert search.by_step() == [splits[0], splits[-1]]


def test_where_the_shortest_step_has_no_room_the_next_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    base = work().base(slow_link(), 0.4)
    best, *others = balanced_splits(base.module, base.context, Trials(base.module))
    monkeypatch.setattr(planner, "_excess_bytes", lambda context: 64 * (context.splits == best))
    _, step = work().plan(slow_link(), 0.4)
    assert step.context.splits == next(splits for splits in others if splits != best)
    assert "needs 64 bytes more for activations" in step.schedule.explain()
