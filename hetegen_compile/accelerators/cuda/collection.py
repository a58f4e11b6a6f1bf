"""No garbage collection while a worker is under way.

A collection runs in whichever thread allocates, and with it finalizers of what it finds: those of pinned weights and of
prefetches wait for the device. On the worker they would wait for a gate that the worker opens.
"""

from __future__ import annotations

import gc
import threading

_lock = threading.Lock()
_inside: dict[int, bool] = {}
"""The steps under way, by the identity of their ``NoCollection``, with whether collection was on before the first."""


class NoCollection:
    """Nothing is collected between ``enter`` and ``leave``; process-wide, and with overlapping steps until the last."""

    def enter(self) -> None:
        """Switch it off."""
        with _lock:
            _inside.setdefault(id(self), next(iter(_inside.values()), gc.isenabled()))
            gc.disable()

    def leave(self) -> None:
        """This step is over."""
        with _lock:
            if _inside.pop(id(self), False) and not _inside:
                gc.enable()


__all__ = ["NoCollection"]
