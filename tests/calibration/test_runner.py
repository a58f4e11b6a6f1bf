"""``calibrate`` on tiny sizes: a whole, valid profile that says where each figure is from."""

from __future__ import annotations

import pytest
import torch

from hetegen_compile.calibration import calibrate, this_machine
from hetegen_compile.calibration.report import profile_table
from hetegen_compile.cost_model import (
    HardwareProfile,
    load_profile,
    profile_from_json,
    profile_to_json,
    unsourced_fields,
)
from hetegen_compile.errors import AcceleratorUnavailableError, OptionError
from tests.calibration.tiny import TINY

PRESET = load_profile("cpu-emulated")


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    return calibrate(accelerator="emulated", progress=False, effort=TINY)


def test_the_profile_passes_its_own_schema(profile: HardwareProfile) -> None:
    assert profile_from_json(profile_to_json(profile), "here") == profile
    assert unsourced_fields(profile) == ()
    assert profile.name == this_machine(cuda=False).profile_name


def test_what_does_not_exist_is_the_presets_and_says_so(profile: HardwareProfile) -> None:
    assert profile.accelerator == PRESET.accelerator
    assert profile.link == PRESET.link
    assert {"accelerator", "link", "synchronise_s", "fixed_s_per_split", "pin_bytes_per_s"} <= set(profile.inferred)
    assert profile.sources["link"].startswith("not measured, there is no GPU: preset cpu-emulated")


def test_what_was_measured_is_not_inferred(profile: HardwareProfile) -> None:
    assert profile.host.linear_bytes_per_s != PRESET.host.linear_bytes_per_s
    assert not {"host", "host.linear_bytes_per_s", "host.flops_per_s", "host.launch_s"} & set(profile.inferred)
    source = profile.sources["host.linear_bytes_per_s"]
    assert "with 16, 32 columns" in source
    assert "float16: 1 token(s): F.linear " in source
    assert "oneDNN prepacked (needs a copy)" in source
    assert set(profile.host.linear_kernels) == {"float32", "bfloat16", "float16", "int8"}
    assert [nbytes for nbytes, _ in profile.host.linear_bytes_per_s["int8"].curves] == [64.0, 512.0]


def test_progress_is_shown_on_standard_error_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(accelerator="emulated", progress=True, effort=TINY)
    shown = capsys.readouterr()
    assert "calibrating: 100%" in shown.err
    assert shown.out == ""
    calibrate(accelerator="emulated", progress=False, effort=TINY)
    assert capsys.readouterr().err == ""


def test_it_measures_in_the_middle_of_inference_and_leaves_the_mode() -> None:
    with torch.inference_mode():
        assert calibrate(accelerator="emulated", progress=False, effort=TINY).host.launch_s > 0
        assert torch.is_inference_mode_enabled()


def test_the_accelerator_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AcceleratorUnavailableError, match="no CUDA"):
        calibrate(accelerator="cuda", progress=False, effort=TINY)
    with pytest.raises(OptionError, match="'gpu'"):
        calibrate(accelerator="gpu", progress=False, effort=TINY)


def test_the_table_shows_rates_and_origins(profile: HardwareProfile) -> None:
    text = profile_table(profile)
    assert "host Linear, 2 token(s), GB/s" in text
    assert "inferred; not measured, there is no GPU" in text
    assert f" {profile.host.linear_kernels['float32'].at(2)}" in text
    assert "1 token, weights of 512" in text


def test_the_table_takes_profiles_with_few_sources() -> None:
    text = profile_table(load_profile("a10-xeon"))
    assert "NVIDIA A10" in text or "A10 24 GB" in text
