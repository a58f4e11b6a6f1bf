"""What a life cycle is checked for beside its results: the budget, the bytes that moved, warnings that are not true."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import hetegen_compile
from hetegen_compile.reports.schedule import Schedule
from hetegen_compile.runtime import Runtime, live_runtimes
from hetegen_compile.steps import run_step

UNSEEN = "in a way that torch does not see"
"""Part of the warning about a write that changed no version."""


class Failure(AssertionError):
    """A life cycle went otherwise than it would have in eager, or beyond what the backend promises."""


@dataclass(frozen=True)
class Step:
    """A step that came to its end: its schedule, the most that was held in it and what it was allowed, in bytes."""

    schedule: Schedule
    peak_bytes: int
    budget_bytes: int


class Watch(logging.Handler):
    """Listens to the backend's log and to its steps; ``unseen_writes`` says whether there have been any."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.steps: list[Step] = []
        self.warnings: list[str] = []
        self.unseen_writes = False
        self._run = run_step._run

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.warnings.append(record.getMessage())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Nothing of the log is printed meanwhile."""
        logger = logging.getLogger("hetegen_compile")
        propagates, logger.propagate = logger.propagate, False
        logger.addHandler(self)
        try:
            with mock.patch.object(run_step, "_run", self._step):
                yield
        finally:
            logger.removeHandler(self)
            logger.propagate = propagates

    def _step(self, runtime: Runtime, plan: Any, inputs: Sequence[Any]) -> Any:
        outputs = self._run(runtime, plan, inputs)
        self.steps.append(Step(plan.schedule, runtime.accelerator.counters.step_peak_bytes, plan.budget_bytes))
        return outputs

    @contextmanager
    def action(self, *, unchanged: bool = False) -> Iterator[None]:
        """Check what happens inside: every step within its budget, all that it streams moved, no false warning.

        ``unchanged``: if nothing is planned in it, nothing else moves either.
        """
        first, warned = len(self.steps), len(self.warnings)
        runtimes, known = live_runtimes(), set(map(id, hetegen_compile.schedules()))
        before = [_moved(runtime) for runtime in runtimes]
        yield
        steps = self.steps[first:]
        _check_budgets(steps)
        self._check_warnings(self.warnings[warned:])
        same = {id(step.schedule) for step in steps} <= known
        if len(runtimes) == 1 and live_runtimes() == runtimes and same:
            _check_bytes(steps, before[0], _moved(runtimes[0]), exactly=unchanged)

    def _check_warnings(self, warnings: Sequence[str]) -> None:
        for text in warnings:
            if UNSEEN in text and not self.unseen_writes:
                raise Failure(f"a false warning: {text}")
            if "ran out of memory" in text:
                raise Failure(text)


@dataclass(frozen=True)
class _Moved:
    """Bytes of weights: uploaded so far, of them held for the next step, and copied ahead in vain so far."""

    uploaded: int
    held: int
    wasted: int


def _moved(runtime: Runtime) -> _Moved:
    runtime.accelerator.synchronize()
    uploaded = runtime.accelerator.counters.uploaded_bytes.get("weights", 0)
    return _Moved(uploaded, runtime.carried.held_bytes, runtime.carried.wasted_bytes)


def _check_budgets(steps: Sequence[Step]) -> None:
    for step in steps:
        items, limit = sum(step.schedule.budget.values()), step.schedule.budget_bytes
        if step.peak_bytes > step.budget_bytes:
            raise Failure(f"a step held {step.peak_bytes} bytes of {step.budget_bytes}: {step.schedule.title}")
        if items > limit:
            raise Failure(f"a plan's items take {items} bytes of {limit}: {dict(step.schedule.budget)}")


def _check_bytes(steps: Sequence[Step], before: _Moved, after: _Moved, *, exactly: bool) -> None:
    """The link carried what the schedules stream, rounded to elements."""
    streamed = sum(step.schedule.streamed_bytes for step in steps)
    rounding = sum(len(step.schedule.rows) for step in steps)
    moved = after.uploaded - before.uploaded
    least = streamed - rounding - before.held
    most = streamed + rounding + after.held + after.wasted - before.wasted
    if moved < least or (exactly and moved > most):
        raise Failure(f"{moved} bytes of weights moved in {len(steps)} steps, planned {least} to {most}")
