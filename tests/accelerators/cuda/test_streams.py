"""Which stream is torch's current one while copies are issued, and in which modes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from hetegen_compile.accelerators import CudaAccelerator, Op
from tests.accelerators import fake_cuda


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of streams that were made current."""
    fake_cuda.install(monkeypatch)
    named: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: named.append(stream.name))
    return named


@pytest.mark.parametrize("traced", [False, True])
def test_the_callers_stream_is_current_again_whatever_is_raised(current: list[str], traced: bool) -> None:
    streams = CudaAccelerator()._streams
    streams.tracer.enabled = traced
    with streams.on(streams.up, "up", Op("a")):
        assert current == ["up"]
    assert current == ["up", "compute"]
    with pytest.raises(ZeroDivisionError), streams.on(streams.down, "down", Op("b")):
        raise ZeroDivisionError
    assert current == ["up", "compute", "down", "compute"]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode, torch.no_grad, nullcontext])
def test_copies_record_no_graph_and_make_ordinary_tensors(current: list[str], mode: Any) -> None:
    streams = CudaAccelerator()._streams
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with streams.on(streams.up, "up", Op("a")):
            assert not torch.is_grad_enabled()
            assert not torch.ones(1).is_inference()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.mark.parametrize("end", ["end_step", "abandon_step"])
def test_a_step_runs_on_a_stream_of_its_own_and_gives_the_callers_back(current: list[str], end: str) -> None:
    """The default stream, as a rule the caller's, cannot be recorded."""
    accelerator = CudaAccelerator()
    for _ in range(2):
        accelerator.begin_step()
        assert current == ["own"]
        assert "own waits compute" in fake_cuda.LOG, "behind what the caller has issued"
        getattr(accelerator, end)()
        assert current == ["own", "compute"]
        current.clear()
    accelerator.abandon_step()
    assert current == [], "there is no step to give up"


def test_a_caller_on_another_device_is_on_it_again(current: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting a stream makes its device the current one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(f"device {device}"))
    accelerator = CudaAccelerator()
    accelerator.begin_step()
    accelerator.end_step()
    assert current == ["own", "compute", "device 1"]


def test_a_step_that_cannot_begin_is_given_up(current: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = CudaAccelerator()

    def fail(**options: Any) -> None:
        raise RuntimeError("no thread")

    monkeypatch.setattr(accelerator._ahead, "begin_step", fail)
    with pytest.raises(RuntimeError, match="no thread"):
        accelerator.begin_step()
    accelerator.abandon_step()
    assert current == ["own", "compute"]
