"""One runnable plan: a bound schedule, what it counts on, and whether that still holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from hetegen_compile.passes.caches import room_tokens
from hetegen_compile.passes.claims import weight_key
from hetegen_compile.passes.context import require
from hetegen_compile.passes.operators import only_torchs_operations
from hetegen_compile.planning.planned import ScheduledStep, Sizes
from hetegen_compile.planning.room import Room
from hetegen_compile.reports.schedule import Schedule
from hetegen_compile.runtime import Runtime
from hetegen_compile.steps.bind import bind
from hetegen_compile.steps.bound_step import BoundStep
from hetegen_compile.steps.captured_graph import CapturedGraph
from hetegen_compile.steps.step_values import InputFacts, StepValues


@dataclass
class StepPlan:
    """A schedule that can run.

    Attributes:
        first_rows: of each resident weight, by its position among the inputs: from which row on the plan needs it.
        values: fetches the device values that a step takes.
        budget_bytes: what it was made for, without what the device's libraries take and what was not foreseen.
        limit_bytes: what its steps may hold.
        epoch: of the ledger when all of this was last looked at.
        below_autograd: whether its operations may skip that part of the dispatcher.
    """

    bound: BoundStep
    schedule: Schedule
    room: Room
    facts: InputFacts
    first_rows: dict[int, int]
    values: StepValues
    ring_bytes: int
    budget_bytes: int
    limit_bytes: int
    epoch: int
    below_autograd: bool

    @classmethod
    def of(cls, graph: CapturedGraph, planned: ScheduledStep, runtime: Runtime, inputs: Sequence[Any]) -> StepPlan:
        """Bind a schedule; what it keeps resident has been entered in the runtime's ledger."""
        bound, context = _bound(planned, runtime), planned.context
        residency = require(context.residency, "choose_residency")
        read = {i: lo for i, lo, _ in bound.residents}
        resident = {graph.weights[name]: first for name, first in residency.weights.items()}
        plan = cls(
            bound=bound,
            schedule=planned.schedule,
            room=Room.of(context, 0),
            facts=graph.facts,
            first_rows={i: read.get(i, first) for i, first in resident.items()},
            values=StepValues(bound, graph.facts, {}),
            ring_bytes=residency.ring_bytes,
            budget_bytes=context.usable_bytes,
            limit_bytes=context.limit_bytes,
            epoch=runtime.ledger.epoch,
            below_autograd=only_torchs_operations(graph.module),
        )
        plan._look_up(runtime, inputs)
        return plan

    def is_good(self, runtime: Runtime, inputs: Sequence[Any], budget_bytes: Callable[[], int], sizes: Sizes) -> bool:
        """Whether it still finds what it counts on under the budget of today, and a forward of these sizes fits it.

        The budget is asked for only where something has changed since this was last looked at.
        """
        ledger = runtime.ledger
        if self.epoch != ledger.epoch:
            residents = [(weight_key(inputs[i]), first) for i, first in self.first_rows.items()]
            if not ledger.has(residents, self.ring_bytes) or budget_bytes() < self.schedule.budget_bytes:
                return False
            self._look_up(runtime, inputs)
        return self.room.covers(sizes)

    def _look_up(self, runtime: Runtime, inputs: Sequence[Any]) -> None:
        """What the ledger keeps of the plan's weights now."""
        ledger = runtime.ledger
        first_rows = {i: ledger.first_rows[weight_key(inputs[i])] for i in self.first_rows}
        self.values = StepValues(self.bound, self.facts, first_rows)
        self.room.free_bytes = self.budget_bytes - ledger.ring_bytes - ledger.resident_bytes
        self.epoch = ledger.epoch


def _bound(planned: ScheduledStep, runtime: Runtime) -> BoundStep:
    context = planned.context
    work = require(context.prediction, "predict_step").work
    need = require(context.memory, "measure_memory")
    workspace = {node: context.room(sympy.sympify(size, strict=True)) for node, size in need.workspace.items()}
    host, chains = context.profile.host, context.options.cuda_graphs
    return bind(
        planned.module, work, runtime.accelerator, host.linear_kernels, workspace, chains=chains,
        ahead_bytes=host.ahead_bytes, room_tokens=functools.partial(room_tokens, context=context),
    )  # fmt: skip


__all__ = ["StepPlan"]
