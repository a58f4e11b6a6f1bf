"""The link's lead along a chain of trips: the least seconds beside a short staging ring, and the shares that take them.

The *lead* is how much of the link's own time it is ahead by: seconds of its work that are done for trips which have not
begun. It never exceeds what fills the staging ring, and what is streamed of a trip has to be there before the chain
goes on behind it. A *leg* is a trip and what the chain does after it. One that begins with the lead ``x`` and ends with
``y`` takes, with the share ``a`` of the trip on the host,

    leg_s(x, y) = min over a of max(trip_s(a), streamed_s(a) + max(0, y - after_s) - x) + after_s

which depends on the lead's change only. A step is thus a shortest path over the lead, found from its end (a dynamic
program). Other than in the relaxation of ``chain.py``, which may make a fraction of a trip, a trip is made or it is
not: where a ring holds the rows of few trips, neighbours cannot make up for each other.

Values are kept at some leads. Between two of them what is still to come is taken for as little as it can be: more lead
never harms, and saves no more than its own seconds. So the seconds that are found are a bound, whatever their number;
the shares are those of one walk along it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from operator import sub
from typing import NamedTuple

from hetegen_compile.cost_model.chain import Trip
from hetegen_compile.cost_model.ring import Leg

_INTERVALS = 128  # of the lead, for a bound: with 32 it is up to 1.7 % lower, with 512 up to 0.3 % higher
_FEWER_INTERVALS = 32  # for shares, which are no worse with them
_STEPS = 3  # that follow each other, for the lead at the beginning of a step to be what steps end with
_QUANTUM = 2.0**-30  # of the ring: values are rounded down to it, so that those of alike layers are the same ones

_Values = tuple[float, ...]
"""Seconds to the end by lead, from none to a full ring, over those with a full one."""


class _Line(NamedTuple):
    """Seconds by what is added to the lead."""

    slope: float
    fixed_s: float


class _Goal(NamedTuple):
    """A lead at the end of a trip that may be the best one, and the seconds that are still to come with it."""

    lead_s: float
    rest_s: float


def least_step_s(legs: Sequence[Leg], ring_s: float) -> float:
    """A bound of the seconds of a step: of steps that follow each other, none is shorter on average.

    ``ring_s``: the seconds of the link in which it fills the staging ring. ValueError if they are not positive or not
    finite.
    """
    total_s, found = 0.0, [(0.0,) * (_INTERVALS + 1)]
    for (values, *_), step_s in _steps(legs, ring_s, _INTERVALS):
        total_s += step_s
        found.append(tuple(total_s + value for value in values))
    pairs = combinations(enumerate(found), 2)
    bounds: list[float] = [min(map(sub, more, few)) / (many - one) for (one, few), (many, more) in pairs]
    return max(bounds)


def shares_with_ring(legs: Sequence[Leg], ring_s: float) -> tuple[float, ...]:
    """By leg, the share of the offloaded rows on the host with which a step is about as short as a ring allows.

    ``ring_s`` as of ``least_step_s``.
    """
    *_, (values, _) = _steps(legs, ring_s, _FEWER_INTERVALS)
    lead_s, shares = 0.0, [0.0] * len(legs)
    for _ in range(2):  # the second time it begins with the lead that a step ends with
        for i, (leg, behind) in enumerate(zip(legs, values[1:], strict=True)):
            shares[i] = _best(leg, lead_s, _goals(leg, behind, ring_s))
            lead_s = leg.lead_behind_s(lead_s, shares[i], ring_s)
    return tuple(shares)


def _steps(legs: Sequence[Leg], ring_s: float, intervals: int) -> Iterator[tuple[list[_Values], float]]:
    """For one, two and more steps before the end: the values before each leg of the first one and behind its last.

    With them what the first one takes of the seconds to the end with a full ring. Legs and values that were met before
    are not computed again: layers are alike.
    """
    if not 0 < ring_s * _QUANTUM < math.inf:
        raise ValueError(f"a ring of {ring_s} seconds; it must take the link some time, and not for ever, to fill it")
    met: dict[tuple[Leg, _Values], tuple[_Values, float]] = {}
    values: _Values = (0.0,) * (intervals + 1)
    for _ in range(_STEPS):
        found, step_s = [values], 0.0
        for leg in reversed(legs):
            if (leg, values) not in met:
                met[leg, values] = _before(leg, values, ring_s)
            values, seconds = met[leg, values]
            found.append(values)
            step_s += seconds
        yield found[::-1], step_s


def _before(leg: Leg, behind: _Values, ring_s: float) -> tuple[_Values, float]:
    """The values before a leg and its seconds with a full ring, by the values behind it."""
    leads, goals = _leads(ring_s, len(behind) - 1), _goals(leg, behind, ring_s)
    ways = (_least(_streamed(leg.trip), leads, goals), _least(_made(leg.trip), leads, goals))
    found = [min(pair) for pair in zip(*ways, strict=True)]
    quantum_s = _QUANTUM * ring_s
    return tuple((seconds - found[-1]) // quantum_s * quantum_s for seconds in found), leg.after_s + found[-1]


def _leads(ring_s: float, intervals: int) -> list[float]:
    return [ring_s * i / intervals for i in range(intervals + 1)]


def _goals(leg: Leg, behind: _Values, ring_s: float) -> list[_Goal]:
    """What a leg may aim for: in each interval the least lead with which no more is to come than at its end.

    Of what lies between, that is the best: a second less of lead saves a trip at most the second that comes later.
    """
    intervals = len(behind) - 1
    width_s = ring_s / intervals
    found = []
    for lead_s, (less_s, more_s) in zip(_leads(ring_s, intervals), pairwise(behind), strict=False):
        gained_s = min(width_s, max(0.0, less_s - more_s))
        rest_s = max(more_s, less_s - gained_s)
        found.append(_Goal(max(0.0, lead_s + gained_s - leg.after_s), rest_s))
    return found


def _least(lines: Sequence[_Line], leads: Sequence[float], goals: Sequence[_Goal]) -> list[float]:
    """By lead before a trip, the least seconds of it and of what follows.

    The goals that lie on one line of the trip's seconds are a window, which more lead moves on: the best goal of each
    is the first of those that are kept, of which none is as good as one behind it.
    """
    found = [math.inf] * len(leads)
    crossings = [_crossing_s(*pair) for pair in pairwise(lines)]
    for line, low_s, high_s in zip(lines, (-math.inf, *crossings), (*crossings, math.inf), strict=True):
        kept: deque[tuple[float, float]] = deque()
        coming = 0
        for i, lead_s in enumerate(leads):
            while coming < len(goals) and goals[coming].lead_s <= lead_s + high_s:
                goal_s, rest_s = goals[coming]
                seconds = line.slope * goal_s + rest_s
                while kept and kept[-1][1] >= seconds:
                    kept.pop()
                kept.append((goal_s, seconds))
                coming += 1
            while kept and kept[0][0] < lead_s + low_s:
                kept.popleft()
            if kept:
                found[i] = min(found[i], line.fixed_s - line.slope * lead_s + kept[0][1])
    return found


def _streamed(trip: Trip) -> list[_Line]:
    """The seconds of a trip that is not made, by what it adds to the lead."""
    return _highest(_Line(0.0, trip.accelerator_s), _Line(1.0, trip.link_s))


def _made(trip: Trip) -> list[_Line]:
    """The least seconds of a trip that is made, by what it adds to the lead."""
    least_s = max(trip.fixed_s, trip.seconds(trip.free_share))
    all_s = trip.host_s + trip.link_saved_s
    slope = trip.host_s / all_s if all_s > 0 else 1.0
    balanced_s = trip.fixed_s + slope * (trip.link_s - trip.fixed_s)
    return _highest(_Line(0.0, least_s), _Line(slope, balanced_s), _Line(1.0, trip.link_s - trip.link_saved_s))


def _highest(*lines: _Line) -> list[_Line]:
    """Of lines by their slopes, those that are the highest one somewhere."""
    found: list[_Line] = []
    for line in lines:
        if found and line.slope == found[-1].slope:
            line = max(line, found.pop())
        while len(found) > 1 and _crossing_s(*found[-2:]) >= _crossing_s(found[-1], line):
            found.pop()
        found.append(line)
    return found


def _seconds(lines: Sequence[_Line], gained_s: float) -> float:
    """What the highest line says."""
    return max(line.fixed_s + line.slope * gained_s for line in lines)


def _crossing_s(few: _Line, more: _Line) -> float:
    """From where on the steeper line is the higher one."""
    return (few.fixed_s - more.fixed_s) / (more.slope - few.slope)


def _best(leg: Leg, lead_s: float, goals: Sequence[_Goal]) -> float:
    """The share of a leg that begins with this lead."""
    trip, streamed, made = leg.trip, _streamed(leg.trip), _made(leg.trip)
    left_s = min(_seconds(streamed, goal.lead_s - lead_s) + goal.rest_s for goal in goals)
    some_s = [(trip_s + goal.rest_s, trip_s) for goal in goals for trip_s in (_seconds(made, goal.lead_s - lead_s),)]
    made_s, trip_s = min(some_s)
    if left_s <= made_s:
        return 0.0
    if trip.fixed_s + trip.host_s <= trip_s:
        return 1.0
    return min(1.0, max(0.0, trip_s - trip.fixed_s) / trip.host_s)


__all__ = ["least_step_s", "shares_with_ring"]
