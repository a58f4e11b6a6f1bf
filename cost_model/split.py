"""How many rows of a Linear the host computes while the others are streamed: the balance in closed form.

The host works for ``host_fixed_s + host_s_per_row * h``; meanwhile ``s`` rows are streamed, and the
accelerator then computes them and the ``r`` resident ones. Both sides finish together at the balance
T_cpu = T_com + T_gpu (HeteGen, arXiv 2403.01164, equation 5), which sympy solves once for ``h``.

Main memory serves both: while the link works, the host has only a share of its rate (``contention``), and from
then on all of it. So the host's line bends where the link is done, and the balance has two forms: the link
outlasts the host's fixed cost, or it does not.

A side without rows costs nothing, fixed costs included. That makes the optimum piecewise: besides the
admissible rows next to the balances and next to the bend, all rows streamed and all rows on the host are compared.
Between those the makespan is the larger of two lines, so nothing else can be the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from functools import lru_cache

import sympy

MAX_GRANULARITY = 64
"""Rows that a split is aligned to at most: the tile that the matrix units of current accelerators like."""


@dataclass(frozen=True)
class SplitProblem:
    """One Linear: lengths in rows, costs in seconds, each resource linear in its rows.

    Attributes:
        rows: rows of the weight.
        host_s_per_row, link_s_per_row, accelerator_s_per_row: what one row costs on each resource.
        host_fixed_s, link_fixed_s, accelerator_fixed_s: paid once by a resource that has rows to work on.
        pin_s_per_row: copying a row into pinned memory ahead of the link; the two overlap, the slower counts.
        resident_rows: rows that already lie on the accelerator.
        contention: share in (0, 1] of the host's rate that remains while the link works; ``host_s_per_row`` is
            with the link at work.

    Raises ValueError for costs that are negative or not finite, for resident rows outside 0..rows and for a contention
    outside (0, 1].
    """

    rows: int
    host_s_per_row: float
    link_s_per_row: float
    accelerator_s_per_row: float = 0.0
    host_fixed_s: float = 0.0
    link_fixed_s: float = 0.0
    accelerator_fixed_s: float = 0.0
    pin_s_per_row: float = 0.0
    resident_rows: int = 0
    contention: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{item.name} is {value}; it must be finite and not negative")
        if self.resident_rows > self.rows:
            raise ValueError(f"{self.resident_rows} resident rows of {self.rows}")
        if not 0 < self.contention <= 1:
            raise ValueError(f"contention is {self.contention}; it must be a share above 0 and at most 1")


@dataclass(frozen=True)
class SplitSolution:
    """Rows by where they are consumed (with the resident ones they are all), and the Linear's seconds."""

    host_rows: int
    streamed_rows: int
    makespan_s: float


def row_granularity(rows: int) -> int:
    """What host rows are a multiple of: the largest power of two up to 64 of which ``rows`` holds four."""
    granularity = MAX_GRANULARITY
    while granularity > 1 and rows < 4 * granularity:
        granularity //= 2
    return granularity


@lru_cache(maxsize=4096)
def solve_split(problem: SplitProblem, granularity: int) -> SplitSolution:
    """The split of least makespan whose host rows are 0, all, or a multiple of ``granularity``.

    Of equally fast splits the one with the fewest host rows. Kept, since layers are alike. Raises ValueError if
    granularity < 1.
    """
    if granularity < 1:
        raise ValueError(f"granularity is {granularity}; it must be at least 1")
    movable = problem.rows - problem.resident_rows
    candidates = _candidates(problem, movable, granularity)
    makespan_s, host_rows = min((_makespan_s(problem, rows), rows) for rows in candidates)
    return SplitSolution(host_rows, movable - host_rows, makespan_s)


@lru_cache(maxsize=1)
def balance_expressions() -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
    """Host rows at which both sides finish together, and at which the host's line bends.

    The first balance holds where the link outlasts the host's fixed cost, the second where it does not; the bend lies
    where the link takes just that cost. Their symbols are named as SplitProblem's fields.
    """
    symbol = {item.name: sympy.Symbol(item.name, nonnegative=True) for item in fields(SplitProblem)}
    host_rows, feed_s_per_row = sympy.symbols("host_rows feed_s_per_row")
    streamed_rows = symbol["rows"] - symbol["resident_rows"] - host_rows
    link_s = symbol["link_fixed_s"] + feed_s_per_row * streamed_rows
    accelerator_rows = streamed_rows + symbol["resident_rows"]
    accelerator_s = symbol["accelerator_fixed_s"] + symbol["accelerator_s_per_row"] * accelerator_rows
    alone_s = symbol["host_fixed_s"] + symbol["contention"] * symbol["host_s_per_row"] * host_rows
    lost_s = (1 - symbol["contention"]) * (link_s - symbol["host_fixed_s"])
    feed = sympy.Max(symbol["link_s_per_row"], symbol["pin_s_per_row"])

    def rows_at(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
        (solution,) = sympy.solve(sympy.Eq(left, right), host_rows)
        return solution.subs(feed_s_per_row, feed)

    beside = rows_at(alone_s + lost_s, link_s + accelerator_s)
    after = rows_at(alone_s, link_s + accelerator_s)
    return beside, after, rows_at(link_s, symbol["host_fixed_s"])


@lru_cache(maxsize=1)
def _balances() -> tuple[Callable[..., float], ...]:
    arguments = [sympy.Symbol(item.name, nonnegative=True) for item in fields(SplitProblem)]
    return tuple(sympy.lambdify(arguments, expression, modules="math") for expression in balance_expressions())


def _candidates(problem: SplitProblem, movable: int, granularity: int) -> set[int]:
    """Both ends, and the admissible rows strictly between them that are next to a balance or the bend."""
    last = (movable - 1) // granularity
    found = {0, movable}
    if last < 1:
        return found
    for solve in _balances():
        try:
            rows = solve(*astuple(problem))
        except ZeroDivisionError:  # two parallel lines do not cross
            rows = 0.0
        below = math.floor(min(max(rows / granularity, 1.0), float(last)))
        found |= {below * granularity, min(below + 1, last) * granularity}
    return found


def _makespan_s(problem: SplitProblem, host_rows: int) -> float:
    streamed_rows = problem.rows - problem.resident_rows - host_rows
    accelerator_rows = streamed_rows + problem.resident_rows
    feed_s_per_row = max(problem.link_s_per_row, problem.pin_s_per_row)
    link_s = _linear_cost_s(problem.link_fixed_s, feed_s_per_row, streamed_rows)
    accelerator_s = _linear_cost_s(problem.accelerator_fixed_s, problem.accelerator_s_per_row, accelerator_rows)
    return max(_host_s(problem, host_rows, link_s), link_s + accelerator_s)


def _host_s(problem: SplitProblem, host_rows: int, link_s: float) -> float:
    """The host's end: its fixed cost, its rows beside the link, and what is left then at its full rate."""
    if not host_rows:
        return 0.0
    beside_s = problem.host_s_per_row * host_rows
    contended_s = min(beside_s, max(0.0, link_s - problem.host_fixed_s))
    return problem.host_fixed_s + contended_s + (beside_s - contended_s) * problem.contention


def _linear_cost_s(fixed_s: float, s_per_row: float, rows: int) -> float:
    return fixed_s + s_per_row * rows if rows else 0.0
