"""Shares of trips as rows of Linears."""

from __future__ import annotations

import pytest

from benchmarks.schedule_quality import Work
from hetegen_compile.cost_model import load_profile
from hetegen_compile.planned import BucketPlan
from hetegen_compile.trips import trips_of, whole_shares, with_shares
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


def test_whole_shares_leave_no_linear_in_two_places(base: BucketPlan) -> None:
    trips = trips_of(base.module)
    whole = whole_shares(trips, base.context)
    assert max(map(len, whole)) > 2
    for take in (0, 1, -1):
        shares = [shares[min(take, len(shares) - 1)] for shares in whole]
        plans = with_shares(trips, shares, base.context).values()
        assert not [plan for plan in plans if plan.host and plan.streamed_rows]
