"""How the memory for resident weights is shared out among all graphs on one accelerator.

Graphs that share a weight belong together (prefill and decode of one model); each such model gets memory in
proportion to the bytes that it would keep, so that a later one does not starve and an earlier one keeps the rest.
Within a model what saves most per byte comes first, and the last weight that only partly fits keeps as many rows
as fit. The order does not depend on which graph asks, so graphs with the same memory left agree on every weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from hetegen_compile.cost_model import row_granularity, spread_order
from hetegen_compile.passes.claims import Claim


def residency_shares(graphs: Sequence[Sequence[Claim]], free_bytes: int) -> dict[Hashable, int]:
    """First resident row of each weight that keeps any, at most ``free_bytes`` in all.

    ``graphs`` are the claims of each graph, oldest first.
    """
    models = _models(graphs)
    wanted = [sum(claim.nbytes for claim in model) for model in models]
    if sum(wanted) <= max(0, free_bytes):
        return {claim.key: claim.first for model in models for claim in model if claim.nbytes}
    first_rows: dict[Hashable, int] = {}
    for model, nbytes in zip(models, wanted, strict=True):
        first_rows |= _fill(model, free_bytes * nbytes // sum(wanted))
    return first_rows


def _fill(claims: Sequence[Claim], free_bytes: int) -> dict[Hashable, int]:
    """First the rows that come before others, then in falling order of gain per byte.

    The first weight that does not fit whole keeps the rows that do. Of those after it only whole ones are taken: every
    weight in two places costs a launch more.
    """
    found: dict[Hashable, int] = {}
    order = _in_order(claims)
    for claim in order:
        first = _partial(replace(claim, first=max(claim.first, claim.rows - claim.kept_rows)), free_bytes)
        found[claim.key] = first
        free_bytes -= (claim.rows - first) * claim.row_bytes
    whole = True
    for claim in order:
        first = found[claim.key]
        if (first - claim.first) * claim.row_bytes <= free_bytes:
            found[claim.key] = claim.first
        elif whole and claim.rows > 1:  # one row: all or nothing
            found[claim.key], whole = _partial(claim, free_bytes, first), False
        free_bytes -= (first - found[claim.key]) * claim.row_bytes
    return {claim.key: found[claim.key] for claim in claims if found[claim.key] < claim.rows}


def _in_order(claims: Sequence[Claim]) -> list[Claim]:
    """Claims by rank and in falling order of gain; equal ones (equal layers) so that what is streamed is spread.

    The link can run ahead of the computation by the staging ring only.
    """
    alike: dict[tuple[int, float], list[Claim]] = {}
    for claim in claims:
        alike.setdefault((claim.rank, -claim.gain_s_per_byte), []).append(claim)
    return [alike[kind][i] for kind in sorted(alike) for i in spread_order(len(alike[kind]))]


def _partial(claim: Claim, free_bytes: int, behind: int | None = None) -> int:
    """First row with as many as fit before ``behind`` (the end), to the granule."""
    step, end = row_granularity(claim.rows), claim.rows if behind is None else behind
    rows = max(0, free_bytes) // claim.row_bytes
    return min(end, max(claim.first, -(-(end - rows) // step) * step))


def _models(graphs: Sequence[Sequence[Claim]]) -> list[list[Claim]]:
    """Claims of the graphs that share weights, each weight once, in the order in which they were first claimed."""
    models: list[dict[Hashable, Claim]] = []
    for claims in graphs:
        own: dict[Hashable, Claim] = {}
        _merge(own, claims)
        related = [model for model in models if not model.keys().isdisjoint(own)]
        target = related[0] if related else {}
        if not related:
            models.append(target)
        for other in related[1:]:
            _merge(target, other.values())
            models.remove(other)
        _merge(target, own.values())
    return [list(model.values()) for model in models]


def _merge(model: dict[Hashable, Claim], claims: Iterable[Claim]) -> None:
    """Add claims; of two on one weight the one for fewer rows counts, which serves both graphs.

    Of those for as many rows it does not matter which came first.
    """
    for claim in claims:
        known = model.setdefault(claim.key, claim)
        model[claim.key] = max(
            known, claim, key=lambda one: (one.first, one.weighed, one.kept_rows, one.gain_s_per_byte)
        )


__all__ = ["residency_shares"]
