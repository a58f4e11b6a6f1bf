"""How much of each trip's Linears the host computes: the whole step in one linear programme.

A decode step is a chain: segments of the accelerator, and between them *trips*, groups of Linears that read one
activation. While the host computes its share of a trip, the accelerator computes the rest; the chain goes on
when both are done. The link works beside the chain all the time, for all trips together, so the balance
T_cpu = T_gpu + T_com (HeteGen, arXiv 2403.01164, equation 5) has to hold for the step and not for each Linear.
With the share ``a`` of a trip's offloaded rows on the host,

    trip_s(a)  = max(fixed_s [a > 0] + a host_s, accelerator_fixed_s + accelerator_s - a accelerator_saved_s)
    chain_s    = serial_s + sum trip_s(a)
    link_s     = sum (1 - a) link_s
    step_s     = max(chain_s, link_s)

Each ``trip_s`` is replaced by its lower convex envelope; then the best shares are found exactly by taking the
pieces of all envelopes in the order of chain seconds paid per link second saved, until the link is no longer
the longer of the two (a fractional knapsack). The value of that relaxation is a bound that no shares beat; the
shares differ from it in one trip at most.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SAME_SLOPE_DIGITS = 6
_BISECTIONS = 30


@dataclass(frozen=True)
class Trip:
    """Linears that share one trip of an activation to the host and of the results back. All in seconds.

    Attributes:
        host_s: the host computing all rows that are not resident.
        link_s: the link carrying them.
        accelerator_s: the accelerator computing all rows, the resident ones included.
        accelerator_saved_s: the part of that which falls away when no offloaded row is left to it.
        fixed_s: what the chain pays for the trip itself as soon as the host has a row.
        accelerator_fixed_s: what it pays for the accelerator's part, launches mostly.
        all_host_saved_s: what the chain saves beyond that when everything is on the host (a whole block of
            Linears with what lies between them needs fewer trips).
    """

    host_s: float
    link_s: float
    accelerator_s: float
    accelerator_saved_s: float
    fixed_s: float = 0.0
    accelerator_fixed_s: float = 0.0
    all_host_saved_s: float = 0.0

    def seconds(self, share: float) -> float:
        """Seconds of the chain with this share of the offloaded rows on the host."""
        accelerator_s = self.accelerator_s - share * self.accelerator_saved_s
        if accelerator_s > 0:
            accelerator_s += self.accelerator_fixed_s
        if share <= 0:
            return accelerator_s
        host_s = self.fixed_s + share * self.host_s - (self.all_host_saved_s if share >= 1 else 0.0)
        return max(host_s, accelerator_s)


@dataclass(frozen=True)
class Chain:
    """A step: its trips in order, and the seconds of the accelerator's segments, which the host cannot share."""

    trips: tuple[Trip, ...]
    serial_s: float

    def step_s(self, shares: Sequence[float]) -> float:
        """Seconds of the step with these shares on the host."""
        pairs = list(zip(self.trips, shares, strict=True))
        chain_s = self.serial_s + sum(trip.seconds(share) for trip, share in pairs)
        return max(chain_s, sum(trip.link_s * (1.0 - share) for trip, share in pairs))


@dataclass(frozen=True)
class ChainSplit:
    """Shares on the host by trip, the seconds of the step with them, and the bound of the relaxation."""

    shares: tuple[float, ...]
    step_s: float
    bound_s: float


@dataclass(frozen=True)
class _Piece:
    """One linear piece of a trip's convex envelope."""

    trip: int
    start: float
    end: float
    chain_s: float
    saved_s: float

    @property
    def slope(self) -> float:
        return self.chain_s / self.saved_s if self.saved_s > 0 else math.copysign(math.inf, self.chain_s)


def solve_chain(chain: Chain) -> ChainSplit:
    """The shares of least step, each trip's between 0 and 1, and the bound."""
    trips = chain.trips
    pieces = [piece for index, trip in enumerate(trips) for piece in _envelope(index, trip)]
    shares = [0.0] * len(trips)
    chain_s = chain.serial_s + sum(trip.seconds(0.0) for trip in trips)
    link_s = sum(trip.link_s for trip in trips)
    for alike in _classes(pieces):
        taken = 0.0
        for piece in alike:
            fraction = _fraction(piece, chain_s, link_s)
            chain_s += fraction * piece.chain_s
            link_s -= fraction * piece.saved_s
            taken += fraction
        _take(chain, shares, alike, taken)
        if taken < len(alike):
            break
    return ChainSplit(tuple(shares), chain.step_s(shares), max(chain_s, link_s))


def _take(chain: Chain, shares: list[float], alike: Sequence[_Piece], taken: float) -> None:
    """Put ``taken`` of the pieces (equal layers), one of them perhaps in part, on the host."""
    whole = int(taken)
    chosen = list(alike) if whole == len(alike) else _diffused(chain, shares, alike, whole)
    for piece in chosen:
        shares[piece.trip] = piece.end
    rest = [piece for piece in alike if piece not in chosen]
    if taken > whole and rest:
        piece = rest[len(rest) // 2]
        shares[piece.trip] = piece.start + (taken - whole) * (piece.end - piece.start)
        _settle_last(chain, shares, piece)


def _diffused(chain: Chain, shares: Sequence[float], alike: Sequence[_Piece], count: int) -> list[_Piece]:
    """``count`` of the pieces, chosen along the chain so that link and chain advance together.

    The link can run ahead of the chain by the staging ring only. As in error diffusion, a piece goes to the host where
    the link would otherwise be further behind than a threshold, which is bisected until the count is right.
    """
    low, high = -1.0, 1.0
    best: list[_Piece] = []
    for _ in range(_BISECTIONS):
        threshold = (low + high) / 2
        best = _along_chain(chain, shares, alike, count, threshold)
        if len(best) == count:
            break
        low, high = (threshold, high) if len(best) > count else (low, threshold)
    missing = [piece for piece in alike if piece not in best][: max(0, count - len(best))]
    return [*best[:count], *missing]


def _along_chain(
    chain: Chain, shares: Sequence[float], alike: Sequence[_Piece], count: int, threshold: float
) -> list[_Piece]:
    """The pieces at which the link, as a share of the step, is behind by more than the threshold."""
    here = {piece.trip: piece for piece in alike}
    expected = chain.step_s([
        here[i].start + (here[i].end - here[i].start) * count / len(alike) if i in here else share
        for i, share in enumerate(shares)
    ]) or 1.0  # fmt: skip
    between_s = chain.serial_s / max(1, len(shares))
    behind, found = 0.0, []
    for index, trip in enumerate(chain.trips):
        share = shares[index]
        after = behind + (trip.link_s * (1.0 - share) - trip.seconds(share) - between_s) / expected
        if index in here and after > threshold:
            found.append(here[index])
            share = here[index].end
            after = behind + (trip.link_s * (1.0 - share) - trip.seconds(share) - between_s) / expected
        behind = after
    return found


def _fraction(piece: _Piece, chain_s: float, link_s: float) -> float:
    """How much of the piece to take: all while it shortens the step, part where chain and link meet."""
    if piece.chain_s <= 0:
        return 1.0
    if link_s <= chain_s:
        return 0.0
    return min(1.0, (link_s - chain_s) / (piece.chain_s + piece.saved_s))


def _settle_last(chain: Chain, shares: list[float], piece: _Piece) -> None:
    """The only trip inside a piece costs more than its envelope says: its ends may be better."""

    def step_s(share: float) -> float:
        return chain.step_s([*shares[: piece.trip], share, *shares[piece.trip + 1 :]])

    shares[piece.trip] = min((shares[piece.trip], piece.start, piece.end), key=step_s)


def _envelope(index: int, trip: Trip) -> list[_Piece]:
    """The lower convex envelope of ``trip.seconds`` over [0, 1], as pieces in the order of their shares."""
    points = sorted({0.0, 1.0, *_break_even(trip)})
    hull: list[tuple[float, float]] = []
    for share in points:
        point = (share, trip.seconds(share))
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [
        _Piece(index, a[0], b[0], b[1] - a[1], (b[0] - a[0]) * trip.link_s)
        for a, b in zip(hull, hull[1:], strict=False)
    ]


def _break_even(trip: Trip) -> Iterable[float]:
    """The share at which host and accelerator take equally long, if it lies between 0 and 1."""
    slope = trip.host_s + trip.accelerator_saved_s
    if slope <= 0:
        return ()
    share = (trip.accelerator_s + trip.accelerator_fixed_s - trip.fixed_s) / slope
    return (share,) if 0.0 < share < 1.0 else ()


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
    return slope if math.isinf(slope) or slope == 0 else round(slope, _SAME_SLOPE_DIGITS - 1 - int(math.log10(abs(slope))))


def spread_order(count: int) -> list[int]:
    """0..count-1 in an order whose every beginning is spread evenly (the van der Corput sequence)."""
    bits = max(1, (count - 1).bit_length())
    return [i for i in (int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits)) if i < count]
