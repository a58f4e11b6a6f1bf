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
