"""Command lines of benchmarks: what cannot be is told before anything is measured."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

MODULES = (
    "architectures", "budgets", "calibration", "cycles.__main__", "host_experts", "host_linear", "memory", "overhead",
    "paper_figure", "plan_speed", "prediction", "rehearse", "schedule_quality", "soak",
)  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_results_are_written_where_there_is_a_folder(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"benchmarks.{module}").main
    nowhere = tmp_path / "no"
    for out, told in (
        (nowhere / "out.json", f"there is no folder '{nowhere}'"),
        (tmp_path, f"'{tmp_path}' is a folder"),
    ):
        with pytest.raises(SystemExit):
            main(["--json", str(out)])
        error = capsys.readouterr().err
        assert error.startswith(f"usage: python -m benchmarks.{module.removesuffix('.__main__')} ")
        assert error.endswith(f"error: argument --json: {told}\n")


@pytest.mark.parametrize(
    ("module", "option", "text", "told"),
    [
        ("schedule_quality", "--shares", "80%", "shares from 0 up to but not including 1"),
        ("schedule_quality", "--shares", "1", "shares from 0 up to but not including 1"),
        ("schedule_quality", "--layers", "x", "whole numbers of at least 1, or full"),
        ("schedule_quality", "--layers", "0", "whole numbers of at least 1, or full"),
        ("host_linear", "--shapes", "4096", "rows x columns such as 4096x11008, separated by commas"),
        ("host_linear", "--shapes", "0x64", "rows x columns such as 4096x11008, separated by commas"),
        ("host_linear", "--tokens", "x", "whole numbers of at least 1"),
        ("host_linear", "--tokens", "-1", "whole numbers of at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_told_with_what_can(
    module: str, option: str, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{module}").main([f"{option}={text}"])
    assert f"argument {option}: '{text}': valid are {told}" in capsys.readouterr().err


def test_defaults_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.schedule_quality").main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for default in ("resident (default: 0.1 0.25 0.5 0.75)", "to plan (default: all)", "or full (default: 8)"):
        assert default in told
