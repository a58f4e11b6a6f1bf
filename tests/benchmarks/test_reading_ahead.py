"""benchmarks.reading_ahead times trips behind waits, with and without reading ahead."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import reading_ahead
from benchmarks.reading_ahead import Figure, Later


def test_an_event_is_over_at_its_time() -> None:
    later = Later()
    later.over_s = time.perf_counter() + 0.02
    assert later._pending(1) == 1
    assert later._wait(1) == 0
    assert time.perf_counter() >= later.over_s
    assert later._pending(1) == 0


def test_what_is_saved_is_a_share_of_the_gap() -> None:
    assert Figure(gap_s=4e-4, without_s=2e-3, with_s=1.8e-3, read_bytes=1.0).saved_of_gap == pytest.approx(0.5)


def test_figures_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reading_ahead, "rotation_bytes", lambda effort: 1 << 23)
    out = tmp_path / "out.json"
    fast = ["--threads", "1", "--gaps-us", "3000", "6000", "--weight-mib", "2", "--calls", "4", "--json", str(out)]
    assert reading_ahead.main([*fast, "--ahead-mib", "1"]) == 0
    data = json.loads(out.read_text())
    assert data["ahead_bytes"] == 1 << 20
    assert [round(one["gap_s"], 6) for one in data["figures"]] == [3e-3, 6e-3]
    assert all(0 < one["read_bytes"] <= 1 << 20 and one["without_s"] > 0 for one in data["figures"])
    assert "saved, of the gap" in capsys.readouterr().out
    assert reading_ahead.main([*fast, "--weight-mib", "64"]) == 2
    assert "--weight-mib 64" in capsys.readouterr().err
