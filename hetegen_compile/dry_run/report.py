"""A predicted generation as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from hetegen_compile.dry_run.generation_plan import Generation, GenerationPlan
from hetegen_compile.options import format_bytes
from hetegen_compile.reports.schedule import Schedule
from hetegen_compile.reports.verdict import BASELINE_NAMES


def generation_report(plan: GenerationPlan, *, tables: bool = False, unfold: bool = False) -> str:
    """What ``hetegen plan`` prints.

    Args:
        plan: the predicted generation.
        tables: add the schedules of prefill and of decode.
        unfold: every layer of the tables by itself.
    """
    parts = [_title(plan), _speed(plan), _memory(plan), _alternatives(plan), plan.verdict]
    parts += [f"note: {note}" for note in plan.notes]
    if tables:
        schedules = [("prefill", plan.prefill), ("decode, at the longest context", plan.decode)]
        parts += [f"{name}: {one.table(unfold=unfold)}" for name, one in schedules if one is not None]
    return "\n\n".join(parts)


_INPUTS = ("model", "hardware", "dtype", "prompt", "new_tokens", "batch", "context")


def generation_json(plan: GenerationPlan) -> dict[str, Any]:
    """All figures of a plan as plain data; units are in the names."""
    return {
        **{name: getattr(plan, name) for name in _INPUTS},
        "tokens_per_s": plan.tokens_per_s,
        "decode_tokens_per_s": plan.decode_tokens_per_s,
        "prefill_s": plan.prefill_s,
        "decode_step_s": {str(tokens): seconds for tokens, seconds in plan.decode_step_s.items()},
        "generation": _generation_json(plan.ours),
        "floor_s": plan.floor_s,
        "baselines": {name: one and _generation_json(one) for name, one in plan.baselines.items()},
        "verdict": plan.verdict,
        "budget_bytes": plan.budget_bytes,
        "accelerator_peak_bytes": plan.accelerator_peak_bytes,
        "accelerator_bytes": dict(plan.accelerator_bytes),
        "host_peak_bytes": plan.host_peak_bytes,
        "host_bytes": dict(plan.host_bytes),
        "pinned_bytes": plan.pinned_bytes,
        "host_memory_bytes": plan.host_memory_bytes,
        "notes": list(plan.notes),
        "prefill": _schedule_json(plan.prefill),
        "decode": plan.decode and _schedule_json(plan.decode),
    }


def _generation_json(one: Generation) -> dict[str, float]:
    return {**asdict(one), "total_s": one.total_s, "tokens_per_s": one.tokens_per_s}


def _schedule_json(schedule: Schedule) -> dict[str, Any]:
    names = ("tokens", "predicted_step_s", "floor_s", "resident_bytes", "streamed_bytes", "host_bytes", "whole_graph")
    return {
        **{name: getattr(schedule, name) for name in names},
        "refusals": [asdict(refusal) for refusal in schedule.refusals],
        "rows": [asdict(row) for row in schedule.rows],
    }


# ---- text ------------------------------------------------------------------------------------------------------


def _title(plan: GenerationPlan) -> str:
    sequences = f", batch {plan.batch}" if plan.batch > 1 else ""
    generation = f"{plan.prompt} tokens in, {plan.new_tokens} out"
    work = generation if plan.new_tokens else f"one forward of {plan.prompt} tokens"
    return f"{plan.model}, {plan.dtype}, on {plan.hardware}: {work}{sequences}. Predicted, nothing was run."


def _speed(plan: GenerationPlan) -> str:
    rows = [("prefill" if plan.new_tokens else "forward", _milliseconds(plan.prefill_s))]
    rows += [(f"decode step, {n} tokens in the cache", _milliseconds(s)) for n, s in plan.decode_step_s.items()]
    rows.append(("tokens/s, prefill included", f"{plan.tokens_per_s:.2f}"))
    if plan.decode_tokens_per_s is not None:
        rows.append(("tokens/s, decode alone", f"{plan.decode_tokens_per_s:.2f}"))
    return _table(rows)


def _memory(plan: GenerationPlan) -> str:
    rows = [*_items("on the accelerator, peak", plan.accelerator_bytes, plan.budget_bytes, "budget")]
    rows += _items("on the host, peak", plan.host_bytes, plan.host_memory_bytes, "memory")
    rows.append(("- of the weights, pinned in place", format_bytes(plan.pinned_bytes)))
    return _table(rows)


def _items(title: str, items: Mapping[str, int], limit: int, kind: str) -> Iterable[tuple[str, str]]:
    yield title, f"{format_bytes(sum(items.values()))} of {format_bytes(limit)} {kind}"
    for name, nbytes in items.items():
        yield f"- {name}", format_bytes(nbytes)


def _alternatives(plan: GenerationPlan) -> str:
    floor = plan.ours.tokens / plan.floor_s if plan.floor_s > 0 else float("inf")
    rows = [["this plan", f"{plan.tokens_per_s:.2f}", "1.00x"]]
    rows.append(["bound of this residency", f"{floor:.2f}", _times(floor, plan)])
    for name, one in plan.baselines.items():
        figures = ["does not fit", ""] if one is None else [f"{one.tokens_per_s:.2f}", _times(one.tokens_per_s, plan)]
        rows.append([BASELINE_NAMES[name], *figures])
    text: str = tabulate(
        rows,
        headers=["whole generation", "tokens/s", "to ours"],
        disable_numparse=True,
        colalign=["left", "right", "right"],
    )
    return text


def _times(tokens_per_s: float, plan: GenerationPlan) -> str:
    return f"{tokens_per_s / plan.tokens_per_s:.2f}x"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e3 * seconds:.3g} ms"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    text: str = tabulate(rows, tablefmt="plain", disable_numparse=True)
    return text
