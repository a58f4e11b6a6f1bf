"""How often the interpreter lets another thread go on."""

from __future__ import annotations

import os
import sys
import threading

INTERVAL_S = 1e-5
"""While a step's threads wait for each other: at Python's default a hand-off to a busy thread takes milliseconds."""

_lock = threading.Lock()
_inside: dict[int, float] = {}
"""The steps under way, by the identity of their ``QuickSwitching``, with the interval before the first of them."""


class QuickSwitching:
    """Lets threads of the interpreter take turns quickly between ``enter`` and ``leave``; process-wide.

    With steps on several accelerators the last one that leaves gives the interpreter its own interval back.
    """

    def enter(self) -> None:
        """Switch quickly from here on."""
        with _lock:
            _inside.setdefault(id(self), next(iter(_inside.values()), sys.getswitchinterval()))
            sys.setswitchinterval(INTERVAL_S)

    def leave(self) -> None:
        """This step is over."""
        with _lock:
            before = _inside.pop(id(self), None)
            if before is not None and not _inside:
                sys.setswitchinterval(before)


def _after_fork() -> None:
    """In the child: other threads, whose steps these may be, and who may hold the lock, are not there."""
    global _lock
    _lock = threading.Lock()
    for before in _inside.values():
        sys.setswitchinterval(before)
    _inside.clear()


os.register_at_fork(after_in_child=_after_fork)

__all__ = ["INTERVAL_S", "QuickSwitching"]
