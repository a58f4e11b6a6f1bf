"""Children that end well, raise, die and hang: their notes are kept and nothing of them is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.children import run_child

CHILD = "tests.benchmarks.children_of_tests"


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("end", "ok", ""),
        ("raise", "failed", "no such thing"),
        ("die", "failed", "exit status 7"),
        ("hang", "timeout", "in work"),  # the frame that it hangs in
    ],
)
def test_notes_survive_however_a_child_ends(tmp_path: Path, how: str, status: str, reason: str) -> None:
    outcome = run_child(CHILD, {"how": how}, limit_s=2.0 if how == "hang" else 30.0, files=tmp_path / "child")
    assert outcome.status == status
    assert outcome.ok == (how == "end")
    assert outcome.notes["asked"] == {"how": how}
    assert outcome.notes.get("done") == (True if how == "end" else None)
    assert ("error" in outcome.notes) == (how == "raise")
    assert reason in outcome.reason
    assert outcome.ok or "said something" in outcome.reason
    assert outcome.seconds < 20


def test_a_child_has_what_is_added_to_the_environment(tmp_path: Path) -> None:
    told = {"HETEGEN_OF_TESTS": "as they say"}
    outcome = run_child(CHILD, {"how": "end"}, limit_s=30.0, files=tmp_path / "child", environment=told)
    assert outcome.notes["told"] == "as they say"
    assert run_child(CHILD, {"how": "end"}, limit_s=30.0, files=tmp_path / "child").notes["told"] is None


def test_notes_of_an_earlier_child_are_not_taken_for_its_own(tmp_path: Path) -> None:
    run_child(CHILD, {"how": "end"}, limit_s=30.0, files=tmp_path / "child")
    outcome = run_child("no.such.module", {}, limit_s=30.0, files=tmp_path / "child")
    assert (outcome.status, outcome.notes) == ("failed", {})
    assert "No module named" in outcome.reason


def test_a_childs_own_children_may_put_away_what_is_half_done(tmp_path: Path) -> None:
    made = tmp_path / "library.so"
    outcome = run_child(CHILD, {"how": "compile", "made": str(made)}, limit_s=3.0, files=tmp_path / "child")
    assert outcome.status == "timeout"
    assert outcome.notes["asked"]["made"] == str(made)
    assert not made.exists()
