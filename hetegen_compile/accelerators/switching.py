"""How often the interpreter lets another thread go on."""

from __future__ import annotations

import sys

INTERVAL_S = 1e-5
"""While a step's threads wait for each other: at Python's default a hand-off to a busy thread takes milliseconds."""


class QuickSwitching:
    """Lets threads of the interpreter take turns quickly between ``enter`` and ``leave``; process-wide."""

    def __init__(self) -> None:
        self._before: float | None = None

    def enter(self) -> None:
        """Switch quickly from here on."""
        if self._before is None:
            self._before = sys.getswitchinterval()
        sys.setswitchinterval(INTERVAL_S)

    def leave(self) -> None:
        """Give the interpreter its own interval back."""
        if self._before is not None:
            sys.setswitchinterval(self._before)
            self._before = None


__all__ = ["INTERVAL_S", "QuickSwitching"]
