"""A lock that is taken only if it is free, and signals that interrupt at any moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from hetegen_compile.locks import if_free

INTERRUPTS = 200
SOONEST_S = 2e-5


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """The function that is given makes the process be interrupted in a moment, as often as it is called."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SOONEST_S) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_work_is_done_under_a_free_lock_only(make: Callable[[], threading.Lock]) -> None:
    lock, done = make(), list[bool]()
    assert if_free(lock, lambda: done.append(in_another_thread(lock)))
    assert done == [False], "it was taken"
    assert in_another_thread(lock), "it is free again"
    with pytest.raises(ZeroDivisionError):
        if_free(lock, lambda: 1 / 0)
    assert in_another_thread(lock), "it is free again"


def in_another_thread(lock: threading.Lock) -> bool:
    """Whether the lock was free for a thread that asks now."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(if_free(lock, lambda: None)))
    thread.start()
    thread.join()
    return found[0]


def test_no_interrupt_leaves_it_taken() -> None:
    lock, interrupted = threading.Lock(), 0
    with interrupts() as interrupt_soon:
        for _ in range(INTERRUPTS):
            try:
                interrupt_soon()
                while if_free(lock, int):
                    pass
            except KeyboardInterrupt:
                interrupted += 1
            assert not lock.locked()
    assert interrupted == INTERRUPTS
