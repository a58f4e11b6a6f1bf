"""The split of all Linears together: shares from the chain of the step, judged by the simulated step.

Balance is global over a step: the link works while the accelerator attends, so it gets more rows than a Linear by
itself would give it, and only those Linears are split that are worth their trip (``cost_model.chain``). The real
passes then schedule the shares and the timeline simulates the step; what the simulation takes longer than the
chain (issue, slots, granularity, the rates of short transfers) is fed back. All-streamed and the closed form of each
Linear by itself are among the candidates: a plan is never worse than those in the simulation.

Of equal trips either all are made, with equal shares, or as few as are needed, the others streamed whole: that saves
their fixed costs, and works where the staging ring lets the link run so far ahead.

Blocks (``find_blocks``) that are cut as one make one trip instead of two. Both ways are balanced where the chain says
that blocks may win, and the shorter simulated step decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from hetegen_compile.cost_model import Chain, balance_along, relax
from hetegen_compile.passes.choose_splits import choose_splits, linears_of, pairable_blocks
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.passes.fit_ring import fit_ring
from hetegen_compile.passes.plans import Splits
from hetegen_compile.trials import Trials
from hetegen_compile.trips import Trips, step_chain, trips_of, with_shares

_ROUNDS = 2
_CLOSE = 0.01
_FAR = 1.04  # times the chain's bound: a step that is longer is worth more simulations
_VARIATIONS = 3
_STEP = 0.06
_NEARLY = 1.03  # a chain with blocks that is not longer than this may still win: what it saves in joins is not in it


def balanced_splits(module: fx.GraphModule, context: Context, trials: Trials) -> list[Splits]:
    """The rows of every Linear, in several ways with ``split="auto"``: that of the shortest simulated step first.

    Among them are all-streamed and the closed form of each Linear by itself, which residency has left room for.
    """
    splits = choose_splits(module, context)
    trips = trips_of(module)
    chain = step_chain(module, trips, context)
    if context.options.split != "auto" or not any(trip.link_s for trip in chain.trips):
        return [splits]
    search = _Search(trials, context, with_shares(trips, [0.0] * len(trips), context))
    paired = _promising(module, context, chain)
    if paired is not None:
        search.balance(*paired)
    if paired is None or context.options.pair_mlp is not True:
        if any(plan.host for plan in splits.values()):
            search.simulate(splits)
        search.balance(trips, chain)
    search.vary()
    return search.by_step()


def _promising(module: fx.GraphModule, context: Context, chain: Chain) -> tuple[Trips, Chain] | None:
    """Trips and chain with blocks cut as one, if the chain says that they may win or the options that they must."""
    blocks = pairable_blocks(linears_of(module), context)
    if not blocks:
        return None
    paired = trips_of(module, blocks)
    shorter = step_chain(module, paired, context)
    wins = context.options.pair_mlp is True or relax(shorter).bound_s < _NEARLY * relax(chain).bound_s
    return (paired, shorter) if wins else None


def promising_blocks(module: fx.GraphModule, context: Context) -> Splits | None:
    """Splits with blocks cut as one, as the chain balances them; None where no block may win. Nothing is simulated."""
    found = _promising(module, context, step_chain(module, trips_of(module), context))
    if found is None or context.options.split != "auto":
        return None
    paired, chain = found
    return with_shares(paired, balance_along(chain, relax(chain).opened), context)


@dataclass(frozen=True)
class _Attempt:
    """Shares as a chain balances them, how chunks are cut, and the simulated step."""

    trips: Trips
    chain: Chain
    opened: frozenset[int]
    shares: tuple[float, ...]
    chunks: int | None
    prediction: Prediction

    @property
    def step_s(self) -> float:
        return self.prediction.step_s

    def corrected(self) -> Chain:
        """The chain with what the simulation took longer: the link in proportion, the rest beside the trips.

        Where the link worked all the time, nothing is known of the rest.
        """
        link_s = self.chain.link_s(self.shares)
        busy_s = max(self.prediction.busy_s.get(lane, 0.0) for lane in ("up", "pin"))
        longer = busy_s / link_s if link_s > 0 else 1.0
        trips = tuple(replace(trip, link_s=trip.link_s * longer) for trip in self.chain.trips)
        if busy_s > (1 - _CLOSE) * self.step_s:
            return Chain(trips, self.chain.serial_s)
        return Chain(trips, max(0.0, self.chain.serial_s + self.step_s - self.chain.path_s(self.shares)))


class _Search:
    """What has been simulated; ``splits`` are the first."""

    def __init__(self, trials: Trials, context: Context, splits: Splits) -> None:
        self._trials = trials
        self._context = context
        self._found = [(trials.step_s(context, splits, keep=True), splits)]
        self._best: _Attempt | None = None
        self._bound_s = math.inf

    @property
    def _step_s(self) -> float:
        """The shortest step."""
        return min(step_s for step_s, _ in self._found)

    def by_step(self) -> list[Splits]:
        """All splits, those of shorter steps first."""
        return [splits for _, splits in sorted(self._found, key=lambda found: found[0])]

    def simulate(self, splits: Splits) -> Prediction:
        """The step with these splits."""
        prediction = self._trials.prediction(self._context, splits)
        self._found.append((prediction.step_s, splits))
        return prediction

    def balance(self, trips: Trips, chain: Chain) -> None:
        """Try several ways of choosing the trips that are made, and the best of them with corrected chains.

        Nothing is simulated that the chain, which leaves out much, does not say to be shorter than what was found.
        """
        relaxation, every = relax(chain), frozenset(range(len(chain.trips)))
        self._bound_s = min(self._bound_s, relaxation.bound_s)
        openings = dict.fromkeys(opened for opened in (relaxation.fewest, relaxation.opened, every) if opened)
        tried = [attempt for opened in openings if (attempt := self._attempt(trips, chain, opened))]
        if not tried:
            return
        last = min(tried, key=lambda attempt: attempt.step_s)
        chain = last.corrected()
        for _ in range(_ROUNDS):
            attempt = self._attempt(trips, chain, last.opened)
            if attempt is None:
                return
            if attempt.step_s < last.step_s:
                last, chain = attempt, attempt.corrected()
            else:
                chain = chain.between(last.chain)

    def vary(self) -> None:
        """Try what no chain tells, around the shortest step, if that is far from what the chain says to be possible.

        How slots follow each other around a short ring decides how long the link waits for one: with chunks of another
        size, or somewhat more or less on the link, they do otherwise.
        """
        if self._best is None:
            return
        for vary in (_other_chunks, _less_on_link, _more_on_link):
            for _ in range(_VARIATIONS):
                best = self._best
                if best.step_s < _FAR * self._bound_s:
                    return
                self._attempt_again(best, vary)
                if self._best is best:
                    break

    def _attempt_again(self, best: _Attempt, vary: Callable[[_Attempt], tuple[Chain, int | None]]) -> None:
        chain, chunks = vary(best)
        self._simulated(best.trips, chain, best.opened, chunks)

    def _attempt(self, trips: Trips, chain: Chain, opened: frozenset[int]) -> _Attempt | None:
        if chain.step_s(balance_along(chain, opened)) >= (1 - _CLOSE) * self._step_s:
            return None
        return self._simulated(trips, chain, opened, None)

    def _simulated(self, trips: Trips, chain: Chain, opened: frozenset[int], chunks: int | None) -> _Attempt:
        shares = balance_along(chain, opened)
        rows = with_shares(trips, shares, self._context)
        splits = fit_ring(self._trials.module, rows, self._context, chunks)
        attempt = _Attempt(trips, chain, opened, shares, chunks, self.simulate(splits))
        if self._best is None or attempt.step_s < self._best.step_s:
            self._best = attempt
        return attempt


def _other_chunks(attempt: _Attempt) -> tuple[Chain, int | None]:
    """Chunks of another part of the ring."""
    return attempt.chain, {None: 4, 4: 3, 3: 6}.get(attempt.chunks, 2)


def _less_on_link(attempt: _Attempt) -> tuple[Chain, int | None]:
    return _with_link(attempt.chain, 1 + _STEP), attempt.chunks


def _more_on_link(attempt: _Attempt) -> tuple[Chain, int | None]:
    return _with_link(attempt.chain, 1 - _STEP), attempt.chunks


def _with_link(chain: Chain, factor: float) -> Chain:
    """A chain whose link takes that many times as long."""
    return replace(chain, trips=tuple(replace(trip, link_s=trip.link_s * factor) for trip in chain.trips))
