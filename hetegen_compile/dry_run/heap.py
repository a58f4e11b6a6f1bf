"""A heap that the garbage collector leaves alone."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Take everything that exists now out of the collector's sight until the end of the block.

    Planning makes and drops graphs of thousands of nodes, and each time enough of them were made the collector goes
    through all objects of the process: torch, transformers and a traced model of some hundred layers are millions,
    a third of the time of a dry run. What the block itself makes is collected as ever. Where the program has frozen
    objects of its own, nothing is done: unfreezing would undo theirs.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


__all__ = ["frozen_heap"]
