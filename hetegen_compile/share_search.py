"""The search for the shares of the trips: those that the chain balances, simulated, corrected and varied.

Of equal trips either all are made, with equal shares, or as few as are needed, the others streamed whole: that saves
their fixed costs, and works where the staging ring lets the link run so far ahead. What the simulation takes longer
than the chain is fed back. Where the shortest step found is still far from what the chain says to be possible, what no
chain tells is tried around it: Linears that are whole on one side (fewer launches, while the link gets ahead or behind
within the ring), chunks of other sizes (how slots follow each other around a short ring decides how long the link
waits for one), somewhat more or less on the link.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from hetegen_compile.cost_model import Chain, balance_along, relax, upload_s
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.passes.fit_ring import fit_ring
from hetegen_compile.passes.plans import Splits
from hetegen_compile.trials import Trials
from hetegen_compile.trips import Trips, whole_shares, with_shares

_ROUNDS = 2
_CLOSE = 0.01  # of the step: a lane that idles for less works all the time
_WORTH = 0.004  # of the step: what the chain has to promise for a simulation
_FAR = 1.04  # times the chain's bound: a step that is longer is worth more simulations
_HOPELESS = 1.1  # times the shortest step: variations gain less than that
_MOST = 5  # variations: each is a schedule more
_SHIFT = 0.06  # of the link's time, to try whether more or less of it shortens the step


@dataclass(frozen=True)
class _Way:
    """How shares are chosen: the chain that is balanced, the trips that are made, and how the result is cut.

    Attributes:
        slack: seconds that the link may get ahead or behind for Linears that are whole on one side, as a part of what
            it takes to fill the staging ring.
        chunks: how many chunks the ring holds; None: as residency says.
    """

    trips: Trips
    chain: Chain
    opened: frozenset[int]
    slack: float = 0.0
    chunks: int | None = None


@dataclass(frozen=True)
class _Attempt:
    """Shares as a way gives them, and the simulated step."""

    way: _Way
    shares: tuple[float, ...]
    prediction: Prediction

    @property
    def step_s(self) -> float:
        return self.prediction.step_s

    def corrected(self) -> Chain:
        """The chain with what the simulation took longer: the link in proportion, the rest beside the trips.

        Where the link worked all the time, nothing is known of the rest.
        """
        chain = self.way.chain
        link_s = chain.link_s(self.shares)
        busy_s = max(self.prediction.busy_s.get(lane, 0.0) for lane in ("up", "pin"))
        longer = _with_link(chain, busy_s / link_s) if link_s > 0 else chain
        if busy_s > (1 - _CLOSE) * self.step_s:
            return longer
        return replace(longer, serial_s=max(0.0, chain.serial_s + self.step_s - chain.path_s(self.shares)))


class Search:
    """What has been simulated; ``splits`` are the first."""

    def __init__(self, trials: Trials, context: Context, splits: Splits) -> None:
        self._trials = trials
        self._context = context
        self._found: dict[Hashable, tuple[Prediction, Splits]] = {}
        self.simulate(splits, keep=True)
        self._best: _Attempt | None = None
        self._bound_s = math.inf

    @property
    def _step_s(self) -> float:
        """The shortest step."""
        return min(prediction.step_s for prediction, _ in self._found.values())

    def by_step(self) -> list[Splits]:
        """All splits, those of shorter steps first."""
        return [splits for _, splits in sorted(self._found.values(), key=lambda found: found[0].step_s)]

    def simulate(self, splits: Splits, *, keep: bool = False) -> Prediction:
        """The seconds of a step with these splits, not those of its nodes; ``keep`` as of ``Trials``.

        Ways that come to the same rows are simulated once.
        """
        key = tuple(sorted(splits.items()))
        if key not in self._found:
            prediction = self._trials.prediction(self._context, splits, keep=keep)
            without_nodes = replace(prediction, work={}, start_s={}, end_s={})  # they would keep the schedule alive
            self._found[key] = without_nodes, splits
        return self._found[key][0]

    def balance(self, trips: Trips, chain: Chain) -> None:
        """Try several ways of choosing the trips that are made, and the best of them with corrected chains.

        Nothing is simulated that the chain, which leaves out much, does not say to be shorter than what was found.
        """
        relaxation, every = relax(chain), frozenset(range(len(chain.trips)))
        self._bound_s = min(self._bound_s, relaxation.bound_s)
        openings = dict.fromkeys(opened for opened in (relaxation.fewest, relaxation.opened, every) if opened)
        tried = [attempt for opened in openings if (attempt := self._promising(_Way(trips, chain, opened)))]
        if not tried:
            return
        last = min(tried, key=lambda attempt: attempt.step_s)
        chain = last.corrected()
        for _ in range(_ROUNDS):
            attempt = self._promising(_Way(trips, chain, last.way.opened))
            if attempt is None:
                return
            if attempt.step_s < last.step_s:
                last, chain = attempt, attempt.corrected()
            else:
                chain = chain.between(last.way.chain)

    def vary(self) -> None:
        """Vary the way of the shortest attempt as long as that shortens it and it is far from the chain's bound.

        Not where another step is much shorter: what the chain does not know decides there.
        """
        left = _MOST
        for variations in _VARIATIONS:
            for variation in variations:
                best = self._best
                if best is None or best.step_s < _FAR * self._bound_s or not left:
                    return
                if best.step_s > _HOPELESS * self._step_s:
                    return
                way = variation(best.way)
                if way == best.way:
                    continue
                before = len(self._found)
                attempt = self._attempt(way)
                left -= len(self._found) - before
                if attempt.step_s >= best.step_s:
                    break

    def _promising(self, way: _Way) -> _Attempt | None:
        shares = self._shares(way)
        return self._attempt(way) if way.chain.step_s(shares) < (1 - _WORTH) * self._step_s else None

    def _attempt(self, way: _Way) -> _Attempt:
        shares = self._shares(way)
        rows = with_shares(way.trips, shares, self._context)
        splits = fit_ring(self._trials.module, rows, self._context, way.chunks)
        attempt = _Attempt(way, shares, self.simulate(splits))
        if self._best is None or attempt.step_s < self._best.step_s:
            self._best = attempt
        return attempt

    def _shares(self, way: _Way) -> tuple[float, ...]:
        if not way.slack:
            return balance_along(way.chain, way.opened, ring_s=self._ring_s())
        whole = whole_shares(way.trips, self._context)
        return balance_along(way.chain, way.opened, whole, way.slack * self._ring_s(), self._ring_s())

    def _ring_s(self) -> float:
        """What it takes to fill the staging ring."""
        residency = require(self._context.residency, "choose_residency")
        chunk_s = upload_s(self._context.profile, residency.chunk_bytes)
        return chunk_s * residency.ring_bytes / residency.chunk_bytes


def _with_link(chain: Chain, factor: float) -> Chain:
    """A chain whose link takes that many times as long."""
    return replace(chain, trips=tuple(replace(trip, link_s=trip.link_s * factor) for trip in chain.trips))


def _slack(slack: float) -> Callable[[_Way], _Way]:
    return lambda way: replace(way, slack=slack)


def _chunks(chunks: int) -> Callable[[_Way], _Way]:
    return lambda way: replace(way, chunks=chunks)


def _link(factor: float) -> Callable[[_Way], _Way]:
    return lambda way: replace(way, chain=_with_link(way.chain, factor))


_VARIATIONS = (
    (_slack(0.25), _slack(0.5)),
    (_slack(0.5),),
    (_chunks(4), _chunks(3)),
    (_link(1 + _SHIFT), _link(1 + _SHIFT)),
    (_link(1 - _SHIFT), _link(1 - _SHIFT)),
)
"""In each line as long as the one before shortened the step."""
