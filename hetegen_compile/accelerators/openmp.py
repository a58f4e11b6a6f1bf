"""OpenMP's threads of a thread that has no more use for them for a while.

Each thread that computes in parallel has threads of its own there. GNU's library (that of torch's Linux wheels) lets
threads wait for their next work by spinning, some milliseconds long, but only while all of them together are no more
than the processors: beyond that they sleep at once (``gomp_managed_threads`` in libgomp), and a kernel of 50 us begins
with waking them all up. Measured with two threads on two processors: beside the idle threads of another one a thread's
kernels slept 1.9 times each, alone never.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

_LIBRARY = "libgomp.so.1"
_SOFT = 1
"""``omp_pause_soft``: settings are kept."""


def end_own_threads() -> None:
    """End the calling thread's own threads; its next parallel region starts them again (some 20 us each).

    Nothing happens with another OpenMP library.
    """
    pause = _pause_function()
    if pause is not None:
        pause(_SOFT)


@cache
def _pause_function() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` of the library if torch has loaded it: one more copy would have no threads."""
    mode = getattr(os, "RTLD_NOLOAD", None)
    if mode is None:
        return None
    try:
        function = ctypes.CDLL(_LIBRARY, mode=mode | os.RTLD_NOW).omp_pause_resource_all
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    found: Callable[[int], int] = function
    return found


__all__ = ["end_own_threads"]
