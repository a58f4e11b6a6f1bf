"""The hard limit that a plan is made for."""

from __future__ import annotations

import pytest

from hetegen_compile.planner import budget_bytes


def test_the_default_budget_is_what_is_free_less_a_sixteenth() -> None:
    assert budget_bytes(None, 16 << 30, "cuda") == 15 << 30


def test_a_stated_budget_is_taken_as_it_is() -> None:
    assert budget_bytes(12345, 16 << 30, "cuda") == 12345


def test_more_than_there_is_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert budget_bytes(17 << 30, 16 << 30, "cuda") == 16 << 30
    assert "17.00 GiB is more than the 16.00 GiB" in caplog.text
