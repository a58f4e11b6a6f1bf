"""open_accelerator: what each kind gives, and what it says."""

import logging

import pytest
import torch

from hetegen_compile.accelerators import EmulatedAccelerator, open_accelerator, uses_cuda
from hetegen_compile.errors import AcceleratorUnavailableError, OptionError


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cuda")
def test_auto_without_a_device_is_emulated_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hetegen_compile"):
        accelerator = open_accelerator("auto", memory_bytes=1 << 20)
    assert isinstance(accelerator, EmulatedAccelerator)
    assert accelerator.memory_bytes == 1 << 20
    assert len(caplog.records) == 1
    assert "say nothing about speed" in caplog.text
    accelerator.close()


def test_emulated_on_request_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = open_accelerator("emulated")
    assert (accelerator.kind, accelerator.device, accelerator.memory_bytes) == (
        "emulated",
        torch.device("cpu"),
        8 << 30,
    )
    assert caplog.records == []
    accelerator.close()


@pytest.mark.usefixtures("no_cuda")
def test_cuda_without_a_device_names_the_remedy() -> None:
    with pytest.raises(AcceleratorUnavailableError, match='accelerator="emulated"'):
        open_accelerator("cuda")


def test_auto_is_cuda_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=available: value)
        assert uses_cuda("auto") is available
        assert uses_cuda("emulated", pace=1.0, seed=0) is False


def test_unknown_kinds_and_misplaced_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(OptionError, match="'auto', 'cuda', 'emulated'"):
        open_accelerator("tpu")
    for kind in ("cuda", "auto"):
        with pytest.raises(OptionError, match="pace and seed are for accelerator='emulated'"):
            open_accelerator(kind, pace=1.0)
        with pytest.raises(OptionError, match="pace and seed are for accelerator='emulated'"):
            open_accelerator(kind, seed=0)
