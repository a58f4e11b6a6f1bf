"""What the search for shares tries beside the balance of the chain, where it pays."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from unittest.mock import Mock

import pytest

from benchmarks.schedule_quality import Work
from hetegen_compile.cost_model import HardwareProfile, RateCurve, load_profile
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.planning import share_search
from hetegen_compile.planning.balance import balanced_splits
from hetegen_compile.planning.share_search import Search
from hetegen_compile.planning.share_ways import RING_VARIATIONS, VARIATIONS, Way
from hetegen_compile.planning.trials import Trials
from hetegen_compile.planning.trips import step_chain, trips_of
from tests.benchmarks.shapes import config


@cache
def work() -> Work:
    return Work(config("gptj", layers=3), "decode-1")


@cache
def prompt() -> Work:
    return Work(config("llama", vocab_size=32000), "prefill-512")


def dear_issue(seconds: float = 4e-5) -> HardwareProfile:
    """What Python and torch take for each launch."""
    profile = load_profile("h200-server")
    return replace(profile, accelerator=replace(profile.accelerator, issue_s=seconds, segment_issue_s=seconds))


def dear_trips() -> HardwareProfile:
    """A trip's fixed cost is 200 us, beside a link of a third of the rate."""
    profile = load_profile("h100-server")
    points = tuple((size, 0.3 * rate) for size, rate in profile.link.up.pinned.points)
    up = replace(profile.link.up, pinned=RateCurve(points))
    return replace(profile, link=replace(profile.link, up=up), fixed_s_per_split=2e-4)


def test_where_issue_is_dear_what_is_streamed_is_not_cut_at_the_end_of_the_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = work().result(dear_issue(), 0.1)
    cutting = tuple(line for line in VARIATIONS if "_uncut" not in {variation.__name__ for variation in line})
    assert len(cutting) == len(VARIATIONS) - 1
    monkeypatch.setattr(share_search, "VARIATIONS", cutting)
    assert found.step_s < 0.99 * work().result(dear_issue(), 0.1).step_s


def test_a_corrected_chain_may_make_other_trips_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "along_ring", lambda *_, **__: None)
    opt = Work(config("opt", layers=3), "decode-1")
    found = opt.result(dear_trips(), 0.75)
    monkeypatch.setattr(Search, "_reopened", lambda _, way: way)
    assert found.step_s < 0.95 * opt.result(dear_trips(), 0.75).step_s


def test_a_prompt_has_shares_that_fit_a_ring_which_holds_few_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output layer has one token and many rows, which the link has to begin with while layers keep it busy."""
    found = prompt().result(load_profile("a10-xeon"), 0.6)
    monkeypatch.setattr(Search, "along_ring", lambda *_, **__: None)
    assert found.step_s < 0.95 * prompt().result(load_profile("a10-xeon"), 0.6).step_s


@pytest.mark.parametrize("vary", [True, False])
def test_shares_for_a_short_ring_are_varied_where_the_others_are(monkeypatch: pytest.MonkeyPatch, vary: bool) -> None:
    base = prompt().base(load_profile("h100-server"), 0.5)
    trips = trips_of(base.module)
    search = Search(Trials(base.module), base.context, choose_splits(base.module, base.context))
    search.balance(trips, step_chain(base.module, trips, base.context))
    varied = Mock()
    monkeypatch.setattr(Search, "_vary", varied)
    search.along_ring(vary=vary)
    assert [call.args[1] for call in varied.mock_calls] == [RING_VARIATIONS] * vary


def test_the_way_with_other_trips_is_varied_if_it_is_not_much_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Work(config("opt", layers=3), "decode-1").base(dear_issue(), 0.1)
    monkeypatch.setattr(share_search, "_FAR", 0.0)
    found = []
    for limit in (2.0, 0.0):
        monkeypatch.setattr(share_search, "_NEAR", limit)
        found.append(balanced_splits(base.module, base.context, Trials(base.module)))
    assert len(found[0]) > len(found[1])


def test_where_trips_take_more_than_the_chain_knows_fewer_schedules_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Work(config("llama"), "decode-1").base(dear_issue(2e-4), 0.4)
    found, steps = [], []
    for limit in (share_search._MISTAKEN, math.inf):
        monkeypatch.setattr(share_search, "_MISTAKEN", limit)
        trials = Trials(base.module)
        found.append(balanced_splits(base.module, base.context, trials))
        steps.append(trials.step_s(base.context, found[-1][0]))
    assert steps[0] == steps[1]
    assert len(found[0]) <= len(found[1]) / 2


def test_of_equal_steps_the_one_with_fewer_trips_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trips without rows on the host are as if they were not made; a corrected chain may give them some."""
    base = work().base(dear_issue(), 0.1)
    trips = trips_of(base.module)
    chain = step_chain(base.module, trips, base.context)
    search = Search(Trials(base.module), base.context, choose_splits(base.module, base.context))
    monkeypatch.setattr(Search, "_shares", lambda *_: tuple(0.5 for _ in chain.trips))
    every, fewer = (search._attempt(Way(trips, chain, frozenset(range(number)))) for number in (len(chain.trips), 3))
    assert every.step_s == fewer.step_s
    assert search._best[False] is fewer
