"""Seconds of a generation from those of its forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hetegen_compile.dry_run.generation_plan import Generation
from hetegen_compile.dry_run.planning import PlannedGraph, StepTimes


def contexts_of(prompt: int, new_tokens: int) -> list[int]:
    """Tokens in the cache at the first, the middle and the last decode step (the first token is prefill's)."""
    first, last = prompt, max(prompt, prompt + new_tokens - 2)
    return sorted({first, (first + last) // 2, last}) if new_tokens > 1 else []


def as_planned(one: PlannedGraph) -> StepTimes:
    schedule = one.step.schedule
    return StepTimes(schedule.predicted_step_s, schedule.floor_s, schedule.baselines)


def total(parts: Sequence[StepTimes]) -> StepTimes:
    """A forward of several graphs; a baseline that one of them lacks is lacking."""
    names = [name for name in parts[0].baselines if all(name in part.baselines for part in parts)]
    return StepTimes(
        step_s=sum(part.step_s for part in parts),
        floor_s=sum(part.floor_s for part in parts),
        baselines={name: _sum_or_none([part.baselines[name] for part in parts]) for name in names},
    )


def _sum_or_none(seconds: Sequence[float | None]) -> float | None:
    known = [one for one in seconds if one is not None]
    return sum(known) if len(known) == len(seconds) else None


def sum_of_steps(at: Mapping[int, float]) -> float:
    """Seconds of all steps from those at some contexts: straight lines between them.

    Attention's work grows in proportion to the context, so between two contexts a step's time is close to linear.
    """
    contexts = sorted(at)
    total = sum(
        (hi - lo) * (at[lo] + at[hi]) / 2 for lo, hi in zip(contexts, contexts[1:], strict=False)
    )  # steps lo to hi, both ends by half
    return total + (at[contexts[0]] + at[contexts[-1]]) / 2 if contexts else 0.0


def generations(first: StepTimes, times: Mapping[int, StepTimes], tokens: int) -> dict[str, Generation | None]:
    names = [name for name in first.baselines if all(name in time.baselines for time in times.values())]
    return {name: _generation(name, first, times, tokens) for name in names}


def _generation(name: str, first: StepTimes, times: Mapping[int, StepTimes], tokens: int) -> Generation | None:
    prefill_s = first.baselines[name]
    steps = {n: seconds for n, time in times.items() if (seconds := time.baselines[name]) is not None}
    if prefill_s is None or len(steps) < len(times):
        return None
    return Generation(prefill_s, sum_of_steps(steps), tokens)
