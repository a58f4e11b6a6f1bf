"""Run a random program in eager and through the backend, and compare everything that a caller could see."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hetegen_compile
from hetegen_compile import runtime
from hetegen_compile.errors import BudgetError
from hetegen_compile.reports.schedule import Schedule
from tests.models.harness import RecordingBackend, new_schedules
from tests.properties.budgets import named_budget, with_named_budgets
from tests.properties.programs import Inputs, Program, ProgramModel, make_inputs

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far results may be from eager's, relative to the largest number among them (at least 1)."""


@dataclass(frozen=True)
class Case:
    """How a program is compiled and called.

    Attributes:
        sizes: (batch, tokens) of each forward.
        room: which budget: 0 is the smallest that works, 1 the smallest plus all weights; above that all fits.
    """

    dtype: torch.dtype
    dynamic: bool | None
    sizes: tuple[tuple[int, int], ...]
    split: Any
    room: float
    seed: int | None
    inference_mode: bool

    def options(self, gpu_memory: int) -> dict[str, Any]:
        quiet = {"print_schedule": False, "max_batch": 1}
        return {"accelerator": "emulated", "gpu_memory": gpu_memory, "split": self.split, "seed": self.seed, **quiet}


@dataclass(frozen=True)
class Seen:
    """All that a caller sees of some forwards: results, inputs and buffers afterwards, and who shares memory."""

    results: list[Any]
    inputs: list[Inputs]
    buffers: list[Tensor]
    shared: list[list[bool]]


def smallest_budget(program: Program, case: Case) -> int:
    """The budget that the error on too small ones names."""
    try:
        _compiled(program, case, 1)
    except BudgetError as error:
        return named_budget(error)
    raise AssertionError("one byte was enough")


def check(program: Program, case: Case) -> tuple[Schedule, ...]:
    """Compare at the case's budget; returns the schedules of the run.

    A forward may need more than the budget that an earlier, smaller one was promised: the error says how much, and
    with that it has to work.
    """
    expected = _run(ProgramModel(program).to(case.dtype).eval(), program, case)
    weights = sum(w.numel() for w in ProgramModel(program).parameters()) * case.dtype.itemsize
    budget = smallest_budget(program, case) + round(case.room * weights)
    seen, schedules = with_named_budgets(budget, lambda budget: _compiled(program, case, budget))
    _assert_equal(seen, expected, TOLERANCE[case.dtype])
    return schedules


def _compiled(program: Program, case: Case, budget: int) -> tuple[Seen, tuple[Schedule, ...]]:
    torch._dynamo.reset()
    gc.collect()
    runtime._open.clear()  # an accelerator that a traceback keeps alive would count its bytes in this run's
    model, backend, known = ProgramModel(program).to(case.dtype).eval(), RecordingBackend(), hetegen_compile.schedules()
    compiled = torch.compile(model, backend=backend, options=case.options(budget), dynamic=case.dynamic)
    try:
        seen = _run(compiled, program, case)
        schedules = new_schedules(known)
        assert backend.graphs, "the model ran in eager"
        _assert_within(budget, backend, schedules)
    finally:
        backend.returned.clear()  # torch remembers its last backend, and with it the graphs and their accelerator
    return seen, schedules


def _assert_within(budget: int, backend: RecordingBackend, schedules: Sequence[Schedule]) -> None:
    assert schedules
    peak = backend.accelerator.counters.peak_bytes
    assert peak <= budget, f"{peak} bytes on the accelerator at a budget of {budget}"
    for schedule in schedules:
        assert schedule.accelerator_peak_bytes <= budget
        assert schedule.resident_bytes <= schedule.budget_bytes <= budget
        assert not schedule.whole_graph or schedule.host_bytes == schedule.streamed_bytes == 0


def _run(model: Any, program: Program, case: Case) -> Seen:
    """The case's forwards; the cache and its position stay the same tensors while the batch does."""
    torch.manual_seed(0)
    results, given, kept = [], [], None
    with torch.inference_mode() if case.inference_mode else torch.no_grad():
        for number, (batch, tokens) in enumerate(case.sizes):
            inputs = make_inputs(program, batch, tokens, case.dtype, number)
            if kept is not None and kept.cache.shape == inputs.cache.shape and number < 4:
                inputs = inputs._replace(cache=kept.cache, position=kept.position)
            results.append(model(*inputs))
            given.append(inputs)
            kept = inputs
    buffers = [buffer.clone() for buffer in model.buffers()]
    return Seen(copy.deepcopy(results), given, buffers, _shared(results, given))


def _shared(results: list[Any], given: list[Inputs]) -> list[list[bool]]:
    """For each pair of a forward's results and inputs whether they lie in one memory."""
    found: list[list[bool]] = []
    for result, inputs in zip(results, given, strict=True):
        tensors = [leaf for leaf in pytree.tree_leaves((result, tuple(inputs))) if isinstance(leaf, Tensor)]
        memory = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        found += [[one == other for other in memory] for one in memory]
    return found


def _assert_equal(seen: Seen, expected: Seen, tolerance: float) -> None:
    _assert_like(seen.results, expected.results, tolerance, "results")
    _assert_like(seen.inputs, expected.inputs, tolerance, "inputs")
    _assert_like(seen.buffers, expected.buffers, tolerance, "buffers")
    assert seen.shared == expected.shared, "results share other memory than in eager"


def _assert_like(result: Any, expected: Any, tolerance: float, what: str) -> None:
    results, spec = pytree.tree_flatten(result)
    expectations, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec, what
    for place, (one, other) in enumerate(zip(results, expectations, strict=True)):
        if not isinstance(other, Tensor):
            assert one == other, f"{what} {place}"
            continue
        allowed = tolerance * _largest(other) if other.is_floating_point() else 0.0
        try:
            torch.testing.assert_close(one, other, rtol=0, atol=allowed, check_stride=True)
        except AssertionError as error:
            raise AssertionError(f"{what}, number {place}: {error}") from None


def _largest(tensor: Tensor) -> float:
    return max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
