"""benchmarks.overhead measures what it says: a step of split Linears on an accelerator that does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import overhead
from tests.backend.conftest import fresh_dynamo
from tests.models.harness import through_inductor

__all__ = ["fresh_dynamo"]


@through_inductor
def test_the_issue_stage_counts_split_linears_that_are_prefetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "overhead.json"
    overhead.main(["--stages", "issue", "--layers", "6", "--steps", "10", "--json", str(out)])
    (figure,) = json.loads(out.read_text())["figures"]
    parts = figure["parts"]
    assert parts["split_linears"] == 6 * 7 + 1
    assert parts["streamed"] > parts["split_linears"] / 2
    assert figure["value"] == pytest.approx(parts["step_s"] / parts["split_linears"])
    assert "host thread per split Linear" in capsys.readouterr().out


@through_inductor
def test_the_stage_between_sees_a_cache_that_grows(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    overhead.main(["--stages", "between", "--layers", "3", "--steps", "10", "--json", str(out)])
    (figure,) = json.loads(out.read_text())["figures"]
    parts = figure["parts"]
    assert 0 < parts["before_s"] < 1
    assert 0 < parts["behind_s"] < 1
    assert figure["value"] == pytest.approx((parts["before_s"] + parts["behind_s"]) / 3)
    assert parts["checked_mirrors"] > 3 * 7, "weights, keys and values"


def test_a_stage_that_is_not_there_is_told_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--stages", "issue,betwen"])
    assert "no stage betwen; there are issue, between, resident, compile" in capsys.readouterr().err


def test_processor_time_sees_one_thread_only() -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--threads", "2", "--cpu-time"])
