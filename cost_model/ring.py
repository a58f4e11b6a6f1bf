"""A chain of trips beside a link that can run ahead by a staging ring only.

The balance takes the link as at work all the time. It is not where what is streamed lies far from where the chain
spends its time: with most of it in the output layer the ring is full while the layers run, and empty at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from hetegen_compile.cost_model.chain import Chain

_STEPS = 2  # what the link is ahead by at the end of a step is what it is ahead by at the start of the next


def step_with_ring(chain: Chain, shares: Sequence[float], ring_s: float) -> float:
    """Seconds of a step in which the link is ahead by ``ring_s`` of its own time at most.

    Rows flow: a slot is free as soon as its rows are used, and rows are used as soon as they are there.
    """
    between_s = chain.serial_s / max(1, len(chain.trips))
    ahead_s = step_s = 0.0
    for _ in range(_STEPS):
        step_s = 0.0
        for trip, share in zip(chain.trips, shares, strict=True):
            ahead_s = min(ring_s, ahead_s + between_s)
            streamed_s = trip.streamed_s(share)
            trip_s = max(trip.seconds(share), streamed_s - ahead_s)
            ahead_s = min(ring_s, ahead_s + trip_s - streamed_s)
            step_s += between_s + trip_s
    return step_s


__all__ = ["step_with_ring"]
