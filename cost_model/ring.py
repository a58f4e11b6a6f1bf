"""A chain of trips beside a link that can run ahead by a staging ring only.

The balance takes the link as at work all the time. It is not where what is streamed lies far from where the chain
spends its time: with most of it in the output layer the ring is full while the layers run, and empty at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hetegen_compile.cost_model.chain import Chain, Trip

_STEPS = 2  # what the link is ahead by at the end of a step is what it is ahead by at the start of the next


class Leg(NamedTuple):
    """A trip, and the seconds of the chain that follow on it. The link's *lead* is the seconds that it is ahead by."""

    trip: Trip
    after_s: float

    def seconds(self, lead_s: float, share: float) -> float:
        """Seconds of the leg that begins with this lead, with this share of the trip on the host."""
        return max(self.trip.seconds(share), self.trip.streamed_s(share) - lead_s) + self.after_s

    def lead_behind_s(self, lead_s: float, share: float, ring_s: float) -> float:
        """The lead at its end."""
        return min(ring_s, lead_s + self.seconds(lead_s, share) - self.trip.streamed_s(share))


def legs_of(chain: Chain) -> list[Leg]:
    """A chain's trips, with what is beside them spread evenly."""
    return [Leg(trip, chain.serial_s / len(chain.trips)) for trip in chain.trips]


def step_with_ring(chain: Chain, shares: Sequence[float], ring_s: float) -> float:
    """Seconds of a step in which the link is ahead by ``ring_s`` of its own time at most.

    Rows flow: a slot is free as soon as its rows are used, and rows are used as soon as they are there.
    """
    legs = legs_of(chain)
    lead_s = step_s = 0.0
    for _ in range(_STEPS):
        step_s = 0.0
        for leg, share in zip(legs, shares, strict=True):
            step_s += leg.seconds(lead_s, share)
            lead_s = leg.lead_behind_s(lead_s, share, ring_s)
    return step_s


__all__ = ["Leg", "legs_of", "step_with_ring"]
