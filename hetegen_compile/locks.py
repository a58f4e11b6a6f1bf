"""A lock that is taken only if it is free, and given back whatever interrupts.

Finalizers run at any point of any thread, also while their own thread holds the lock: they must not wait for it. But
Python raises ``KeyboardInterrupt`` behind any call: between a plain ``lock.acquire(blocking=False)`` and the ``try``
that follows it the lock would stay taken for good, and everybody else would wait for ever. So here a lock is taken,
and that it is taken is noted, by one call that runs no Python code, and the first call of ``finally`` gives it back.
(A lock that may be waited for needs no care: Python's own are taken and given back by ``with`` without such a gap. A
context manager that is written in Python has one.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Lock(Protocol):
    """A lock of Python's own, reentrant or not."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Whether it was taken."""

    def release(self) -> None:
        """Give it back."""


def if_free(lock: Lock, work: Callable[[], object]) -> bool:
    """Do ``work`` under the lock unless somebody else has it; whether it was free."""
    taken: list[bool] = []
    try:
        taken.extend(filter(None, map(lock.acquire, (False,))))
        if taken:
            work()
    finally:
        if taken:
            lock.release()
    return bool(taken)


__all__ = ["Lock", "if_free"]
