"""Rows of the comparison as a table, and as ratios to hetegen."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.compare.job import AHEAD, HETEGEN, HOST_ROWS, IN_TURN, STREAMED, Row
from hetegen_compile.options import format_bytes

HEADERS = (
    "way", "prefill tokens/s", "decode tokens/s", "of hetegen", "peak", "predicted", "floor", "equal tokens", "note",
)  # fmt: skip

OWN = (HETEGEN, AHEAD, IN_TURN, STREAMED, HOST_ROWS)


def tables(rows: Sequence[Row]) -> str:
    """One table for each memory limit; ways for which it does not hold are in each of them."""
    limits = sorted({row.gpu_memory for row in rows if row.gpu_memory is not None})
    return "\n\n".join(f"gpu_memory {format_bytes(limit)}\n{table(at_limit(rows, limit))}" for limit in limits)


def at_limit(rows: Sequence[Row], limit: int) -> list[Row]:
    """What is compared at one memory limit, hetegen's own ways first."""
    found = [row for row in rows if row.gpu_memory in (None, limit)]
    return sorted(found, key=lambda row: OWN.index(row.way) if row.way in OWN else len(OWN))


def table(rows: Sequence[Row]) -> str:
    """One memory limit; figures of ways that are slower than hetegen are less than 1 of it."""
    reference = _reference(rows)
    lines = [
        (
            row.way, _number(row.prefill_tokens_per_s), _number(row.decode_tokens_per_s),
            _number(ratio(row, reference)), "" if row.peak_bytes is None else format_bytes(row.peak_bytes),
            _number(row.predicted_tokens_per_s), _number(row.floor_tokens_per_s), _equal(row, reference), row.note,
        )
        for row in rows
    ]  # fmt: skip
    return str(tabulate(lines, headers=HEADERS, disable_numparse=True, maxcolwidths=[None] * 8 + [60]))


def _reference(rows: Sequence[Row]) -> Row | None:
    """hetegen's row, of several (a child was run again) the one with a figure."""
    own = [row for row in rows if row.way == HETEGEN]
    return max(own, key=lambda row: row.decode_tokens_per_s or row.predicted_tokens_per_s or 0.0, default=None)


def ratio(row: Row, reference: Row | None) -> float | None:
    """Decode tokens/s over hetegen's; of a way that is only predicted, its prediction over hetegen's prediction."""
    if reference is None:
        return None
    if row.decode_tokens_per_s is not None and reference.decode_tokens_per_s:
        return row.decode_tokens_per_s / reference.decode_tokens_per_s
    if row.predicted_tokens_per_s is not None and reference.predicted_tokens_per_s:
        return row.predicted_tokens_per_s / reference.predicted_tokens_per_s
    return None


def best_peer(rows: Sequence[Row]) -> tuple[str, float] | None:
    """Of the ways that are not hetegen's own and keep the limit's point (not the whole model on the device): the
    fastest measured one, and hetegen's decode rate over its rate; None if either was not measured."""
    reference = next((row for row in rows if row.way == HETEGEN and row.decode_tokens_per_s), None)
    peers = [row for row in rows if row.way not in (*OWN, "eager GPU") and row.decode_tokens_per_s]
    if reference is None or not peers or reference.decode_tokens_per_s is None:
        return None
    best = max(peers, key=lambda row: row.decode_tokens_per_s or 0.0)
    return best.way, reference.decode_tokens_per_s / (best.decode_tokens_per_s or 1.0)


def equal_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


def _equal(row: Row, reference: Row | None) -> str:
    if reference is None or not row.tokens:
        return ""
    equal, both = equal_prefix(row.tokens, reference.tokens), min(len(row.tokens), len(reference.tokens))
    all_of_them = "all" if both == len(reference.tokens) else f"all of {both}"
    return all_of_them if equal == both else f"first {equal} of {both}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
