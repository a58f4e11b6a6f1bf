"""How the memory for resident weights is shared out among all graphs on one accelerator.

Graphs that share most of their weights belong together (prefill and decode of one model); each such model gets memory
in proportion to the bytes that it would keep, so that a later one does not starve and an earlier one keeps the rest.
What several models share (tied embeddings of a model and its draft) gets its own part, in proportion to its bytes: one
of the models would keep all of its own before any of another's. Within each part what saves most per byte comes first,
and the last weight that only partly fits keeps as many rows as fit. The order does not depend on which graph asks, so
graphs with the same memory left agree on every weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import combinations

from hetegen_compile.cost_model import row_granularity, spread_order
from hetegen_compile.passes.claims import Claim


def residency_shares(graphs: Sequence[Sequence[Claim]], free_bytes: int) -> dict[Hashable, int]:
    """First resident row of each weight that keeps any, at most ``free_bytes`` in all.

    ``graphs`` are the claims of each graph, oldest first.
    """
    parts = _parts(graphs)
    wanted = [sum(claim.nbytes for claim in part) for part in parts]
    if sum(wanted) <= max(0, free_bytes):
        return {claim.key: claim.first for part in parts for claim in part if claim.nbytes}
    first_rows: dict[Hashable, int] = {}
    for part, nbytes in zip(parts, wanted, strict=True):
        first_rows |= _fill(part, free_bytes * nbytes // sum(wanted))
    return first_rows


def share_bytes(claims: Sequence[Claim], others: Sequence[Sequence[Claim]], free_bytes: int) -> int:
    """How many of ``free_bytes`` are for what a graph claims, beside those of ``others``."""
    own = {claim.key for claim in claims}
    parts = _parts([*others, claims])
    wanted = [sum(claim.nbytes for claim in part) for part in parts]
    mine = sum(n for part, n in zip(parts, wanted, strict=True) if any(claim.key in own for claim in part))
    return free_bytes * mine // max(1, sum(wanted))


def of_one_model(graph: Sequence[Claim], other: Sequence[Claim]) -> bool:
    """Whether two graphs share more than half of the bytes that either claims, or all that one of them does.

    (Of a mixture's experts one graph may claim few and another all.)
    """
    nbytes = {claim.key: claim.rows * claim.row_bytes for claim in graph}
    others = {claim.key: claim.rows * claim.row_bytes for claim in other}
    common = sum(nbytes[key] for key in nbytes.keys() & others.keys())
    less, more = sorted((sum(nbytes.values()), sum(others.values())))
    return common > more / 2 or 0 < less == common


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


def _parts(graphs: Sequence[Sequence[Claim]]) -> list[list[Claim]]:
    """What is shared out by itself: the claims that the same models have, each weight once, oldest first."""
    merged: dict[Hashable, Claim] = {}
    models: dict[Hashable, set[int]] = {}
    for claims, model in zip(graphs, _models(graphs), strict=True):
        for claim in claims:
            known = merged.setdefault(claim.key, claim)
            merged[claim.key] = max(known, claim, key=_counts)
            models.setdefault(claim.key, set()).add(model)
    parts: dict[frozenset[int], list[Claim]] = {}
    for key, claim in merged.items():
        parts.setdefault(frozenset(models[key]), []).append(claim)
    return list(parts.values())


def _models(graphs: Sequence[Sequence[Claim]]) -> list[int]:
    """A number for each graph, the same for graphs of one model, whichever of them came first."""
    found = list(range(len(graphs)))
    for (i, one), (j, other) in combinations(enumerate(graphs), 2):
        if found[i] != found[j] and of_one_model(one, other):
            found = [found[i] if model == found[j] else model for model in found]
    return found


def _counts(claim: Claim) -> tuple[int, bool, int, float]:
    """Of two claims on one weight that with more counts: that for fewer rows, which serves both graphs.

    Of those for as many rows it does not matter which came first.
    """
    return claim.first, claim.weighed, claim.kept_rows, claim.gain_s_per_byte


__all__ = ["of_one_model", "residency_shares", "share_bytes"]
