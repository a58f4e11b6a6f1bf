"""What a simulated step says about the chain that it was balanced with, and the ways that are tried around it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetegen_compile.cost_model import Chain, Trip
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.planning.share_ways import VARIATIONS, Attempt, Way

TRIP = Trip(host_s=4.0, link_s=8.0, accelerator_s=0.5, accelerator_saved_s=0.5, fixed_s=0.25)
CHAIN = Chain((TRIP, TRIP), serial_s=2.0)
SHARES = (0.5, 0.5)


def attempt(step_s: float, link_s: float, beside_link_s: float) -> Attempt:
    prediction = Prediction({}, {}, {}, step_s, {"up": link_s, "host": 1.0}, beside_link_s)
    return Attempt(Way([], CHAIN, frozenset({0, 1})), SHARES, prediction)


@pytest.mark.parametrize(("path_s", "serial_s"), [(6.0, 1.5), (7.5, 3.0)])
def test_a_link_that_works_all_the_time_says_nothing_of_the_rest_but_the_path_does(
    path_s: float, serial_s: float
) -> None:
    assert CHAIN.path_s(SHARES) == 6.5
    corrected = attempt(step_s=8.0, link_s=8.0, beside_link_s=path_s).corrected()
    assert corrected.serial_s == serial_s
    assert corrected.path_s(SHARES) == path_s
    assert corrected.link_s(SHARES) == 8.0


def test_what_a_step_takes_longer_than_chain_and_link_is_beside_the_trips() -> None:
    corrected = attempt(step_s=9.0, link_s=8.0, beside_link_s=9.0).corrected()
    assert corrected.path_s(SHARES) == 9.0


def test_a_link_that_takes_longer_than_the_chain_says_does_so_in_proportion() -> None:
    corrected = attempt(step_s=10.0, link_s=10.0, beside_link_s=6.5).corrected()
    assert [trip.link_s for trip in corrected.trips] == [10.0, 10.0]
    assert corrected.serial_s == 2.0


def test_where_nothing_is_streamed_the_link_is_left_as_it_was() -> None:
    """It lost time to the host, says the chain; but there was nothing to be late."""
    chain = Chain((replace(TRIP, lost_s=2.0),), serial_s=2.0)
    assert chain.link_s((1.0,)) == 2.0
    prediction = Prediction({}, {}, {}, 6.0, {"host": 4.25}, 6.0)
    assert Attempt(Way([], chain, frozenset({0})), (1.0,), prediction).corrected().trips == chain.trips


def test_each_variation_changes_one_thing_and_no_trips() -> None:
    best = attempt(step_s=9.0, link_s=8.0, beside_link_s=9.0)
    for variation in {variation for line in VARIATIONS for variation in line}:
        way = variation(best)
        names = ("chain", "slack", "chunks", "fitted")
        changed = {name: getattr(best.way, name) for name in names if getattr(way, name) != getattr(best.way, name)}
        assert len(changed) == 1
        assert replace(way, **changed) == best.way
