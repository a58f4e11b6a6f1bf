"""Rows that stay on the accelerator before those of more gain per byte, where the step is shorter with them.

Why: gain per byte looks at each Linear by itself. It keeps the layers' Linears whole before any of the output layer,
whose one trip is shared by the most bytes. With three quarters of the weights resident little but the output layer is
offloaded then: while the layers run the ring is full and link and host idle, and the output layer waits for both. Some
of its rows in place of some of the layers' keep the link at work. Where the accelerator is not much faster than the
host, both work at the same time only on Linears of which each has some rows. And where one Linear of each layer is
enough for all that has to be offloaded, the same share of each keeps the host at work in every layer.

So a few ways of sharing out the memory are compared, in seconds of a decode step (``residency_estimate``): as gain
says; with some part of the large weights; with the small ones (attention's) whole and the same share of each of the
others; with all whole but those of one kind. Gain has its way unless another one is shorter by more than such an
estimate is wrong by, and what it is known to be wrong by is corrected (``_corrected_s``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

from hetegen_compile.cost_model import HardwareProfile, row_granularity
from hetegen_compile.passes.claims import Claim
from hetegen_compile.passes.residency_estimate import Estimate, LinearWork
from hetegen_compile.passes.residency_shares import residency_shares

_SHORTER = 0.99  # of the step as gain has it: less than that is within what an estimate is wrong by
_IN_TWO_PLACES, _LARGE_KEPT = 0.075, 0.09  # of the step: see ``_corrected_s``
_LARGE, _SMALL = 1.5, 0.75  # of the typical weight, the one that most bytes lie in
_SHARES_OF_LARGE = (0.25, 0.5, 0.75, 1.0)
_SHARES_BESIDE = (0.0, 0.5, 1.0)  # of the large ones where what the others keep is decided
_LEAST_EVEN = 0.5  # of each of the others: a smaller part saves less than its product and its join cost


def ordered_claims(
    claims: Sequence[Claim], work: Sequence[LinearWork], free_bytes: int, ahead_bytes: int, typical_bytes: int,
    profile: HardwareProfile,
) -> list[Sequence[Claim]]:  # fmt: skip
    """The claims, with the rows that come before all others if that makes the step shorter, then other ways of it.

    These, by their estimates and each with other rows resident, are for who simulates steps with them: of the first
    the large weights are kept whole if they fit, which estimates underrate most.

    ``ahead_bytes`` is what the link has brought at most before it is used: the staging ring less the slot that is
    being filled.
    """
    estimate = Estimate(work, ahead_bytes, profile)
    linears = [claim for claim in claims if claim.rank == 0]
    large = frozenset(claim.key for claim in linears if _size(claim, typical_bytes) == "large")

    def step_s(order: Sequence[Claim]) -> float:
        first_rows = residency_shares([order], free_bytes)
        return _corrected_s(estimate.step_s(first_rows), linears, first_rows, large)

    if not work or not linears or not 0 < free_bytes < sum(claim.nbytes for claim in claims):
        return [claims]
    ways = sorted(_orders(claims, free_bytes, typical_bytes), key=step_s)
    chosen = ways[0] if ways and step_s(ways[0]) < _SHORTER * step_s(claims) else claims
    whole = [way for way in ways if large and all(one.kept_rows == one.rows for one in way if one.key in large)]
    return _distinct([chosen, *whole[:1], claims, *ways], free_bytes)


def _distinct(ways: Sequence[Sequence[Claim]], free_bytes: int) -> list[Sequence[Claim]]:
    """The first of those that keep the same rows."""
    found: dict[frozenset[tuple[Hashable, int]], Sequence[Claim]] = {}
    for way in ways:
        found.setdefault(frozenset(residency_shares([way], free_bytes).items()), way)
    return list(found.values())


def _corrected_s(
    step_s: float, linears: Sequence[Claim], first_rows: Mapping[Hashable, int], large: Collection[Hashable]
) -> float:
    """An estimate with what simulated steps were longer or shorter by (37 settings of ten models on eight machines).

    Longer where many Linears are in two places, by 2 to 3 % with 18 of 43; shorter, by 1 to 2 %, where large ones with
    a quarter of all bytes stay, an output layer mostly: the host has its part of them when nothing else is left.
    """
    kept = {claim.key: claim.rows - first_rows.get(claim.key, claim.rows) for claim in linears}
    both = sum(0 < kept[claim.key] < claim.rows - claim.first for claim in linears)
    large_bytes = sum(kept[claim.key] * claim.row_bytes for claim in linears if claim.key in large)
    all_bytes = sum(claim.nbytes for claim in linears)
    return step_s * (1 + _IN_TWO_PLACES * both / len(linears) - _LARGE_KEPT * large_bytes / all_bytes)


def _orders(claims: Sequence[Claim], free_bytes: int, typical_bytes: int) -> Iterator[list[Claim]]:
    """The ways that are compared with gain alone."""
    linears = [claim for claim in claims if claim.rank == 0]
    sizes = {claim.key: _size(claim, typical_bytes) for claim in linears}
    yield from _by_size(claims, sizes, free_bytes)
    kinds: dict[Hashable, Hashable] = {claim.key: (claim.rows, claim.row_bytes) for claim in linears}
    others: dict[Hashable, Hashable] = {key: size for key, size in sizes.items() if size != "middle"}
    yield from _of_one_kind(claims, kinds | others, free_bytes)


def _by_size(claims: Sequence[Claim], sizes: Mapping[Hashable, str], free_bytes: int) -> Iterator[list[Claim]]:
    """Shares by size, as far as the memory goes."""
    nbytes = _nbytes(claims, sizes)
    for share in _SHARES_OF_LARGE if nbytes["large"] else ():
        if share * nbytes["large"] <= free_bytes:
            yield _keeping(claims, sizes, {"large": share})
    for share in _SHARES_BESIDE if nbytes["large"] else (0.0,):
        left = free_bytes - nbytes["small"] - share * nbytes["large"]
        if _LEAST_EVEN * nbytes["middle"] <= left < nbytes["middle"]:
            yield _keeping(claims, sizes, {"small": 1.0, "middle": left / nbytes["middle"], "large": share})


def _of_one_kind(claims: Sequence[Claim], kinds: Mapping[Hashable, Hashable], free_bytes: int) -> Iterator[list[Claim]]:
    """All whole but the large ones, of which some part, and those of one kind, of which each keeps the same share.

    Not the small ones, mostly attention's, which would have to wait for the host: what it costs beside its Linears is
    not in the estimate.
    """
    nbytes = _nbytes(claims, kinds)
    for kind in [kind for kind in nbytes if kind not in ("small", "large")]:
        for share in _SHARES_BESIDE if nbytes["large"] else (0.0,):
            shares = dict.fromkeys(nbytes, 1.0) | {"large": share}
            left = free_bytes - sum(shares[other] * nbytes[other] for other in nbytes if other != kind)
            if 0 <= left < nbytes[kind]:
                yield _keeping(claims, kinds, {**shares, kind: left / nbytes[kind]})


def _size(claim: Claim, typical_bytes: int) -> str:
    small, large = claim.nbytes < _SMALL * typical_bytes, claim.nbytes > _LARGE * typical_bytes
    return "small" if small else "large" if large else "middle"


def _nbytes(claims: Sequence[Claim], kinds: Mapping[Hashable, Hashable]) -> Counter[Hashable]:
    """Bytes of the Linears' claims by kind."""
    found: Counter[Hashable] = Counter()
    for claim in claims:
        if claim.rank == 0:
            found[kinds[claim.key]] += claim.nbytes
    return found


def _keeping(
    claims: Sequence[Claim], kinds: Mapping[Hashable, Hashable], shares: Mapping[Hashable, float]
) -> list[Claim]:
    """The claims with these shares of each kind before all others."""
    return [
        replace(claim, kept_rows=0 if claim.rank else _rows(claim, shares.get(kinds[claim.key], 0.0)))
        for claim in claims
    ]


def _rows(claim: Claim, share: float) -> int:
    if share >= 1.0:
        return claim.rows - claim.first
    step = row_granularity(claim.rows)
    return int((claim.rows - claim.first) * share) // step * step


__all__ = ["ordered_claims"]
