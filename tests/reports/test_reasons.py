"""Why each weight is where it is: what ``explain()`` says of a Linear follows from its shares."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetegen_compile.reports.schedule import _why
from hetegen_compile.rows import Row
from tests.reports.test_table import LINEAR, RESIDENT


def partly_resident(host: float, streamed: float) -> Row:
    return replace(LINEAR, host_share=host, streamed_share=streamed, resident_share=1.0 - host - streamed)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (LINEAR, "60% of its rows on the host, 40% streamed: host and link finish together"),
        (
            partly_resident(0.2, 0.3),
            "20% of its rows on the host, 30% streamed, 50% resident: host and link finish together",
        ),
        (partly_resident(0.0, 0.5), "50% resident: no more of it fits the budget, and a trip to the host would cost"),
        (partly_resident(0.2, 0.0), "80% resident: the link would take longer than the host for the rest"),
        (RESIDENT, "resident: it saves more time per byte"),
        (replace(LINEAR, placement="host", host_share=1.0, streamed_share=0.0), "the link would take longer"),
        (replace(LINEAR, placement="streamed", host_share=0.0, streamed_share=1.0), "a trip to the host would cost"),
    ],
)
def test_the_reason_follows_from_the_shares(row: Row, told: str) -> None:
    assert told in _why(row, "auto")


def test_an_option_is_the_reason_if_it_decides() -> None:
    assert "the option split=0.5 says so" in _why(partly_resident(0.5, 0.0), 0.5)
