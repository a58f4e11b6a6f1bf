"""How much of each trip's Linears the host computes: the balance of a whole step.

A step is a chain: segments of the accelerator, and between them *trips*, groups of Linears that read one
activation. While the host computes its share of a trip, the accelerator computes the rest; the chain goes on
when both are done. The link works beside the chain all the time, for all trips together, so the balance
T_cpu = T_gpu + T_com (HeteGen, arXiv 2403.01164, equation 5) has to hold for the step and not for each Linear.
With the share ``a`` of a trip's offloaded rows on the host,

    trip_s(a)  = max(fixed_s [a > 0] + a host_s, accelerator_s - a accelerator_saved_s)
    chain_s    = serial_s + sum trip_s(a)
    link_s     = sum (1 - a) link_s + a lost_s
    step_s     = max(chain_s, link_s)

Which trips are worth their fixed costs: each ``trip_s`` is replaced by its lower convex envelope, and the pieces of all
envelopes are taken in the order of chain seconds paid per link second saved until the link is no longer the
longer of the two (a fractional knapsack, which solves the relaxation exactly). Its value is a bound that no shares
beat. Once a trip is made, a row costs the chain the same in each, so the shares can be moved between the open trips:
``balance_along`` chooses them so that link and chain advance together, and a short staging ring is enough.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

_SAME_SLOPE_DIGITS = 6
_SWEEPS = 3


@dataclass(frozen=True)
class Trip:
    """Linears that share one trip of an activation to the host and of the results back. All in seconds.

    Attributes:
        host_s: the host computing all rows that are not resident.
        link_s: the link carrying them while the host reads nothing.
        accelerator_s: the accelerator computing all rows, the resident ones included.
        accelerator_saved_s: the part of that which falls away when no offloaded row is left to it.
        fixed_s: what the chain pays for the trip itself, once, as soon as the host has a row of any of its Linears.
        lost_s: what the link loses while the host reads all of the rows.
    """

    host_s: float
    link_s: float
    accelerator_s: float
    accelerator_saved_s: float
    fixed_s: float = 0.0
    lost_s: float = 0.0

    @property
    def link_saved_s(self) -> float:
        """The part of the link's seconds that falls away when all rows are on the host; never less than nothing."""
        return max(0.0, self.link_s - self.lost_s)

    def streamed_s(self, share: float) -> float:
        """Seconds of the link with this share of the offloaded rows on the host."""
        return self.link_s - share * self.link_saved_s

    @property
    def least_s(self) -> float:
        """Seconds of the chain with the share that is best for it."""
        return min(self.seconds(0.0), self.seconds(self.free_share))

    def seconds(self, share: float) -> float:
        """Seconds of the chain with this share of the offloaded rows on the host."""
        accelerator_s = self.accelerator_s - share * self.accelerator_saved_s
        return max(self.fixed_s + share * self.host_s, accelerator_s) if share > 0 else accelerator_s

    @property
    def free_share(self) -> float:
        """The share that costs the chain nothing but ``fixed_s``: the host is done with it when the accelerator is."""
        slope = self.host_s + self.accelerator_saved_s
        return min(1.0, max(0.0, (self.accelerator_s - self.fixed_s) / slope)) if slope > 0 else 0.0

    def share_for(self, behind_s: float) -> float:
        """The share at which the link is neither behind nor ahead after the trip.

        ``behind_s``: what the link is behind before it, less what the chain spends beside the trip.
        """
        on_host = (behind_s + self.link_s - self.fixed_s) / ((self.host_s + self.link_saved_s) or math.inf)
        rate_s = self.link_saved_s - self.accelerator_saved_s
        on_accelerator = (behind_s + self.link_s - self.accelerator_s) / rate_s if rate_s > 0 else 1.0
        return min(1.0, max(0.0, min(on_host, on_accelerator)))


@dataclass(frozen=True)
class Chain:
    """A step: its trips in order, and the seconds of the accelerator's segments, which the host cannot share."""

    trips: tuple[Trip, ...]
    serial_s: float

    def step_s(self, shares: Sequence[float]) -> float:
        """Seconds of the step with these shares on the host."""
        return max(self.path_s(shares), self.link_s(shares))

    def between(self, other: Chain) -> Chain:
        """Half way to a chain of the same trips with other seconds of the link and beside them."""
        trips = (
            replace(a, link_s=(a.link_s + b.link_s) / 2, lost_s=(a.lost_s + b.lost_s) / 2)
            for a, b in zip(self.trips, other.trips, strict=True)
        )
        return Chain(tuple(trips), (self.serial_s + other.serial_s) / 2)

    def path_s(self, shares: Sequence[float]) -> float:
        """Seconds of the trips and what is beside them, with these shares on the host."""
        return self.serial_s + sum(trip.seconds(share) for trip, share in zip(self.trips, shares, strict=True))

    def link_s(self, shares: Sequence[float]) -> float:
        """Seconds of the link, with these shares on the host."""
        return sum(trip.streamed_s(share) for trip, share in zip(self.trips, shares, strict=True))


@dataclass(frozen=True)
class Relaxation:
    """What the relaxed balance says.

    Attributes:
        opened: the trips that it makes; trips that are alike are opened together.
        bound_s: the seconds below which no shares come.
        fewest: of the last that are alike only as many as are needed, spread over the step. The others cost the chain
            nothing, and the link all of their rows, which it has to bring ahead of time.
    """

    opened: frozenset[int]
    bound_s: float
    fewest: frozenset[int]


def relax(chain: Chain) -> Relaxation:
    """Which trips are worth it, and the bound."""
    pieces = [piece for index, trip in enumerate(chain.trips) for piece in _envelope(index, trip)]
    chain_s = chain.serial_s + sum(trip.seconds(0.0) for trip in chain.trips)
    link_s = sum(trip.link_s for trip in chain.trips)
    opened: set[int] = set()
    fewest: set[int] = set()
    for alike in _classes(pieces):
        taken = 0
        for piece in alike:
            fraction = _fraction(piece, chain_s, link_s)
            chain_s += fraction * piece.chain_s
            link_s -= fraction * piece.saved_s
            taken += fraction > 0
        if taken == 0:
            break
        opened |= {piece.trip for piece in alike}
        fewest |= {alike[index].trip for index in spread_order(len(alike))[:taken]}
    return Relaxation(frozenset(opened), max(chain_s, link_s), frozenset(fewest))


def balance_along(
    chain: Chain, opened: Collection[int], whole: Sequence[Sequence[float]] = (), slack_s: float = 0.0,
    ring_s: float = 0.0,
) -> tuple[float, ...]:  # fmt: skip
    """Shares of the opened trips (0 elsewhere) so that after each of them the link is where the chain is.

    A step follows the other, so what the link is behind at the end is what it is behind at the start: the chain is
    walked several times.

    ``whole`` are the shares of each trip at which none of its Linears is in two places. They are taken where that puts
    the link no more than ``slack_s`` ahead or behind; the trips after it make up for it, at the latest the last one.
    """
    between_s = chain.serial_s / max(1, len(chain.trips))
    shares = [0.0] * len(chain.trips)
    behind_s = 0.0
    for _ in range(_SWEEPS):
        for index, trip in enumerate(chain.trips):
            if index in opened:
                shares[index] = trip.share_for(behind_s - between_s)
                if ring_s:
                    shares[index] = max(shares[index], trip.free_share)
                if slack_s and index != max(opened):
                    shares[index] = _nearest_whole(trip, shares[index], whole[index], slack_s)
            behind_s += trip.streamed_s(shares[index]) - trip.seconds(shares[index]) - between_s
            if ring_s:
                behind_s = max(behind_s, -ring_s)
    return tuple(shares)


def _nearest_whole(trip: Trip, share: float, whole: Sequence[float], slack_s: float) -> float:
    """The nearest of these shares, if it puts the link at most ``slack_s`` elsewhere."""
    nearest = min(whole, key=lambda other: abs(other - share))
    return nearest if abs(nearest - share) * (trip.host_s + trip.link_saved_s) <= slack_s else share


@dataclass(frozen=True)
class _Piece:
    """One linear piece of a trip's convex envelope."""

    trip: int
    start: float
    chain_s: float
    saved_s: float

    @property
    def slope(self) -> float:
        return self.chain_s / self.saved_s if self.saved_s > 0 else math.copysign(math.inf, self.chain_s)


def _fraction(piece: _Piece, chain_s: float, link_s: float) -> float:
    """How much of the piece to take: all while it shortens the chain, part where chain and link meet."""
    if piece.chain_s < 0 or piece.chain_s == 0 < piece.saved_s:
        return 1.0
    if link_s <= chain_s or piece.saved_s <= 0:
        return 0.0
    return min(1.0, (link_s - chain_s) / (piece.chain_s + piece.saved_s))


def _envelope(index: int, trip: Trip) -> list[_Piece]:
    """The lower convex envelope of ``trip.seconds`` over [0, 1], as pieces in the order of their shares."""
    hull: list[tuple[float, float]] = []
    for share in sorted({0.0, 1.0, *_break_even(trip)}):
        point = (share, trip.seconds(share))
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    saved_s = trip.link_saved_s
    return [_Piece(index, a[0], b[1] - a[1], (b[0] - a[0]) * saved_s) for a, b in zip(hull, hull[1:], strict=False)]


def _break_even(trip: Trip) -> Iterable[float]:
    """The share at which host and accelerator take equally long, if it lies between 0 and 1."""
    return (trip.free_share,) if 0.0 < trip.free_share < 1.0 else ()


def _is_above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _classes(pieces: Iterable[_Piece]) -> list[list[_Piece]]:
    """Pieces by slope, equal ones (of equal layers) together. Those of one trip keep their order: it is convex."""
    classes: dict[tuple[float, float], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        classes[_rounded(piece.slope), piece.start].append(piece)
    return [alike for _, alike in sorted(classes.items(), key=lambda item: item[0])]


def _rounded(slope: float) -> float:
    if slope == 0 or math.isinf(slope):
        return slope
    return round(slope, _SAME_SLOPE_DIGITS - 1 - math.floor(math.log10(abs(slope))))


def spread_order(count: int) -> list[int]:
    """0..count-1 in an order whose every beginning is spread evenly (the van der Corput sequence)."""
    bits = max(1, (count - 1).bit_length())
    return [i for i in (int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits)) if i < count]
