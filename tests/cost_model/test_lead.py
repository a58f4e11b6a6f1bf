"""The link's lead along a chain: a bound that no shares beat, and shares that come close to it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_compile.cost_model import Chain, Leg, Trip, lead, least_step_s, relax, shares_with_ring

times = st.floats(0.0, 10.0)
legs = st.builds(
    lambda host, link, accelerator, saved, fixed, lost, after: Leg(
        Trip(host, link, accelerator, saved * accelerator, fixed, lost * link), after
    ),
    times, times, times, st.floats(0.0, 1.0), times, st.floats(0.0, 1.5) | st.just(0.0), times,
)  # fmt: skip
chains = st.lists(legs, min_size=1, max_size=4)
rings = st.floats(0.1, 20.0)
shares = st.lists(st.floats(0.0, 1.0) | st.sampled_from([0.0, 1.0]), min_size=4, max_size=4)


def step_s(chain: Sequence[Leg], some: Sequence[float], ring_s: float) -> float:
    """The average of steps that follow each other, from the first one on; the first begins with a full ring.

    What that saves once is added again.
    """
    steps, lead_s, seconds = 8, ring_s, ring_s
    for _ in range(steps):
        for leg, share in zip(chain, some, strict=False):
            seconds += max(leg.trip.seconds(share), leg.trip.streamed_s(share) - lead_s) + leg.after_s
            lead_s = leg.lead_behind_s(lead_s, share, ring_s)
    return seconds / steps


def steady_s(chain: Sequence[Leg], some: Sequence[float], ring_s: float) -> float:
    """The last of many steps."""
    lead_s = found = 0.0
    for _ in range(6):
        found = 0.0
        for leg, share in zip(chain, some, strict=True):
            found += max(leg.trip.seconds(share), leg.trip.streamed_s(share) - lead_s) + leg.after_s
            lead_s = leg.lead_behind_s(lead_s, share, ring_s)
    return found


@settings(derandomize=True, deadline=None)
@given(chains, shares, rings)
def test_no_steps_are_shorter_on_average(chain: list[Leg], some: list[float], ring_s: float) -> None:
    assert least_step_s(chain, ring_s) <= step_s(chain, some, ring_s) * (1 + 1e-9)


def test_nothing_that_is_drawn_beats_the_bound() -> None:
    """Many shares of few chains: a bound that is a tenth of a percent too high is found out."""
    draw = random.Random(0)
    for _ in range(40):
        parts = [[draw.random() * most for most in (10, 10, 3, 3, 3)] for _ in range(3)]
        chain = [Leg(Trip(host, link, own, 0.0, fixed), after) for host, link, own, fixed, after in parts]
        ring_s = draw.random() * 20
        tried = [[draw.choice([0.0, 1.0, draw.random()]) for _ in chain] for _ in range(200)]
        best_s = min(steady_s(chain, some, ring_s) for some in (shares_with_ring(chain, ring_s), *tried))
        assert least_step_s(chain, ring_s) <= best_s * (1 + 1e-9)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(chains, rings)
def test_the_shares_come_close_to_the_bound(chain: list[Leg], ring_s: float) -> None:
    """As close as leads are apart in each trip, and one ring: the bound's steps need not end as they begin."""
    chain = chain * 4
    found = shares_with_ring(chain, ring_s)
    assert all(0.0 <= share <= 1.0 for share in found)
    apart_s = len(chain) * ring_s / 32
    assert steady_s(chain, found, ring_s) <= least_step_s(chain, ring_s) + apart_s + ring_s


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.lists(legs, min_size=1, max_size=2), rings)
def test_no_shares_of_a_grid_are_better_by_more_than_leads_are_apart(chain: list[Leg], ring_s: float) -> None:
    grid = product(*[[i / 10 for i in range(11)]] * len(chain))
    best = min(steady_s(chain, some, ring_s) for some in grid)
    assert steady_s(chain, shares_with_ring(chain, ring_s), ring_s) <= best + len(chain) * ring_s / 32 + 1e-9


@settings(derandomize=True, deadline=None)
@given(chains, rings, rings)
def test_a_longer_ring_never_harms(chain: list[Leg], ring_s: float, more_s: float) -> None:
    apart_s = len(chain) * (ring_s + more_s) / 128
    assert least_step_s(chain, ring_s + more_s) <= least_step_s(chain, ring_s) + apart_s + 1e-9


def test_a_trip_is_made_or_it_is_not() -> None:
    """The relaxation makes a half of each; beside a ring of less than one trip that gains nothing."""
    trip = Trip(host_s=4.0, link_s=4.0, accelerator_s=0.0, accelerator_saved_s=0.0, fixed_s=1.5)
    relaxed_s = relax(Chain((trip,) * 8, 0.0)).bound_s / 8
    made_s = 1.5 + (4.0 - 1.5) / 2  # host and link take equally long
    found = least_step_s([Leg(trip, 0.0)] * 8, 0.01) / 8
    assert relaxed_s < 0.95 * made_s
    assert found == pytest.approx(made_s, rel=0.01)
    assert shares_with_ring([Leg(trip, 0.0)] * 8, 0.01) == pytest.approx([1.25 / 4.0] * 8, rel=0.02)


def test_with_a_long_ring_as_few_trips_are_made_as_are_needed() -> None:
    trip = Trip(host_s=4.0, link_s=4.0, accelerator_s=0.0, accelerator_saved_s=0.0, fixed_s=1.5)
    found = shares_with_ring([Leg(trip, 0.0)] * 8, 20.0)
    assert 0 < sum(share > 0 for share in found) < 8
    assert least_step_s([Leg(trip, 0.0)] * 8, 20.0) == pytest.approx(relax(Chain((trip,) * 8, 0.0)).bound_s, rel=0.03)


def test_rows_have_to_be_there_before_what_follows_on_their_trip() -> None:
    """The link may run ahead of an output layer by one ring; the rest comes while the chain waits."""
    output = Trip(host_s=1e9, link_s=5.0, accelerator_s=0.5, accelerator_saved_s=0.5)
    assert least_step_s([Leg(output, 9.0)], 2.0) == pytest.approx(9.0 + 5.0 - 2.0)
    assert least_step_s([Leg(output, 9.0)], 6.0) == pytest.approx(9.5)


def test_layers_that_are_alike_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = [Leg(Trip(4.0, 3.0, 0.5, 0.2, fixed), after) for fixed, after in ((1.0, 0.5), (0.8, 0.1), (1.2, 0.2))]
    compute = Mock(wraps=lead._before)
    monkeypatch.setattr(lead, "_before", compute)
    few, count = least_step_s(layer * 8, 2.0), compute.call_count
    many = least_step_s(layer * 80, 2.0)
    assert many == pytest.approx(10 * few, rel=1e-6)
    assert compute.call_count <= 3 * count


@pytest.mark.parametrize("ring_s", [0.0, -1.0, 1e-320, float("inf"), float("nan")])
def test_without_a_ring_there_is_no_lead(ring_s: float) -> None:
    with pytest.raises(ValueError, match="a ring of"):
        least_step_s([Leg(Trip(4.0, 3.0, 0.5, 0.2), 0.0)], ring_s)
