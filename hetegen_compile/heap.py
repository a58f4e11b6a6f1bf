"""A heap that the garbage collector seldom goes through."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_THRESHOLDS = (50_000, 10, 10)
"""New objects until the young ones are gone through, and of these rounds until the older ones are, too."""


@contextlib.contextmanager
def large_heap() -> Iterator[None]:
    """Let the collector look seldom at what the block makes, and not at all at what exists already.

    Tracing and planning make and drop graphs of thousands of nodes. With the usual thresholds the collector then goes
    through every object of the process (torch, transformers, a traced model: half a million) again and again, which
    took a third of a dry run's time and a fifth of a compilation's. Where the program has frozen objects of its own
    these stay as they are, since unfreezing would take all of them back.
    """
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    if not frozen:
        gc.freeze()
    if thresholds[0]:  # 0 switches the collector off
        gc.set_threshold(*map(max, _THRESHOLDS, thresholds))
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not frozen:
            gc.unfreeze()


__all__ = ["large_heap"]
