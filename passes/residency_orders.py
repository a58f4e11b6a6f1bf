"""Rows that stay on the accelerator before those of more gain per byte, where the step is shorter with them.

Why: gain per byte looks at each Linear by itself. It keeps the layers' Linears whole before any of the output layer,
whose one trip is shared by the most bytes. With three quarters of the weights resident little but the output layer is
offloaded then: while the layers run the ring is full and link and host idle, and the output layer waits for both. Some
of its rows in place of some of the layers' keep the link at work. And where the accelerator is not much faster than the
host, both work at the same time only on Linears of which each has some rows.

So a few ways of sharing out the memory are compared, in seconds of a decode step: as gain says; with some part of the
large weights; with the small ones (attention's) whole and the same share of each of the others. What is compared is the
balance of a chain with a short ring and of the host's thread, of the Linears alone: it is the same whichever graph of a
model asks. Gain has its way unless another one is shorter by more than such an estimate is wrong by.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from hetegen_compile.cost_model import (
    Chain,
    HardwareProfile,
    Trip,
    balance_along,
    relax,
    row_granularity,
    step_with_ring,
    upload_s,
)
from hetegen_compile.passes.claims import Claim
from hetegen_compile.passes.findings import NodeCost
from hetegen_compile.passes.residency_shares import residency_shares

_SHORTER = 0.96  # of the step as gain has it: estimates are wrong by a few percent
_LARGE, _SMALL = 1.5, 0.75  # of the typical weight, the one that most bytes lie in
_SHARES_OF_LARGE = (0.25, 0.5, 0.75, 1.0)
_LEAST_EVEN = 0.5  # of each of the others: a smaller part saves less than its product and its join cost


@dataclass(frozen=True)
class LinearWork:
    """A Linear at one token: what it reads, its weight's claim and rows, and its cost."""

    reads: fx.Node
    key: Hashable
    rows: int
    cost: NodeCost


def ordered_claims(
    claims: Sequence[Claim], work: Sequence[LinearWork], free_bytes: int, ahead_bytes: int, typical_bytes: int,
    profile: HardwareProfile,
) -> Sequence[Claim]:  # fmt: skip
    """The claims, with the rows that come before all others if that makes the step shorter.

    ``ahead_bytes`` is what the link has brought at most before it is used: the staging ring less the slot that is
    being filled.
    """
    estimate = _Estimate(work, ahead_bytes, profile)

    def step_s(order: Sequence[Claim]) -> float:
        return estimate.step_s(residency_shares([order], free_bytes))

    if not work or not 0 < free_bytes < sum(claim.nbytes for claim in claims):
        return claims
    best = min(_orders(claims, free_bytes, typical_bytes), key=step_s, default=claims)
    return best if step_s(best) < _SHORTER * step_s(claims) else claims


def _orders(claims: Sequence[Claim], free_bytes: int, typical_bytes: int) -> Iterator[list[Claim]]:
    """The ways that are compared with gain alone: shares by size, as far as the memory goes."""
    linears = [claim for claim in claims if claim.rank == 0]
    large = {claim.key for claim in linears if claim.nbytes > _LARGE * typical_bytes}
    small = {claim.key for claim in linears if claim.nbytes < _SMALL * typical_bytes}
    nbytes = {
        kind: sum(claim.nbytes for claim in linears if _kind(claim, small, large) == kind)
        for kind in ("small", "middle", "large")
    }
    for share in _SHARES_OF_LARGE if large else ():
        if share * nbytes["large"] <= free_bytes:
            yield _keeping(claims, {"large": share}, small, large)
    for share in (0.0, 0.5, 1.0) if large else (0.0,):
        left = free_bytes - nbytes["small"] - share * nbytes["large"]
        if _LEAST_EVEN * nbytes["middle"] <= left < nbytes["middle"]:
            shares = {"small": 1.0, "middle": left / nbytes["middle"], "large": share}
            yield _keeping(claims, shares, small, large)


def _kind(claim: Claim, small: set[Hashable], large: set[Hashable]) -> str:
    return "small" if claim.key in small else "large" if claim.key in large else "middle"


def _keeping(
    claims: Sequence[Claim], shares: Mapping[str, float], small: set[Hashable], large: set[Hashable]
) -> list[Claim]:
    """The claims with these shares of each kind before all others."""
    return [
        replace(claim, kept_rows=0 if claim.rank else _rows(claim, shares.get(_kind(claim, small, large), 0.0)))
        for claim in claims
    ]


def _rows(claim: Claim, share: float) -> int:
    if share >= 1.0:
        return claim.rows - claim.first
    step = row_granularity(claim.rows)
    return int((claim.rows - claim.first) * share) // step * step


@dataclass(frozen=True)
class _Estimate:
    """A decode step of the Linears alone, each segment between them a launch."""

    work: Sequence[LinearWork]
    ahead_bytes: int
    profile: HardwareProfile

    def step_s(self, first_rows: Mapping[Hashable, int]) -> float:
        """Seconds with these rows resident: of several shares the best."""
        offloaded = [first_rows.get(one.key, one.rows) / one.rows for one in self.work]
        trips = tuple(self._trip(group, offloaded) for group in self._groups())
        accelerator = self.profile.accelerator
        launch_s = accelerator.launch_s
        chain = Chain(trips, max(launch_s, accelerator.issuing_s(segment=True)) * len(trips))
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


__all__ = ["LinearWork", "ordered_claims"]
