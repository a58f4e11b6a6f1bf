"""A heap that the garbage collector seldom goes through."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

_INTERPRETERS = 2_000
"""Python 3.12 freezes some hundred objects of its own when it starts; a program has a hundred thousand with torch."""

_THRESHOLDS = (200_000, 10, 10)
"""New objects until the young ones are gone through, and of these rounds until the older ones are, too."""


@contextlib.contextmanager
def large_heap() -> Iterator[None]:
    """Let the collector look seldom at what the block makes, and not at all at what exists already.

    Tracing and planning make and drop graphs of thousands of nodes. With the usual thresholds the collector then goes
    through every object of the process (torch, transformers, a traced model: half a million) again and again, which
    took a third of a dry run's time and a fifth of a compilation's. Where the program has frozen objects of its own
    these stay as they are, since unfreezing would take all of them back. Blocks may lie within each other, and overlap
    in several threads: the last one to end leaves all as it was before the first.
    """
    with _lock:
        _blocks.append(_freeze() if not _blocks else _blocks[0])
    try:
        yield
    finally:
        with _lock:
            before = _blocks.pop() if _blocks else None  # none: in the child of a fork inside this block
            if before is not None and not _blocks:
                _thaw(before)


class _Before(NamedTuple):
    thresholds: tuple[int, int, int]
    frozen: bool


_lock = threading.Lock()
_blocks: list[_Before] = []  # one for each block that has begun, in whatever thread: what was before the first


def _freeze() -> _Before:
    before = _Before(gc.get_threshold(), gc.get_freeze_count() > _INTERPRETERS)
    if not before.frozen:
        gc.freeze()
    if before.thresholds[0]:  # 0 switches the collector off
        gc.set_threshold(*map(max, _THRESHOLDS, before.thresholds))
    return before


def _thaw(before: _Before) -> None:
    gc.set_threshold(*before.thresholds)
    if not before.frozen:
        gc.unfreeze()


def _after_fork() -> None:
    """In the child: other threads, whose blocks these may be, and who may hold the lock, are not there."""
    global _lock
    _lock = threading.Lock()
    if _blocks:
        _thaw(_blocks[0])
    _blocks.clear()


os.register_at_fork(after_in_child=_after_fork)

__all__ = ["large_heap"]
