"""The balance of a step: its bound, and shares that come close to it with a short staging ring."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_compile.cost_model import Chain, Trip, balance_along, relax, spread_order, step_with_ring

seconds = st.floats(0.0, 10.0, allow_nan=False).map(lambda x: round(x, 3))
positive = st.floats(0.1, 10.0, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def trips(draw: st.DrawFn) -> Trip:
    saved = draw(seconds)
    return Trip(draw(positive), draw(positive), saved + draw(seconds), saved, draw(seconds), draw(seconds))


chains = st.builds(Chain, st.lists(trips(), min_size=1, max_size=3).map(tuple), seconds)


@settings(derandomize=True)
@given(chains)
def test_no_shares_beat_the_bound(chain: Chain) -> None:
    grid = [i / 8 for i in range(9)]
    best = min(chain.step_s(shares) for shares in itertools.product(grid, repeat=len(chain.trips)))
    assert relax(chain).bound_s <= best * (1 + 1e-9) + 1e-12


@settings(derandomize=True)
@given(trips())
def test_no_share_of_a_trip_is_better_than_its_least(trip: Trip) -> None:
    assert trip.least_s <= min(trip.seconds(i / 64) for i in range(65)) + 1e-9
    assert trip.least_s in (trip.seconds(0.0), trip.seconds(trip.free_share))


@settings(derandomize=True)
@given(st.lists(positive, min_size=1, max_size=8), positive, seconds)
def test_the_bound_is_reached_where_no_trip_costs_anything(sizes: list[float], ratio: float, serial_s: float) -> None:
    chain = Chain(tuple(Trip(size, size * ratio, 0.0, 0.0) for size in sizes), serial_s)
    relaxation = relax(chain)
    assert chain.step_s(balance_along(chain, relaxation.opened)) == pytest.approx(relaxation.bound_s, rel=1e-3)


@settings(derandomize=True)
@given(chains)
def test_shares_are_shares_and_only_of_opened_trips(chain: Chain) -> None:
    opened = relax(chain).opened
    for index, share in enumerate(balance_along(chain, opened)):
        assert 0.0 <= share <= 1.0
        assert share == 0.0 or index in opened


def test_equal_layers_are_balanced_alike_to_the_closed_form() -> None:
    layer = Trip(host_s=1.0, link_s=2.0, accelerator_s=0.0, accelerator_saved_s=0.0)
    chain = Chain((layer,) * 10, 0.0)
    relaxation = relax(chain)
    shares = balance_along(chain, relaxation.opened)
    assert shares == pytest.approx([2 / 3] * 10)  # V_cpu = 2 V_link: the host takes two of three rows
    assert chain.step_s(shares) == pytest.approx(relaxation.bound_s) == pytest.approx(10 * 2 / 3)


def test_whole_linears_are_preferred_within_the_slack() -> None:
    """A trip of two equal Linears; the ideal shares are two thirds each."""
    layer = Trip(host_s=1.0, link_s=2.0, accelerator_s=0.0, accelerator_saved_s=0.0)
    chain, opened, whole = Chain((layer,) * 9, 0.0), range(9), [(0.0, 0.5, 1.0)] * 9
    shares = balance_along(chain, opened, whole, 1.0)
    assert sum(share not in whole[0] for share in shares) <= 1, "the last trip makes up for the others"
    assert len(set(shares)) > 1
    assert chain.step_s(shares) < 1.2 * relax(chain).bound_s
    assert balance_along(chain, opened, whole, 0.1) == pytest.approx([2 / 3] * 9), "the nearest is too far"


def test_the_link_gains_what_the_segments_take() -> None:
    layer = Trip(host_s=1.0, link_s=2.0, accelerator_s=0.0, accelerator_saved_s=0.0)
    idle = Chain((layer,) * 4, serial_s=1.0)
    shares = balance_along(idle, relax(idle).opened)
    assert max(shares) < 2 / 3
    assert idle.step_s(shares) == pytest.approx(relax(idle).bound_s)


def test_small_linears_are_not_worth_their_trip() -> None:
    small = Trip(host_s=0.1, link_s=0.2, accelerator_s=0.01, accelerator_saved_s=0.01, fixed_s=1.0)
    large = Trip(host_s=5.0, link_s=10.0, accelerator_s=0.1, accelerator_saved_s=0.1, fixed_s=1.0)
    chain = Chain((small, large, small, large), 0.0)
    assert relax(chain).opened == {1, 3}
    shares = balance_along(chain, {1, 3})
    assert shares[0] == shares[2] == 0.0
    assert chain.step_s(shares) < chain.step_s([0.0] * 4)


def test_only_as_many_equal_trips_are_made_as_are_needed() -> None:
    dear = Trip(host_s=1.0, link_s=1.0, accelerator_s=0.0, accelerator_saved_s=0.0, fixed_s=0.5)
    chain = Chain((dear,) * 8, 0.0)
    relaxation = relax(chain)  # what a whole trip adds to the chain is 1.5 times what it takes from the link
    assert relaxation.bound_s == pytest.approx(8 * 1.5 / 2.5)
    assert relaxation.opened == frozenset(range(8))
    assert relaxation.fewest == {0, 2, 4, 6}, "spread over the step"
    few, every = (chain.step_s(balance_along(chain, some)) for some in (relaxation.fewest, relaxation.opened))
    assert relaxation.bound_s < few == pytest.approx(5.0)
    assert few < every == pytest.approx(6.0)


@settings(derandomize=True)
@given(chains)
def test_the_fewest_are_some_of_the_opened_ones(chain: Chain) -> None:
    relaxation = relax(chain)
    assert relaxation.fewest <= relaxation.opened
    assert bool(relaxation.fewest) == bool(relaxation.opened)


def test_half_way_between_two_chains() -> None:
    slow = Chain((Trip(1.0, 4.0, 0.0, 0.0),), 3.0)
    fast = Chain((Trip(1.0, 2.0, 0.0, 0.0),), 1.0)
    assert slow.between(fast) == fast.between(slow) == Chain((Trip(1.0, 3.0, 0.0, 0.0),), 2.0)


def test_nothing_is_opened_where_the_link_is_no_bottleneck() -> None:
    fast = Trip(host_s=9.0, link_s=0.1, accelerator_s=0.5, accelerator_saved_s=0.5, fixed_s=0.6)
    assert relax(Chain((fast,) * 3, 5.0)).opened == frozenset()


def test_each_beginning_of_the_spread_order_is_spread() -> None:
    assert sorted(spread_order(13)) == list(range(13))
    assert spread_order(8)[:4] == [0, 4, 2, 6]
    assert spread_order(1) == [0]


def test_what_the_host_can_do_beside_the_accelerator_is_the_hosts() -> None:
    """Two trips that the accelerator takes as long for as the host for half, and an output layer that it does not."""
    layer = Trip(host_s=2.0, link_s=4.0, accelerator_s=1.0, accelerator_saved_s=0.0)
    output = Trip(host_s=4.0, link_s=8.0, accelerator_s=0.1, accelerator_saved_s=0.1)
    chain = Chain((layer, layer, output), serial_s=4.0)
    level, free = (balance_along(chain, range(3), ring_s=ring_s) for ring_s in (0.0, 100.0))
    assert free[:2] == pytest.approx([0.5, 0.5])
    assert level[0] < 0.5
    assert chain.step_s(free) < chain.step_s(level)


def test_the_link_counts_as_ahead_by_a_ring_at_most() -> None:
    layer = Trip(host_s=1.0, link_s=1.0, accelerator_s=2.0, accelerator_saved_s=0.0)
    output = Trip(host_s=4.0, link_s=8.0, accelerator_s=0.0, accelerator_saved_s=0.0)
    chain = Chain((*[layer] * 8, output), serial_s=0.0)
    short, long = (balance_along(chain, range(9), ring_s=ring_s) for ring_s in (1.0, 8.0))
    assert short[-1] > long[-1]
    assert step_with_ring(chain, short, 1.0) < step_with_ring(chain, long, 1.0)
