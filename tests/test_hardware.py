"""Which profile the options mean, and that a machine is measured at most once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hetegen_compile import hardware
from hetegen_compile.calibration import Machine, cache_path
from hetegen_compile.cost_model import HardwareProfile, load_profile, profile_to_json
from hetegen_compile.errors import AcceleratorUnavailableError, HardwareProfileError
from hetegen_compile.hardware import profile_for
from hetegen_compile.options import Options

MACHINE = Machine("a processor", "a GPU", "2.13.0+cu130", 8)
MEASURED = replace(load_profile("h200-server"), name=MACHINE.profile_name)


class Measurements:
    """Stands for ``calibrate`` and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def __call__(self, **arguments: object) -> HardwareProfile:
        self.calls.append(arguments)
        return MEASURED


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Measurements]:
    """A machine with a CUDA device, an empty cache folder, and calibration that measures nothing."""
    counted = Measurements()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "this_machine", lambda cuda: MACHINE)
    monkeypatch.setattr(hardware, "calibrate", counted)
    hardware._measured.cache_clear()
    yield counted
    hardware._measured.cache_clear()


def place() -> Path:
    path = cache_path(MACHINE)
    assert path is not None
    return path


def test_a_preset_or_a_file_is_taken_whatever_the_accelerator(measurements: Measurements, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(profile_to_json(replace(MEASURED, name="mine"))))
    assert profile_for(Options(hardware="t4-xeon")) == load_profile("t4-xeon")
    assert profile_for(Options(hardware=str(file), accelerator="cuda")).name == "mine"
    assert measurements.calls == []


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(HardwareProfileError, match="t4-xeon"):
        profile_for(Options(hardware="t4-xeno"))


def test_the_emulated_accelerator_is_never_measured(measurements: Measurements) -> None:
    assert profile_for(Options(accelerator="emulated")) == load_profile("cpu-emulated")
    assert measurements.calls == []
    assert not place().exists()


def test_auto_without_a_device_is_never_measured(measurements: Measurements, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile_for(Options()) == load_profile("cpu-emulated")
    assert measurements.calls == []


def test_cuda_without_a_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AcceleratorUnavailableError):
        profile_for(Options(accelerator="cuda"))


@pytest.mark.parametrize("accelerator", ["auto", "cuda"])
def test_cuda_is_measured_once_and_kept(measurements: Measurements, accelerator: str) -> None:
    options = Options(accelerator="cuda" if accelerator == "cuda" else "auto")
    assert profile_for(options) == profile_for(options) == MEASURED
    assert measurements.calls == [{"accelerator": "cuda"}]
    hardware._measured.cache_clear()  # another process
    assert profile_for(options) == MEASURED
    assert len(measurements.calls) == 1


def test_a_kept_profile_that_contradicts_itself_is_told(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    profile_for(Options(accelerator="cuda"))
    monkeypatch.setattr(hardware, "seems_disturbed", lambda profile: "8 ms for any size")
    for told in (0, 1):
        assert caplog.text.count("run hetegen calibrate: 8 ms for any size") == told
        hardware._measured.cache_clear()  # another process
        profile_for(Options(accelerator="cuda"))
    assert len(measurements.calls) == 1


def test_a_damaged_file_is_measured_anew(measurements: Measurements, caplog: pytest.LogCaptureFixture) -> None:
    profile_for(Options())
    place().write_text("{")
    hardware._measured.cache_clear()
    assert profile_for(Options()) == MEASURED
    assert len(measurements.calls) == 2
    assert "measured anew" in caplog.text
    assert json.loads(place().read_text())["name"] == MACHINE.profile_name


def test_a_folder_that_takes_no_files_costs_one_measurement(
    measurements: Measurements,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert profile_for(Options()) == profile_for(Options()) == MEASURED
    assert len(measurements.calls) == 1
    assert "not cached" in caplog.text
