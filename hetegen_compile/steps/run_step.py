"""One step of a plan on its accelerator, and what is put right when it fails half-way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from hetegen_compile.errors import AcceleratorMemoryError, clear_frames
from hetegen_compile.mirrors import NoRoomError
from hetegen_compile.passes.context import Refusal
from hetegen_compile.quiet import below_autograd, quiet
from hetegen_compile.runtime import Runtime
from hetegen_compile.steps.step_plan import StepPlan
from hetegen_compile.steps.undo import HostWrites, Undo


class UnrepeatableError(AcceleratorMemoryError):
    """The accelerator ran out of memory after the step wrote what must not be written twice."""


def run_step(runtime: Runtime, plan: StepPlan, inputs: Sequence[Any], writes: HostWrites) -> Any:
    """The outputs of one step; its times and its peak are noted on the plan's schedule.

    Raises:
        NoRoomError: the inputs do not fit beside what the plan makes; nothing has run.
        AcceleratorMemoryError: the accelerator ran out of memory; the host's inputs are as before.
        UnrepeatableError: it did, and inputs had been written already.
    """
    undo = Undo(writes, inputs)
    try:
        return _run_noted(runtime, plan, inputs)
    except AcceleratorMemoryError as error:
        if undo.restore():
            raise
        raise UnrepeatableError(
            f"{error}; the step had written inputs in place already and cannot be run again with less resident"
        ) from error


def _run_noted(runtime: Runtime, plan: StepPlan, inputs: Sequence[Any]) -> Any:
    accelerator, mirrors = runtime.accelerator, runtime.mirrors
    steps = len(plan.schedule.step_times_s)
    tracing = steps == 1 + bool(plan.bound.carried)  # after warming up: with everything carried in the third
    try:
        with quiet(accelerator.device), below_autograd() if plan.below_autograd else nullcontext():
            started = time.perf_counter()
            if tracing:
                accelerator.trace(True)
            outputs = _run(runtime, plan, inputs)
            seconds = time.perf_counter() - started
    except BaseException as error:
        try:
            clear_frames(error)  # whoever keeps the error (a debugger, a shell) would keep device memory
            accelerator.abandon_step()
        finally:  # a second interrupt ends the wait for the streams; the next step waits for them
            if not isinstance(error, NoRoomError):  # the step may have written some of them
                mirrors.forget_all_but_weights()
                mirrors.forget(inputs[i] for i in (*plan.bound.settled, *plan.bound.outdated))
        raise
    plan.schedule.note_step(seconds, accelerator.trace(False) if tracing else [])
    if accelerator.cannot_record:
        plan.schedule.note_refusal(Refusal("launches", accelerator.cannot_record))
    peak = max(plan.schedule.accelerator_peak_bytes, accelerator.counters.step_peak_bytes)
    plan.schedule.accelerator_peak_bytes = peak
    return outputs


def _run(runtime: Runtime, plan: StepPlan, inputs: Sequence[Any]) -> Any:
    accelerator, mirrors, carried, bound = runtime.accelerator, runtime.mirrors, runtime.carried, plan.bound
    accelerator.limit_memory(plan.limit_bytes)
    started = carried.begin_step(bound, inputs, plan.room.activation_bytes)
    mirrors.begin_step()
    values = plan.values.fetch(mirrors, inputs, plan.budget_bytes - runtime.ledger.ring_bytes, plan.room)
    count = len(bound.mirrors)
    outputs, twins = bound.run(list(inputs), values[:count], values[count:], started, carried.start)
    carried.end_step(bound)
    plan.values.settle(mirrors, inputs)
    if bound.outdated:  # not all writes have a version (the statistics of a norm)
        mirrors.forget(inputs[i] for i in bound.outdated)
    for host, device in twins:
        mirrors.register(host, device)
    return outputs


__all__ = ["UnrepeatableError", "run_step"]
