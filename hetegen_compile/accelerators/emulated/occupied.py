"""What lies in a ring of slots, and the rule of filling it again: only after a release that is known of."""

from __future__ import annotations

from collections.abc import Sequence

from hetegen_compile.accelerators.emulated.clocks import Access, Clock, covers
from hetegen_compile.accelerators.emulated.values import Occupancy
from hetegen_compile.errors import SlotInUseError


class Occupied:
    """The occupancies of one ring that nothing has overwritten yet; called by the host thread only."""

    def __init__(self) -> None:
        self._occupied: list[Occupancy] = []

    def vacate(self, by: Access, carried: Sequence[Occupancy] = ()) -> list[Occupancy]:
        """Everything is over but what is ``carried``: empty the ring of the rest; returns what was not released."""
        left = [one for one in self._occupied if one.released is None and one not in carried]
        for occupancy in left:
            occupancy.released = by
        self._occupied[:] = carried
        return left

    def occupy(self, occupancy: Occupancy, writer: Access, clock: Clock) -> None:
        """``writer``, whose lane knows ``clock``, fills bytes: what was there is released, and that is known."""
        for earlier in [other for other in self._occupied if other.overlaps(occupancy)]:
            if earlier.released is None:
                raise SlotInUseError(f"{writer.node} overwrites the slot of {earlier.node}, which is not released")
            if not covers(clock, earlier.released):
                raise SlotInUseError(
                    f"{writer.node} overwrites the slot of {earlier.node} without waiting for its release "
                    f"({earlier.released.node})"
                )
            self._occupied.remove(earlier)
        self._occupied.append(occupancy)
