"""Seconds of a decode step with some rows resident, estimated of the Linears alone.

It is the same whichever graph of a model asks: what is compared is the balance of a chain with a short ring and of the
host's thread, each segment between two Linears a launch. What the accelerator computes of its own while the host has a
part of a trip (attention's Linears beside an MLP that reads the same input) takes no more time than that.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from hetegen_compile.cost_model import (
    Chain,
    HardwareProfile,
    Trip,
    balance_along,
    relax,
    step_with_ring,
    upload_s,
)
from hetegen_compile.passes.findings import NodeCost


@dataclass(frozen=True)
class LinearWork:
    """A Linear at one token: what it reads, its weight's claim and rows, and its cost.

    ``needs`` are the Linears that it cannot start without: bits, by their places among all in program order.
    """

    reads: fx.Node
    key: Hashable
    rows: int
    cost: NodeCost
    needs: int


@dataclass(frozen=True)
class Estimate:
    """A decode step of Linears in program order.

    ``ahead_bytes`` is what the link has brought at most before it is used.
    """

    work: Sequence[LinearWork]
    ahead_bytes: int
    profile: HardwareProfile

    def step_s(self, first_rows: Mapping[Hashable, int]) -> float:
        """Seconds with the rows from these on resident: of several shares of the others the best."""
        offloaded = [first_rows.get(one.key, one.rows) / one.rows for one in self.work]
        trips = self._with_beside([self._trip(group, offloaded) for group in self._groups], offloaded)
        launch_s = self.profile.accelerator.launch_s
        segment_s = max(launch_s, self.profile.accelerator.issuing_s(segment=True))
        chain = Chain(tuple(trips), segment_s * len(trips))
        ring_s = upload_s(self.profile, self.ahead_bytes)
        relaxation, issuing_s = relax(chain), self._issuing_s(offloaded, len(trips))
        found = []
        every = frozenset(range(len(trips)))
        for opened in dict.fromkeys((frozenset[int](), relaxation.fewest, relaxation.opened, every)):
            shares = balance_along(chain, opened, ring_s=ring_s)
            host_s = sum(
                trip.host_s * share + 2 * launch_s + self.profile.synchronise_s
                for trip, share in zip(trips, shares, strict=True)
                if share
            )
            found.append(max(step_with_ring(chain, shares, ring_s), issuing_s + host_s))
        return min(found)

    @cached_property
    def _groups(self) -> list[list[int]]:
        """Linears that share a trip."""
        groups: dict[fx.Node, list[int]] = {}
        for place, one in enumerate(self.work):
            groups.setdefault(one.reads, []).append(place)
        return list(groups.values())

    @cached_property
    def _group_of(self) -> dict[int, int]:
        return {place: index for index, group in enumerate(self._groups) for place in group}

    @cached_property
    def _between(self) -> list[list[int]]:
        """Of each group the Linears of others up to one that needs all of these."""
        return [list(self._up_to_gate(group)) for group in self._groups]

    def _up_to_gate(self, group: Sequence[int]) -> Iterator[int]:
        before = sum(1 << place for place in group)
        for place in range(group[0], len(self.work)):
            if place in group:
                continue
            if not before & ~self.work[place].needs:
                return
            before |= 1 << place
            yield place

    def _with_beside(self, trips: list[Trip], offloaded: Sequence[float]) -> list[Trip]:
        """The trips, what is resident beside one that the host may have a part of as the accelerator's work of it."""
        moved: set[int] = set()
        for index, group in enumerate(self._groups):
            shared = sum(1 << place for place in group if offloaded[place])
            for place in self._between[index] if shared else ():
                if offloaded[place] or place in moved or self.work[place].needs & shared:
                    continue
                moved.add(place)
                seconds = self._accelerator_s(place)
                for other, more_s in ((index, seconds), (self._group_of[place], -seconds)):
                    trips[other] = replace(trips[other], accelerator_s=max(0.0, trips[other].accelerator_s + more_s))
        return trips

    def _accelerator_s(self, place: int) -> float:
        """A Linear on the accelerator, which waits for what it takes longer to issue."""
        return max(self.work[place].cost.accelerator_s, self.profile.accelerator.issuing_s(segment=False))

    def _trip(self, group: Sequence[int], offloaded: Sequence[float]) -> Trip:
        """Linears of which these shares are offloaded. In two places one costs a product and a join more."""
        both = sum(0.0 < offloaded[place] < 1.0 for place in group)
        pairs = [(self.work[place].cost, offloaded[place]) for place in group]
        launch_s, issue_s = self.profile.accelerator.launch_s, self.profile.accelerator.issuing_s(segment=False)
        return Trip(
            host_s=sum(share * cost.host_s for cost, share in pairs),
            link_s=sum(share * cost.link_s for cost, share in pairs),
            accelerator_s=sum(map(self._accelerator_s, group)) + 2 * both * max(launch_s, issue_s),
            accelerator_saved_s=sum(share * cost.accelerator_s for cost, share in pairs),
            fixed_s=self.profile.fixed_s_per_split + launch_s,
            lost_s=sum(share * cost.link_lost_s for cost, share in pairs),
        )

    def _issuing_s(self, offloaded: Sequence[float], segments: int) -> float:
        """What the host's thread issues: Linears, prefetches, joins, segments."""
        accelerator = self.profile.accelerator
        parts = sum(3 if 0.0 < share < 1.0 else 1 for share in offloaded)
        prefetches = sum(share > 0.0 for share in offloaded)
        linears_s = parts * accelerator.issuing_s(segment=False) + prefetches * accelerator.launch_s
        return linears_s + segments * accelerator.issuing_s(segment=True)


__all__ = ["Estimate", "LinearWork"]
