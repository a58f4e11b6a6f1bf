"""What ``hetegen bench`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from hetegen_compile.bench.measure import Measured
from hetegen_compile.options import format_bytes

UNPACED = (
    "emulated accelerator: it ran, with these tokens and these bytes, but its times say nothing about speed and are "
    "not shown; --pace 100 paces it to the profile"
)
PACED = "emulated accelerator, paced: tokens/s are the profile's, not this machine's; only their ratios mean something"


def bench_report(found: Sequence[Measured], *, prompt: int) -> str:
    """A table with a line for each split, and what to know about it."""
    rows = [_row(one, found[0], prompt) for one in found]
    lines = [
        f"{found[0].schedule.title}, {found[0].cache} cache",
        tabulate(rows, headers="keys", disable_numparse=True),
    ]
    if not _shows_speed(found[0]):
        lines.append(UNPACED)
    elif found[0].pace != 1.0:
        lines.append(PACED)
    return "\n".join(lines)


def bench_json(found: Sequence[Measured], *, prompt: int) -> dict[str, Any]:
    """All figures as plain data; units are in the names, None where a time says nothing."""
    return {"title": found[0].schedule.title, "cache": found[0].cache, "ways": [_json(one, prompt) for one in found]}


def _json(one: Measured, prompt: int) -> dict[str, Any]:
    shown = _shows_speed(one)
    return {
        "way": one.way,
        "emulated": _emulated(one),
        "pace": one.pace,
        "prefill_tokens_per_s": prompt / one.timing.prefill_s * one.pace if shown else None,
        "decode_tokens_per_s": one.pace / one.timing.step_s if shown else None,
        "decode_steps_s": [step / one.pace for step in one.timing.steps_s] if shown else None,
        "predicted_decode_tokens_per_s": 1 / one.schedule.predicted_step_s,
        "floor_decode_tokens_per_s": 1 / one.schedule.floor_s,
        "accelerator_peak_bytes": one.peak_bytes,
        "resident_bytes": one.schedule.resident_bytes,
        "streamed_bytes": one.schedule.streamed_bytes,
        "host_bytes": one.schedule.host_bytes,
        "tokens": list(one.timing.tokens),
    }


def _row(one: Measured, first: Measured, prompt: int) -> dict[str, str]:
    figures = _json(one, prompt)
    return {
        "way": one.way,
        "prefill tokens/s": _rate(figures["prefill_tokens_per_s"]),
        "decode tokens/s": _rate(figures["decode_tokens_per_s"]),
        "predicted": _rate(figures["predicted_decode_tokens_per_s"]),
        "bound": _rate(figures["floor_decode_tokens_per_s"]),
        "peak": format_bytes(one.peak_bytes),
        "streamed": format_bytes(one.schedule.streamed_bytes),
        "on the host": format_bytes(one.schedule.host_bytes),
        "tokens": "the same" if one.timing.tokens == first.timing.tokens else "DIFFER",
    }


def _emulated(one: Measured) -> bool:
    return one.schedule.accelerator == "emulated"


def _shows_speed(one: Measured) -> bool:
    return one.pace != 1.0 or not _emulated(one)


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
