"""Seconds of a decode step with some rows resident, estimated of the Linears alone.

It is the same whichever graph of a model asks: what is compared is the balance of a chain with a short ring and of the
host's thread, each segment between two Linears a launch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
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
    """A Linear at one token: what it reads, its weight's claim and rows, and its cost."""

    reads: fx.Node
    key: Hashable
    rows: int
    cost: NodeCost


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
        trips = tuple(self._trip(group, offloaded) for group in self._groups)
        launch_s = self.profile.accelerator.launch_s
        segment_s = max(launch_s, self.profile.accelerator.issuing_s(segment=True))
        chain = Chain(trips, segment_s * len(trips))
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

    def _trip(self, group: Sequence[int], offloaded: Sequence[float]) -> Trip:
        """Linears of which these shares are offloaded. In two places one costs a product and a join more."""
        both = sum(0.0 < offloaded[place] < 1.0 for place in group)
        pairs = [(self.work[place].cost, offloaded[place]) for place in group]
        launch_s, issue_s = self.profile.accelerator.launch_s, self.profile.accelerator.issuing_s(segment=False)
        paced_s = max(launch_s, issue_s)  # the accelerator waits for what it takes longer to issue
        return Trip(
            host_s=sum(share * cost.host_s for cost, share in pairs),
            link_s=sum(share * cost.link_s for cost, share in pairs),
            accelerator_s=sum(max(cost.accelerator_s, issue_s) for cost, _ in pairs) + 2 * both * paced_s,
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
