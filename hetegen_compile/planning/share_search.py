"""The search for the shares of the trips: those that the chain balances, simulated, corrected and varied.

Of equal trips either all are made, with equal shares, or as few as are needed, the others streamed whole: that saves
their fixed costs, and works where the staging ring lets the link run so far ahead. What the simulation takes longer
than the chain is fed back, which may make other trips worth it. Where the shortest step found is still far from what
the chain says to be possible, its way is varied (``share_ways``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import replace

from hetegen_compile.cost_model import (
    Chain,
    balance_along,
    legs_of,
    relax,
    shares_with_ring,
    step_with_ring,
    upload_s,
)
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.passes.fit_ring import fit_ring
from hetegen_compile.passes.plans import Splits
from hetegen_compile.planning.share_ways import RING_VARIATIONS, VARIATIONS, Attempt, Variations, Way, corrected
from hetegen_compile.planning.trials import Trials
from hetegen_compile.planning.trips import Trips, whole_shares, with_shares

_ROUNDS = 2
_WORTH = 0.004  # of the step: what the chain has to promise for a simulation
_FAR = 1.04  # times the chain's bound: a step that is longer is worth more simulations
_HOPELESS = 1.1  # times the shortest step: variations gain less than that
_MISTAKEN = 1.2  # times the shortest step: what the chain does not know of trips decides there
_NEAR = 1.05  # times the shortest step: what is made with other trips is tried in more ways, too
_RING_PARTS = (0.85, 0.7)  # of the ring: chunks are whole, so the link is seldom ahead by all of it
_MOST = 5  # variations: each is a schedule more


class Search:
    """What has been simulated; ``splits`` are the first."""

    def __init__(self, trials: Trials, context: Context, splits: Splits) -> None:
        self._trials = trials
        self._context = context
        self._found: dict[Hashable, tuple[Prediction, Splits]] = {}
        self.simulate(splits, keep=True)
        self._best: dict[bool, Attempt] = {}  # by whether blocks are cut as one
        self._balanced: list[Attempt] = []  # the last of each balance
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
        Where making all trips took much longer than that, the chain corrected by it has to say so, too.
        """
        relaxation, every = relax(chain), frozenset(range(len(chain.trips)))
        self._bound_s = min(self._bound_s, relaxation.bound_s)
        openings = dict.fromkeys(opened for opened in (every, relaxation.fewest, relaxation.opened) if opened)
        tried: list[Attempt] = []
        told = chain
        for opened in openings:
            way = Way(trips, chain, opened)
            if self._is_promising(replace(way, chain=told)) and (attempt := self._promising(way)):
                tried.append(attempt)
                if opened == every and attempt.step_s > _MISTAKEN * self._step_s:
                    told = attempt.corrected()
        if not tried:
            return
        last = min(tried, key=_shorter)
        chain = last.corrected()
        for _ in range(_ROUNDS):
            attempt = self._promising(self._reopened(replace(last.way, chain=chain)))
            if attempt is None:
                break
            if attempt.step_s < last.step_s:
                last, chain = attempt, attempt.corrected()
            else:
                chain = chain.between(last.way.chain)
        self._balanced.append(last)

    def _reopened(self, way: Way) -> Way:
        """With the trips that are made, or those that are worth it by this chain if that is shorter with its ring."""
        relaxation = relax(way.chain)
        self._bound_s = min(self._bound_s, relaxation.bound_s)
        openings = dict.fromkeys((way.opened, relaxation.fewest, relaxation.opened))
        ways = [replace(way, opened=opened) for opened in openings if opened]
        return min(ways, key=lambda one: step_with_ring(one.chain, self._shares(one), self._ring_s()))

    def vary(self) -> None:
        """Vary the way of the shortest attempt, and that of the shortest with other trips if it is not much longer.

        Not where another step is much shorter: what the chain does not know decides there.
        """
        by_step = sorted(self._best.values(), key=lambda attempt: attempt.step_s)
        ways = ((_HOPELESS, VARIATIONS), (_NEAR, ((corrected,), *VARIATIONS)))
        for (limit, variations), best in zip(ways, by_step, strict=False):
            if best.step_s > limit * self._step_s:
                return
            self._vary(best, variations)

    def along_ring(self, *, vary: bool) -> None:
        """Try the shares that are best beside a short ring, and ``vary`` them where that made the shortest step.

        Once everything else was tried: they only add to it.
        """
        before_s = self._step_s
        near = [last for last in self._balanced if last.step_s <= _NEAR * before_s]
        tried = [attempt for last in near for attempt in self._along_ring(last)]
        best = min(tried, key=_shorter, default=None)
        if vary and best is not None and best.step_s < before_s:
            self._vary(best, RING_VARIATIONS)

    def _along_ring(self, last: Attempt) -> Iterator[Attempt]:
        """By the corrected chain, and by what that is corrected to."""
        worth = 0.0 if self._is_far() else _WORTH
        for part in _RING_PARTS:
            attempt = last
            for _ in range(_ROUNDS):
                way = replace(attempt.way, chain=attempt.corrected(), ring_part=part)
                if step_with_ring(way.chain, self._shares(way), part * self._ring_s()) >= (1 - worth) * self._step_s:
                    break
                attempt = self._attempt(way)
                yield attempt

    def _vary(self, best: Attempt, variations: Variations) -> None:
        """As long as the shortest step is far from the chain's bound."""
        left = _MOST
        for line in variations:
            for variation in line:
                if not self._is_far() or not left:
                    return
                way = variation(best)
                if way == best.way:
                    continue
                before = len(self._found)
                attempt = self._attempt(way)
                left -= len(self._found) - before
                if attempt.step_s >= best.step_s:
                    break
                best = attempt

    def _is_far(self) -> bool:
        return self._step_s >= _FAR * self._bound_s

    def _promising(self, way: Way) -> Attempt | None:
        return self._attempt(way) if self._is_promising(way) else None

    def _is_promising(self, way: Way) -> bool:
        return way.chain.step_s(self._shares(way)) < (1 - _WORTH) * self._step_s

    def _attempt(self, way: Way) -> Attempt:
        shares = self._shares(way)
        rows = with_shares(way.trips, shares, self._context)
        splits = fit_ring(self._trials.module, rows, self._context, way.chunks) if way.fitted else rows
        attempt = Attempt(way, shares, self.simulate(splits))
        if not way.ring_part:
            known = self._best.get(way.cuts_blocks, attempt)
            self._best[way.cuts_blocks] = min(known, attempt, key=_shorter)
        return attempt

    def _shares(self, way: Way) -> tuple[float, ...]:
        if way.ring_part:
            return shares_with_ring(legs_of(way.chain), way.ring_part * self._ring_s())
        if not way.slack:
            return balance_along(way.chain, way.opened, ring_s=self._ring_s())
        whole = whole_shares(way.trips, self._context)
        return balance_along(way.chain, way.opened, whole, way.slack * self._ring_s(), self._ring_s())

    def _ring_s(self) -> float:
        """What it takes to fill the staging ring."""
        residency = require(self._context.residency, "choose_residency")
        chunk_s = upload_s(self._context.profile, residency.chunk_bytes)
        return chunk_s * residency.ring_bytes / residency.chunk_bytes


def _shorter(attempt: Attempt) -> tuple[float, int]:
    """Of equal steps that with fewer trips: there is more to be varied."""
    return attempt.step_s, len(attempt.way.opened)
