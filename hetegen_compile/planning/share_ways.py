"""Ways of choosing the shares of the trips, what was simulated of them, and how a way is varied.

What no chain tells is tried around the way of the shortest step: Linears that are whole on one side (fewer launches,
while the link gets ahead or behind within the ring), chunks of other sizes (how slots follow each other around a short
ring decides how long the link waits for one), chunks that are not cut where the ring ends (fewer launches again),
somewhat more or less on the link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hetegen_compile.cost_model import Chain
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.planning.trips import Trips

_SHIFT = 0.06  # of the link's time, to try whether more or less of it shortens the step


@dataclass(frozen=True)
class Way:
    """How shares are chosen: the chain that is balanced, the trips that are made, and how the result is cut.

    Attributes:
        slack: seconds that the link may get ahead or behind for Linears that are whole on one side, as a part of what
            it takes to fill the staging ring.
        chunks: how many chunks the ring holds; None: as residency says.
        fitted: whether what is streamed is cut where the ring ends. If not, fewer chunks are issued, and some of the
            ring is not used.
        ring_part: if not 0, the shares are the best ones for a link that is ahead by this part of the ring at most,
            whichever trips that makes (``cost_model.lead``); ``opened`` and ``slack`` do not matter then.
    """

    trips: Trips
    chain: Chain
    opened: frozenset[int]
    slack: float = 0.0
    chunks: int | None = None
    fitted: bool = True
    ring_part: float = 0.0

    @property
    def cuts_blocks(self) -> bool:
        """Whether blocks are cut as one."""
        return any(group.block is not None for group in self.trips)


@dataclass(frozen=True)
class Attempt:
    """Shares as a way gives them, and the simulated step."""

    way: Way
    shares: tuple[float, ...]
    prediction: Prediction

    @property
    def step_s(self) -> float:
        """Seconds of the simulated step."""
        return self.prediction.step_s

    def corrected(self) -> Chain:
        """The chain with what the simulation took longer: the link in proportion, the rest beside the trips.

        Where the link works all the time, that rest may be less than the chain says: more can be computed on the host.
        """
        chain = self.way.chain
        link_s = chain.link_s(self.shares)
        busy_s = max(self.prediction.busy_s.get(lane, 0.0) for lane in ("up", "pin"))
        streams = any(trip.link_s and share < 1.0 for trip, share in zip(chain.trips, self.shares, strict=True))
        longer = _with_link(chain, busy_s / link_s) if streams else chain
        rest_s = self.prediction.beside_link_s - chain.path_s(self.shares)
        return replace(longer, serial_s=max(0.0, chain.serial_s + rest_s))


Variation = Callable[[Attempt], Way]
Variations = tuple[tuple[Variation, ...], ...]


def _with_link(chain: Chain, factor: float) -> Chain:
    """A chain whose link takes that many times as long."""
    longer = (replace(trip, link_s=trip.link_s * factor, lost_s=trip.lost_s * factor) for trip in chain.trips)
    return replace(chain, trips=tuple(longer))


def corrected(best: Attempt) -> Way:
    """The same way along the corrected chain."""
    return replace(best.way, chain=best.corrected())


def _slack(slack: float) -> Variation:
    return lambda best: replace(best.way, slack=slack)


def _uncut(best: Attempt) -> Way:
    return replace(best.way, fitted=False)


def _chunks(chunks: int) -> Variation:
    return lambda best: replace(best.way, chunks=chunks, fitted=True)


def _link(factor: float) -> Variation:
    return lambda best: replace(best.way, chain=_with_link(best.way.chain, factor))


RING_VARIATIONS: Variations = (
    (_uncut,),
    (corrected, corrected),
    (_chunks(4), _chunks(3)),
    (_link(1 + _SHIFT), _link(1 + _SHIFT)),
    (_link(1 - _SHIFT), _link(1 - _SHIFT)),
)
"""For shares that are chosen for a short ring; in each line as long as the one before shortened the step."""

VARIATIONS: Variations = ((_slack(0.25), _slack(0.5)), (_slack(0.5),), *RING_VARIATIONS)
"""The same for shares of chosen trips, of which Linears may be whole on one side."""
