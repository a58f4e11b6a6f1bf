"""Rate curves: interpolation between the points, the ends beyond them, and what is no curve."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.cost_model import HardwareProfile, KernelChoice, RateCurve, RateTable, load_profile
from hetegen_compile.errors import HardwareProfileError

positive = st.floats(1e-3, 1e15)
curves = st.dictionaries(st.floats(1.0, 1e9), positive, min_size=1, max_size=6).map(
    lambda points: RateCurve(tuple(sorted(points.items())))
)


def test_between_two_points_the_curve_is_linear_in_logarithms() -> None:
    curve = RateCurve(((1.0, 100.0), (100.0, 1.0)))
    assert curve.at(10.0) == pytest.approx(10.0)
    assert curve.at(math.sqrt(10.0)) == pytest.approx(100.0 / math.sqrt(10.0))


def test_beyond_the_ends_the_curve_is_constant() -> None:
    curve = RateCurve(((2.0, 30.0), (8.0, 50.0)))
    assert [curve.at(x) for x in (0.0, 1.0, 2.0, 8.0, 1e12)] == [30.0, 30.0, 30.0, 50.0, 50.0]


def test_a_constant_curve_has_one_rate_everywhere() -> None:
    assert {RateCurve.constant(24e9).at(x) for x in (0.5, 1.0, 1e9)} == {24e9}


@given(curves)
def test_the_curve_goes_through_its_points(curve: RateCurve) -> None:
    for x, rate in curve.points:
        assert curve.at(x) == pytest.approx(rate)


@given(curves, st.floats(1.0, 1e9))
def test_the_rate_lies_between_its_neighbours(curve: RateCurve, x: float) -> None:
    for (x0, rate0), (x1, rate1) in itertools.pairwise(curve.points):
        if x0 <= x <= x1:
            low, high = sorted((rate0, rate1))
            assert low * (1 - 1e-9) <= curve.at(x) <= high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ((), "no points"),
        (((2.0, 1.0), (1.0, 1.0)), "point 1 has x = 1.0 after 2.0"),
        (((1.0, 1.0), (1.0, 2.0)), "sort by x"),
        (((1.0, 0.0),), "positive"),
        (((-1.0, 1.0),), "positive"),
        (((1.0, math.nan),), "positive"),
        (((1.0, math.inf),), "positive"),
    ],
)
def test_what_is_no_curve_is_refused(points: tuple[tuple[float, float], ...], told: str) -> None:
    with pytest.raises(HardwareProfileError, match=told):
        RateCurve(points)


def test_profiles_are_frozen_and_hashable() -> None:
    profile: HardwareProfile = load_profile("a10-xeon")
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.name = "other"  # type: ignore[misc]
    assert hash(profile) == hash(load_profile("a10-xeon"))
    assert hash(profile) != hash(load_profile("t4-xeon"))


SMALL, LARGE = RateCurve(((1.0, 10.0), (4.0, 5.0))), RateCurve(((1.0, 40.0), (4.0, 20.0)))
TABLE = RateTable(((1e6, SMALL), (4e6, LARGE)))


def test_a_table_is_linear_in_the_logarithms_of_both_axes() -> None:
    assert TABLE.at(1, 1e6) == 10.0
    assert TABLE.at(4, 4e6) == 20.0
    assert TABLE.at(1, 2e6) == pytest.approx(20.0)
    assert TABLE.at(2, 2e6) == pytest.approx(math.sqrt(20.0 * 10.0))


def test_beyond_its_ends_a_table_keeps_the_ends_rate() -> None:
    assert TABLE.at(1, 1.0) == TABLE.at(0.5, 1e6) == 10.0
    assert TABLE.at(100, 1e12) == 20.0
    assert TABLE.peak == 40.0


def test_one_curve_is_a_table_for_every_size() -> None:
    assert {RateTable.of(LARGE).at(1, nbytes) for nbytes in (0.5, 1.0, 1e12)} == {40.0}


@given(curves, curves, st.floats(1.0, 1e9), st.floats(1.0, 1e9))
def test_a_tables_rate_lies_between_its_curves(one: RateCurve, other: RateCurve, tokens: float, nbytes: float) -> None:
    rates = sorted((one.at(tokens), other.at(tokens)))
    rate = RateTable(((1e3, one), (1e6, other))).at(tokens, nbytes)
    assert rates[0] * (1 - 1e-9) <= rate <= rates[1] * (1 + 1e-9)


@pytest.mark.parametrize("sizes", [[], [0.0], [-1.0], [math.inf], [math.nan], [2.0, 2.0], [2.0, 1.0]])
def test_a_tables_sizes_are_positive_finite_and_sorted(sizes: list[float]) -> None:
    with pytest.raises(HardwareProfileError, match="curve"):
        RateTable(tuple((size, SMALL) for size in sizes))


def test_the_nearer_point_decides_the_kernel() -> None:
    choice = KernelChoice(((1.0, "a"), (2.0, "a"), (8.0, "b"), (32.0, "a")))
    assert choice.limits() == ((4.0, "a"), (16.0, "b"), (math.inf, "a"))
    assert [choice.at(tokens) for tokens in (0.5, 1, 4, 5, 16, 17, 1e6)] == ["a", "a", "a", "b", "b", "a", "a"]


@pytest.mark.parametrize("points", [(), ((0.0, "a"),), ((2.0, "a"), (1.0, "a"))])
def test_a_choice_has_positive_increasing_tokens(points: tuple[tuple[float, str], ...]) -> None:
    with pytest.raises(HardwareProfileError):
        KernelChoice(points)
