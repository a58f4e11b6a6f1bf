"""How many rows of a Linear the host computes while the others are streamed: the balance in closed form.

The host works for ``host_fixed_s + host_s_per_row * h``; meanwhile ``s`` rows are streamed, and the
accelerator then computes them and the ``r`` resident ones. Both sides finish together at the balance
T_cpu = T_com + T_gpu (HeteGen, arXiv 2403.01164, equation 5), which sympy solves once for ``h``.

A side without rows costs nothing, fixed costs included. That makes the optimum piecewise: besides the
admissible rows next to the balance, all rows streamed and all rows on the host are compared. Between those
two ends the makespan is the larger of a rising and a falling line, so nothing else can be the optimum.
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

    Raises ValueError for costs that are negative or not finite and for resident rows outside 0..rows.
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

    def __post_init__(self) -> None:
        """Check the ranges."""
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{item.name} is {value}; it must be finite and not negative")
        if self.resident_rows > self.rows:
            raise ValueError(f"{self.resident_rows} resident rows of {self.rows}")


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


def solve_split(problem: SplitProblem, granularity: int) -> SplitSolution:
    """The split of least makespan whose host rows are 0, all, or a multiple of ``granularity``.

    Of equally fast splits the one with the fewest host rows. Raises ValueError if granularity < 1.
    """
    if granularity < 1:
        raise ValueError(f"granularity is {granularity}; it must be at least 1")
    movable = problem.rows - problem.resident_rows
    candidates = _candidates(problem, movable, granularity)
    makespan_s, host_rows = min((_makespan_s(problem, rows), rows) for rows in candidates)
    return SplitSolution(host_rows, movable - host_rows, makespan_s)


@lru_cache(maxsize=1)
def balance_expression() -> sympy.Expr:
    """Host rows at which both sides finish together; its symbols are named as SplitProblem's fields."""
    symbol = {item.name: sympy.Symbol(item.name, nonnegative=True) for item in fields(SplitProblem)}
    host_rows, feed_s_per_row = sympy.symbols("host_rows feed_s_per_row")
    streamed_rows = symbol["rows"] - symbol["resident_rows"] - host_rows
    host_s = symbol["host_fixed_s"] + symbol["host_s_per_row"] * host_rows
    link_s = symbol["link_fixed_s"] + feed_s_per_row * streamed_rows
    accelerator_rows = streamed_rows + symbol["resident_rows"]
    accelerator_s = symbol["accelerator_fixed_s"] + symbol["accelerator_s_per_row"] * accelerator_rows
    (solution,) = sympy.solve(sympy.Eq(host_s, link_s + accelerator_s), host_rows)
    return solution.subs(feed_s_per_row, sympy.Max(symbol["link_s_per_row"], symbol["pin_s_per_row"]))


@lru_cache(maxsize=1)
def _balance() -> Callable[..., float]:
    arguments = [sympy.Symbol(item.name, nonnegative=True) for item in fields(SplitProblem)]
    function: Callable[..., float] = sympy.lambdify(arguments, balance_expression(), modules="math")
    return function


def _candidates(problem: SplitProblem, movable: int, granularity: int) -> set[int]:
    """Both ends, and the admissible rows strictly between them that are next to the balance."""
    last = (movable - 1) // granularity
    if last < 1:
        return {0, movable}
    feed_s_per_row = max(problem.link_s_per_row, problem.pin_s_per_row)
    slope_s = problem.host_s_per_row + feed_s_per_row + problem.accelerator_s_per_row
    balance = _balance()(*astuple(problem)) if slope_s else 0.0
    below = math.floor(min(max(balance / granularity, 1.0), float(last)))
    return {0, below * granularity, min(below + 1, last) * granularity, movable}


def _makespan_s(problem: SplitProblem, host_rows: int) -> float:
    streamed_rows = problem.rows - problem.resident_rows - host_rows
    accelerator_rows = streamed_rows + problem.resident_rows
    feed_s_per_row = max(problem.link_s_per_row, problem.pin_s_per_row)
    host_s = _linear_cost_s(problem.host_fixed_s, problem.host_s_per_row, host_rows)
    link_s = _linear_cost_s(problem.link_fixed_s, feed_s_per_row, streamed_rows)
    accelerator_s = _linear_cost_s(
        problem.accelerator_fixed_s, problem.accelerator_s_per_row, accelerator_rows
    )
    return max(host_s, link_s + accelerator_s)


def _linear_cost_s(fixed_s: float, s_per_row: float, rows: int) -> float:
    return fixed_s + s_per_row * rows if rows else 0.0
