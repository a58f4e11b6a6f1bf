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
