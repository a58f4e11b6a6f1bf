"""Compare a model compiled by hetegen with the same model in eager, and prove that weights were offloaded.

A comparison that ran in eager, or with every weight resident, would pass and say nothing. So every one of them
also asserts how often the backend was called, that rows were computed on the host, that bytes of weights went
over the link (by the schedules and by the accelerator's own counters), and that the budget held.
"""

from __future__ import annotations

import gc
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import hetegen_compile
from hetegen_compile.accelerators.base import Accelerator
from hetegen_compile.backend import make_backend
from hetegen_compile.compiled import CompiledGraph
from hetegen_compile.options import parse_options
from hetegen_compile.passes.append_tokens import lies_by_token
from hetegen_compile.reports.schedule import Schedule, withdraw
from hetegen_compile.steps.segments import plain_compiler

RTOL, ATOL = 1e-4, 1e-5
"""How close float32 results have to be to eager's."""

through_inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
"""Marks a test that compiles with Inductor, whose import warns about torch's own code."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Every test starts without compiled graphs and leaves none behind, and none of an accelerator's threads."""
    torch._dynamo.reset()
    before = live_threads()
    yield
    torch._dynamo.reset()
    left = live_threads() - before
    if left:  # a collection takes longer than many a test
        gc.collect()
        left &= live_threads()
    assert not left, f"{len(left)} threads are left; what a test puts in an accelerator must not refer to its runtime"


def live_threads() -> set[threading.Thread]:
    """The accelerators' threads of this process."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("hetegen")}


@contextmanager
def calls_of_torchs_layers() -> Iterator[mock.Mock]:
    """Counts the segments that Inductor compiled and that are not called past torch's layers around their code."""
    from torch._inductor.output_code import CompiledFxGraph

    call = CompiledFxGraph.__call__
    with mock.patch.object(CompiledFxGraph, "__call__", autospec=True, side_effect=call) as calls:
        yield calls


def changing_seed() -> int:
    """A seed for the accelerator's random delays: another one each time, printed so that it can be repeated.

    ``HETEGEN_TEST_SEED`` in the environment sets it.
    """
    seed = int(os.environ.get("HETEGEN_TEST_SEED", secrets.randbelow(2**31)))
    print(f"HETEGEN_TEST_SEED={seed}")
    return seed


def emulated(**options: Any) -> dict[str, Any]:
    """Options for the emulated accelerator with random delays and, unless given, half of all rows on the host."""
    quiet = {"print_schedule": False}
    return {"accelerator": "emulated", "split": 0.5, "seed": changing_seed(), **quiet, **options}


@dataclass
class RecordingBackend:
    """A hetegen backend that keeps what it returned, one entry a call.

    An error of ours is a plain callable that raises it; ``graphs`` insists that there is none.
    """

    compiler: Callable[..., Any] = plain_compiler
    returned: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._backend = make_backend(self.compiler)
        self.reset = self._backend.reset

    def __call__(
        self, module: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, object] | None = None
    ) -> Any:
        self.returned.append(self._backend(module, inputs, options=options))
        return self.returned[-1]

    @property
    def graphs(self) -> tuple[CompiledGraph, ...]:
        """The compiled graphs, oldest first."""
        assert all(isinstance(graph, CompiledGraph) for graph in self.returned), "the backend refused a graph"
        return tuple(self.returned)

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator that all graphs share."""
        accelerators = {id(graph.runtime.accelerator): graph.runtime.accelerator for graph in self.graphs}
        (accelerator,) = accelerators.values()
        return accelerator


@dataclass(frozen=True)
class Comparison:
    """What a compared run leaves for further assertions.

    ``model`` is there so that it is alive: a model that is gone has nothing on the accelerator any more.
    """

    eager: Any
    compiled: Any
    backend: RecordingBackend
    schedules: tuple[Schedule, ...]
    model: nn.Module


def compiled_like_eager(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    options: Mapping[str, object],
    compiler: Callable[..., Any] = plain_compiler,
    calls: int | None = None,
    compare: Callable[[Any, Any], None] | None = None,
    offloads: bool = True,
    weights_change: bool = False,
) -> Comparison:
    """Run ``run`` in eager, compile ``model`` in place, run it again and compare.

    Args:
        model: compiled with ``nn.Module.compile``.
        run: uses ``model``; run twice with the same random seed.
        options: of the backend.
        compiler: of the segments.
        calls: how often the backend has to be called; None: at least once.
        compare: (compiled result, eager result) -> raises if they differ; default ``assert_like_eager``.
        offloads: False for a case in which nothing can be on the host or streamed, with a reason at the caller.
        weights_change: ``run`` changes weights, so that resident ones are uploaded more than once a plan.
    """
    model._compiled_call_impl = None  # an earlier test may have compiled it
    if hetegen_compile.schedules():
        gc.collect()  # those of a model that goes later would be taken for this one's
    torch.manual_seed(0)
    expected = run()
    backend = RecordingBackend(compiler)
    known = hetegen_compile.schedules()
    model.compile(backend=backend, options=dict(options))
    torch.manual_seed(0)
    with _withdrawn() as withdrawn:
        result = run()
    schedules = (*withdrawn, *new_schedules(known))
    assert len(backend.returned) >= 1, "the model ran in eager"
    assert calls is None or len(backend.returned) == calls
    (compare or assert_like_eager)(result, expected)
    if offloads:
        assert_offloaded(backend, schedules, options, weights_change=weights_change)
    return Comparison(expected, result, backend, schedules, model)


@contextmanager
def _withdrawn() -> Iterator[list[Schedule]]:
    """Schedules that others took the place of after they had run: their steps moved bytes, too."""
    found: list[Schedule] = []

    def noted(schedules: Iterable[Schedule]) -> None:
        given = list(schedules)
        found.extend(schedule for schedule in given if schedule.step_times_s)
        withdraw(given)

    with mock.patch("hetegen_compile.steps.step_plans.withdraw", noted):
        yield found


def new_schedules(known: Sequence[Schedule]) -> tuple[Schedule, ...]:
    """What ``schedules()`` lists now beyond those that were ``known``, newest last."""
    return tuple(s for s in hetegen_compile.schedules() if not any(s is other for other in known))


def assert_like_eager(result: Any, expected: Any) -> None:
    """The same nest with the same numbers; tensors of the same dtype, device and shape, close in value.

    Strides are the same, but for caches that lie token by token and are contiguous in eager.
    """
    results, spec = pytree.tree_flatten(result)
    expectations, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec
    for one, other in zip(results, expectations, strict=True):
        if isinstance(other, Tensor):
            appended = lies_by_token(one) and other.is_contiguous()
            torch.testing.assert_close(one, other, rtol=RTOL, atol=ATOL, check_stride=not appended)
        else:
            assert one == other


def assert_offloaded(
    backend: RecordingBackend,
    schedules: Sequence[Schedule],
    options: Mapping[str, object],
    *,
    weights_change: bool = False,
) -> None:
    """Rows were computed on the host, weights were streamed in every step that says so, and the budget held."""
    budget = parse_options(options).gpu_memory
    assert budget is not None, "a test of offloading states its budget"
    assert any(row.host_share for schedule in schedules for row in schedule.rows), "no rows on the host"
    assert sum(schedule.host_bytes for schedule in schedules) > 0
    assert sum(schedule.streamed_bytes for schedule in schedules) > 0
    assert all(schedule.step_times_s for schedule in schedules), "a plan was made and not run"
    assert all(schedule.resident_bytes <= schedule.budget_bytes <= budget for schedule in schedules)
    assert backend.accelerator.counters.peak_bytes <= budget
    (carried,) = {graph.runtime.carried for graph in backend.graphs}
    ahead = carried.held_bytes + carried.wasted_bytes
    _assert_bytes_moved(backend.accelerator, schedules, weights_change, ahead)


def _assert_bytes_moved(
    accelerator: Accelerator, schedules: Sequence[Schedule], weights_change: bool, ahead: int
) -> None:
    """The link carried the streamed rows of every step, and each resident weight at most once a plan.

    ``ahead`` bytes were copied for steps that did not come, or not with the same weights.
    """
    streamed = sum(schedule.streamed_bytes * len(schedule.step_times_s) for schedule in schedules)
    resident = sum(schedule.resident_bytes for schedule in schedules)
    rounding = sum(len(schedule.rows) * len(schedule.step_times_s) for schedule in schedules)
    uploaded = accelerator.counters.uploaded_bytes["weights"]
    assert 0 < streamed <= uploaded
    assert weights_change or uploaded <= streamed + resident + rounding + ahead


def half_the_weights(model: nn.Module) -> int:
    """Half the bytes of the model's parameters: a budget that forces offloading."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // 2
