"""benchmarks.host_linear measures what it says: whole weights and weights whose columns are cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import host_linear
from hetegen_compile.calibration import kernels

FAST = ["--threads=1", "--dtypes=float32", "--shapes=64x256", "--tokens=1", "--rounds=1", "--budget=0.005"]


def figures(out: Path, *more: str) -> list[dict[str, Any]]:
    host_linear.main([*FAST, "--json", str(out), *more])
    found: list[dict[str, Any]] = json.loads(out.read_text())["figures"]
    return found


def test_cut_weights_are_read_where_they_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    durations = kernels.call_durations_s

    def noted(compute: Any, weights: Any, *more: Any) -> list[tuple[int, float]]:
        measured.append((tuple(weights[0].shape), weights[0].stride()))
        return durations(compute, weights, *more)

    monkeypatch.setattr(host_linear, "call_durations_s", noted)
    cut = figures(tmp_path / "cut.json", "--cut", "0.7")
    assert set(measured) == {((64, 128), (256, 1))}, "plans cut at multiples of 64 columns"
    assert {(figure["columns"], figure["read_columns"]) for figure in cut} == {(256, 128)}
    assert {figure["kernel"] for figure in cut} >= {
        "F.linear", "vectorised", "vectorised, tiled", "vectorised, tiled through L2"
    }  # fmt: skip
    assert not any(figure["copies"] for figure in cut), "a copy has no gaps"
    assert all(figure["bytes_per_s"] > 0 for figure in cut)
    assert "70% of the columns; " in capsys.readouterr().out


def test_a_kernel_that_takes_no_rows_with_gaps_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures(tmp_path / "cut.json", "--cut", "0.5", "--dtypes", "float32,int8")
    assert "int8pack: not for these weights: there are gaps between the rows" in capsys.readouterr().err


def test_all_of_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {figure["read_columns"] for figure in figures(tmp_path / "whole.json")} == {256}
    assert "of the columns" not in capsys.readouterr().out


@pytest.mark.parametrize("share", ["0", "1.7", "-1", "nan", "half"])
def test_a_share_out_of_range_is_refused(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host_linear.main(["--cut", share])
    assert f"'{share}': valid are shares above 0 up to 1" in capsys.readouterr().err
