"""Faults while a graph is compiled: a segment that its compiler refuses, an interrupt, a refusal that holds nothing."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import InductorError

from hetegen_compile import pipeline, schedules
from hetegen_compile.errors import BudgetError, CompilationError
from hetegen_compile.runtime import live_runtimes
from hetegen_compile.steps.segments import inductor_compiler
from tests.backend.modules import BUDGET, Linear, Mlp, around, plain, random
from tests.models.harness import Comparison, RecordingBackend, compiled_like_eager, emulated, through_inductor


def _call(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(random(3, 64))
    return result


# ---- a segment that its compiler refuses ---------------------------------------------------------------------------


def _like_eager(compiler: Callable[..., Any], body: Callable[..., Any] = plain) -> Comparison:
    model = around(body)
    return compiled_like_eager(
        model, lambda: _call(model), options=emulated(gpu_memory=BUDGET), compiler=compiler, calls=1
    )


def test_a_segment_whose_compiler_fails_runs_in_eager_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    failed: list[str] = []

    def compiler(mode: Any) -> Any:
        def compile_segment(segment: Any, examples: Any) -> Callable[..., Any]:
            if "gelu" in str(segment.graph):
                failed.append(str(segment.graph))
                raise RuntimeError("no code for this segment")
            forward: Callable[..., Any] = segment.forward
            return forward

        return compile_segment

    with caplog.at_level("WARNING", logger="hetegen_compile"):
        found = _like_eager(compiler)
    assert failed
    for told in (found.schedules[-1].explain(), "\n".join(caplog.messages)):
        assert "segment_" in told
        assert "runs as plain FX code, its compiler failed with RuntimeError: no code for this segment" in told


@through_inductor
def test_a_failure_of_inductor_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a defect of the code generator")

    monkeypatch.setattr(GraphLowering, "compile_to_module", fail)
    with torch._inductor.config.patch(fx_graph_cache=False):
        found = _like_eager(inductor_compiler)
    assert "a defect of the code generator" in found.schedules[-1].explain()


def test_a_failed_compiler_that_keeps_its_error_keeps_no_accelerator() -> None:
    """As Inductor's cache of C++ does, with the future of the compilation."""
    kept: list[Exception] = []

    def fail() -> None:
        try:
            raise OSError("exit status 1")
        except OSError as error:
            raise ValueError("the code does not compile") from error

    def compiler(mode: Any) -> Callable[..., Any]:
        def compile_segment(segment: Any, examples: Any) -> Any:
            try:
                fail()
            except ValueError as error:
                kept.append(error)
                raise InductorError(error, None) from None

        return compile_segment

    known = set(live_runtimes())  # of tests before this one
    found = _like_eager(compiler)
    assert kept
    assert "the code does not compile" in found.schedules[-1].explain()
    assert set(live_runtimes()) - known
    del found
    torch._dynamo.reset()
    gc.collect()
    assert not set(live_runtimes()) - known


def test_a_segment_that_compiles_is_not_refused() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        return after(torch.tanh(before(x)))

    found = _like_eager(RecordingBackend().compiler, body)
    assert "plain FX code" not in found.schedules[-1].explain()


# ---- an interrupt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 4, 9, len(pipeline.PIPELINE) - 1])
def test_ctrl_c_while_planning(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the caller as it is, and the next call compiles."""
    real = pipeline.run_pipeline
    interrupted: list[bool] = []

    def run(module: Any, context: Any, stages: Any = pipeline.PIPELINE, **options: Any) -> Any:
        if pipeline.PIPELINE[stage] in stages and not interrupted:
            interrupted.append(True)
            place = stages.index(pipeline.PIPELINE[stage])
            real(module, context, stages[:place], **options) if place else None
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1_000_000):  # the signal arrives between two bytecodes
                pass
        return real(module, context, stages, **options)

    for name in ("within_budget", "trials"):
        monkeypatch.setattr(f"hetegen_compile.planning.{name}.run_pipeline", run)
    model, backend = around(plain), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
    with pytest.raises(KeyboardInterrupt):
        _call(model)
    assert interrupted
    torch.testing.assert_close(_call(model), model.forward(random(3, 64)).detach(), rtol=1e-4, atol=1e-5)
    assert schedules()[-1].host_bytes > 0
    assert len(backend.graphs) == 1


# ---- a refusal holds nothing ---------------------------------------------------------------------------------


def test_a_refused_graph_keeps_no_accelerator_and_no_frames() -> None:
    model, known = Mlp(4).eval(), set(live_runtimes())
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=100, seed=12345))
    errors = []
    for _ in range(3):
        with pytest.raises(BudgetError) as caught:
            _call(model)
        errors.append(caught.value)
        assert sum(1 for _ in _frames(caught.value)) < 30, "the error grows with every call"
    assert len({id(error) for error in errors}) == 3
    assert len({str(error) for error in errors}) == 1
    del caught, errors
    gc.collect()
    assert not set(live_runtimes()) - known


def _frames(error: BaseException) -> Any:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def test_a_defect_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("in a pass")

    monkeypatch.setattr("hetegen_compile.planning.within_budget.run_pipeline", broken)
    model = Mlp(4).eval()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=BUDGET))
    for _ in range(2):
        with pytest.raises(CompilationError, match="ZeroDivisionError: in a pass") as caught:
            _call(model)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert "in broken" in "".join(caught.value.__cause__.__notes__)
