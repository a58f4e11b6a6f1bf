"""Errors of ours reach the user as themselves, when the model is called, and never as a run in eager."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile import schedules
from hetegen_compile.backend import make_backend
from hetegen_compile.errors import (
    AcceleratorUnavailableError,
    BudgetError,
    GradientsNotSupportedError,
    OptionError,
)
from hetegen_compile.steps.segments import plain_compiler
from tests.backend.modules import BUDGET, Linear, around, plain, random
from tests.models.harness import RecordingBackend, compiled_like_eager, emulated


def _call(options: dict[str, Any]) -> Tensor:
    assert not torch._dynamo.config.suppress_errors
    model, backend = around(plain), RecordingBackend()
    model.compile(backend=backend, options=options)
    try:
        with torch.no_grad():
            result: Tensor = model(random(3, 64))
    finally:
        assert len(backend.returned) == 1
    return result


def test_gradients_are_refused() -> None:
    model = around(plain)
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=BUDGET))
    with pytest.raises(GradientsNotSupportedError, match="no_grad"):
        model(random(3, 64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_work(mode: Any) -> None:
    def run() -> Tensor:
        with mode():
            result: Tensor = model(random(3, 64))
        return result

    model = around(plain)
    compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), calls=1)


def test_parameters_without_gradients_work() -> None:
    model = around(plain).requires_grad_(False)
    compiled_like_eager(model, lambda: model(random(3, 64)), options=emulated(gpu_memory=BUDGET), calls=1)


def test_no_grad_inside_the_forward_works() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        with torch.no_grad():
            return after(before(x))

    model = around(body)
    found = compiled_like_eager(model, lambda: model(random(3, 64)), options=emulated(gpu_memory=BUDGET))
    assert not found.compiled.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memroy": "1GiB"}, "gpu_memory"),
        ({"gpu_memory": "8 gigs"}, "8 gigs"),
        ({"split": 1.5}, "split"),
    ],
)
def test_wrong_options_are_errors_of_the_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        _call(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_inductors_modes_are_refused() -> None:
    compiled = torch.compile(around(plain), backend=make_backend(plain_compiler), mode="max-autotune")
    with torch.no_grad(), pytest.raises(OptionError, match="mode='max-autotune' is Inductor's"):
        compiled(random(3, 64))


def test_cuda_without_a_device() -> None:
    with pytest.raises(AcceleratorUnavailableError, match="emulated"):
        _call({"accelerator": "cuda"})


def test_a_budget_that_is_too_small_says_which_one_works() -> None:
    with pytest.raises(BudgetError) as caught:
        _call(emulated(gpu_memory=1000))
    found = re.search(r"'gpu_memory': (\d+)", str(caught.value))
    assert found is not None
    smallest = int(found[1])
    with pytest.raises(BudgetError):
        _call(emulated(gpu_memory=smallest - 1))
    model = around(plain)

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(3, 64))
        return result

    compiled_like_eager(model, run, options=emulated(gpu_memory=smallest), calls=1)


def test_an_error_does_not_last() -> None:
    with contextlib.suppress(OptionError):
        _call({"unknown": 1})
    assert _call(emulated(gpu_memory=BUDGET)).shape == (3, 64)


def test_a_budget_above_the_accelerators_memory_is_cut_to_it_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="hetegen_compile"):
        _call(emulated(gpu_memory="4TiB"))
    assert any("gpu_memory=4.00 TiB is more than" in message for message in caplog.messages)
    assert schedules()[-1].budget_bytes < 1 << 42
