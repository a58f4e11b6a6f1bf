"""What errors say."""

from __future__ import annotations

import pytest

from hetegen_compile.errors import first_line


@pytest.mark.parametrize(
    ("text", "shown"), [("", "ValueError"), ("one\ntwo", "one"), ("\n one\n", "one"), ("  ", "ValueError")]
)
def test_the_first_line_of_an_error_is_never_empty(text: str, shown: str) -> None:
    assert first_line(ValueError(text)) == shown
