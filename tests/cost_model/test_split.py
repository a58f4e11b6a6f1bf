"""The closed form: the paper's equation, equality with a search over all rows, and its extremes."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.cost_model import (
    SplitProblem,
    balance_expressions,
    row_granularity,
    solve_split,
)

FIXED_COSTS = ("host_fixed_s", "link_fixed_s", "accelerator_fixed_s")
RATES = ("host_s_per_row", "link_s_per_row", "accelerator_s_per_row", "pin_s_per_row")

seconds = st.just(0.0) | st.floats(1e-9, 1e-3)


@st.composite
def problems(draw: st.DrawFn) -> SplitProblem:
    rows = draw(st.integers(0, 300))
    costs = {name: draw(seconds) for name in RATES}
    fixed = {name: draw(st.just(0.0) | st.floats(1e-9, 1e-1)) for name in FIXED_COSTS}
    contention = draw(st.just(1.0) | st.floats(0.05, 1.0))
    return SplitProblem(rows=rows, resident_rows=draw(st.integers(0, rows)), contention=contention, **costs, **fixed)


def cost_s(problem: SplitProblem, host_rows: int) -> float:
    """The makespan spelled out, independently of the code under test."""
    streamed = problem.rows - problem.resident_rows - host_rows
    host = link = device = 0.0
    if streamed > 0:
        link = problem.link_fixed_s + max(streamed * problem.link_s_per_row, streamed * problem.pin_s_per_row)
    if streamed + problem.resident_rows > 0:
        on_device = streamed + problem.resident_rows
        device = problem.accelerator_fixed_s + problem.accelerator_s_per_row * on_device
    if host_rows > 0:
        left = problem.host_s_per_row * host_rows  # seconds of work at the rate beside the link
        host = problem.host_fixed_s
        if host < link:
            beside = min(left, link - host)
            host, left = host + beside, left - beside
        host += left * problem.contention
    return max(host, link + device)


def admissible(problem: SplitProblem, granularity: int) -> set[int]:
    movable = problem.rows - problem.resident_rows
    return {*range(0, movable + 1, granularity), movable}


@given(problems(), st.sampled_from([1, 2, 8, 64]))
def test_the_closed_form_equals_a_search_over_all_rows(problem: SplitProblem, granularity: int) -> None:
    solution = solve_split(problem, granularity)
    choices = admissible(problem, granularity)
    best = min(cost_s(problem, rows) for rows in choices)
    assert solution.host_rows in choices
    assert solution.host_rows + solution.streamed_rows + problem.resident_rows == problem.rows
    assert solution.makespan_s == pytest.approx(cost_s(problem, solution.host_rows), rel=1e-9)
    assert solution.makespan_s == pytest.approx(best, rel=1e-9)


@given(problems(), st.sampled_from(RATES + FIXED_COSTS), st.floats(0.0, 1.0))
def test_a_faster_resource_never_makes_it_slower(problem: SplitProblem, name: str, factor: float) -> None:
    faster = replace(problem, **{name: getattr(problem, name) * factor})
    before, after = solve_split(problem, 8).makespan_s, solve_split(faster, 8).makespan_s
    assert after <= before * (1 + 1e-9)


@given(problems())
def test_a_split_is_never_worse_than_either_side_alone(problem: SplitProblem) -> None:
    movable = problem.rows - problem.resident_rows
    limit = min(cost_s(problem, 0), cost_s(problem, movable))
    assert solve_split(problem, 16).makespan_s <= limit * (1 + 1e-9)


def streamed_share() -> tuple[sympy.Expr, sympy.Symbol, sympy.Symbol, sympy.Symbol]:
    """The streamed share by the rates at which each side consumes rows, without fixed costs."""
    v_cpu, v_link, v_gpu = sympy.symbols("V_cpu V_link V_gpu", positive=True)
    symbol = {item.name: sympy.Symbol(item.name, nonnegative=True) for item in fields(SplitProblem)}
    absent = [*FIXED_COSTS, "pin_s_per_row", "resident_rows"]
    values = {symbol[name]: sympy.Integer(0) for name in absent} | {
        symbol["host_s_per_row"]: 1 / v_cpu,
        symbol["link_s_per_row"]: 1 / v_link,
        symbol["accelerator_s_per_row"]: 1 / v_gpu,
        symbol["contention"]: sympy.Integer(1),
    }
    return 1 - balance_expressions()[0].subs(values) / symbol["rows"], v_cpu, v_link, v_gpu


def test_without_fixed_costs_the_balance_is_the_papers_equation() -> None:
    share, v_cpu, v_link, v_gpu = streamed_share()
    paper = v_gpu * v_link / (v_cpu * v_gpu + v_cpu * v_link + v_link * v_gpu)
    assert sympy.simplify(share - paper) == 0


def test_with_an_infinitely_fast_accelerator_link_and_host_share_by_their_rates() -> None:
    share, v_cpu, v_link, v_gpu = streamed_share()
    limit = sympy.limit(sympy.simplify(share), v_gpu, sympy.oo)
    assert sympy.simplify(limit - v_link / (v_link + v_cpu)) == 0


def test_the_rates_of_host_and_link_add_up() -> None:
    problem = SplitProblem(rows=3000, host_s_per_row=1 / 48, link_s_per_row=1 / 24)
    solution = solve_split(problem, 1)
    assert (solution.host_rows, solution.streamed_rows) == (2000, 1000)
    assert solution.makespan_s == pytest.approx(3000 / 72)


def test_pinning_slower_than_the_link_takes_the_links_place() -> None:
    problem = SplitProblem(rows=3000, host_s_per_row=1 / 48, link_s_per_row=1 / 24)
    assert solve_split(replace(problem, pin_s_per_row=1 / 24), 1) == solve_split(problem, 1)
    assert solve_split(replace(problem, pin_s_per_row=1 / 12), 1).host_rows == 2400


def test_a_host_that_is_slowed_by_the_link_takes_fewer_rows_beside_it_and_all_of_them_without() -> None:
    beside = SplitProblem(rows=3000, host_s_per_row=1 / 48, link_s_per_row=1 / 24)
    contended = replace(beside, host_s_per_row=1 / 36, contention=0.75)
    assert solve_split(contended, 1).host_rows == 1800  # both work to the end: 36 rows a second beside 24
    assert solve_split(contended, 1).makespan_s == pytest.approx(3000 / 60)
    slow_link = replace(contended, link_s_per_row=1.0)
    assert solve_split(slow_link, 3000).makespan_s == pytest.approx(3000 / 48)  # all rows, at the full rate


@pytest.mark.parametrize("contention", [0.0, -0.5, 1.5])
def test_contention_is_a_share(contention: float) -> None:
    with pytest.raises(ValueError, match="contention"):
        SplitProblem(rows=8, host_s_per_row=1.0, link_s_per_row=1.0, contention=contention)


def test_everything_is_streamed_when_the_hosts_fixed_cost_is_not_paid_back() -> None:
    problem = SplitProblem(rows=1024, host_s_per_row=1e-9, link_s_per_row=1e-6, host_fixed_s=1.1e-3)
    solution = solve_split(problem, 64)
    assert (solution.host_rows, solution.streamed_rows) == (0, 1024)
    assert solution.makespan_s == pytest.approx(1.024e-3)
    assert solve_split(replace(problem, host_fixed_s=0.5e-3), 64).host_rows > 0


def test_everything_is_on_the_host_when_the_link_loses() -> None:
    problem = SplitProblem(rows=1024, host_s_per_row=1e-6, link_s_per_row=1e-3, link_fixed_s=2e-3)
    solution = solve_split(problem, 64)
    assert (solution.host_rows, solution.streamed_rows) == (1024, 0)
    assert solution.makespan_s == pytest.approx(1.024e-3)


def test_resident_rows_shift_the_balance_to_the_host() -> None:
    problem = SplitProblem(rows=1200, host_s_per_row=1.0, link_s_per_row=1.0, accelerator_s_per_row=1.0)
    without = solve_split(problem, 1)
    with_resident = solve_split(replace(problem, resident_rows=300), 1)
    assert (without.host_rows, with_resident.host_rows) == (800, 700)
    assert with_resident.host_rows / 900 > without.host_rows / 1200


def test_of_equal_splits_the_one_with_the_fewest_host_rows_is_taken() -> None:
    assert solve_split(SplitProblem(rows=256, host_s_per_row=0.0, link_s_per_row=0.0), 64).host_rows == 0


def test_host_rows_are_aligned_or_all() -> None:
    problem = SplitProblem(rows=1000, host_s_per_row=1.0, link_s_per_row=1.9)
    assert solve_split(problem, 64).host_rows == 640
    fast_host = replace(problem, link_s_per_row=1e6)
    assert solve_split(fast_host, 64).host_rows == 1000


@pytest.mark.parametrize("name", [*RATES, *FIXED_COSTS, "resident_rows", "rows"])
@pytest.mark.parametrize("value", [-1, math.inf, math.nan])
def test_a_cost_is_finite_and_not_negative(name: str, value: float) -> None:
    valid = SplitProblem(rows=8, host_s_per_row=1.0, link_s_per_row=1.0)
    with pytest.raises(ValueError, match=name):
        replace(valid, **{name: value})  # type: ignore[arg-type]


def test_wrong_rows_and_granularities_are_refused() -> None:
    with pytest.raises(ValueError, match="9 resident rows of 8"):
        SplitProblem(rows=8, host_s_per_row=1.0, link_s_per_row=1.0, resident_rows=9)
    with pytest.raises(ValueError, match="granularity is 0"):
        solve_split(SplitProblem(rows=8, host_s_per_row=1.0, link_s_per_row=1.0), 0)


@pytest.mark.parametrize(
    ("rows", "granularity"),
    [(0, 1), (1, 1), (7, 1), (8, 2), (15, 2), (16, 4), (255, 32), (256, 64), (4096, 64), (50272, 64)],
)
def test_the_granularity_leaves_at_least_four_pieces(rows: int, granularity: int) -> None:
    assert row_granularity(rows) == granularity
