"""Weights in huge pages: made of the pages that they lie in, in the background, while the model is compiled.

On an H200's host (4 KiB pages, a virtual machine) the host's parts of a step read weights in pages of 2 MiB 6 to 9 %
faster; making them took 0.4 s per GiB, which is what a generation of 500 tokens gains. Compilation takes longer than
that, on other processors, but whatever asks for memory meanwhile waits: on two processors of an EPYC a small model's
capture took 2 to 5 times as long beside it. So it has some seconds in all. Addresses stay, and what has not been
reached by then, or when weights are pinned, stays as it is.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from hetegen_compile.options import format_bytes

logger = logging.getLogger("hetegen_compile")

HUGE_BYTES = 2 << 20
"""Of a huge page on x86-64, and on arm64 with small pages of 4 KiB."""

_AT_ONCE_BYTES = 32 << 20
"""Between two looks at whether to end: about 15 ms."""

_LONGEST_S = 10.0
"""Of a process's life, spent in the system's calls."""

_MADV_COLLAPSE = 25
"""Since Linux 6.1."""

Collapse = Callable[[int, int], int]
"""``collapse(address, nbytes)``: 0, or the system's error number."""


class HugePages:
    """The thread that makes them. ``begin`` and ``end`` are called by one thread at a time."""

    def __init__(self, collapse: Collapse | None = None) -> None:
        self._collapse = collapse or _collapse
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._ranges: deque[tuple[int, int]] = deque()
        self._idle = True
        self._stop = False
        self._left_s = _LONGEST_S
        self.nbytes = 0

    @property
    def under_way(self) -> bool:
        """Whether ``end`` is to be called."""
        return self._thread is not None

    def begin(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Go through ranges (address, bytes) of anonymous memory, behind those under way; returns at once."""
        if not ranges or self._left_s <= 0:
            return
        with self._lock:
            self._ranges.extend(ranges)
            if self._idle:
                self._idle = False
                self._thread = threading.Thread(target=self._go_through, name="hetegen-huge-pages", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """Leave the rest as it is; on return nothing is being moved."""
        if self._thread is not None:
            self._stop = True
            self._thread.join()
            self._thread, self._stop = None, False
            logger.info("%s of weights lie in huge pages", format_bytes(self.nbytes))

    def _go_through(self) -> None:
        """What the system refuses (an older one, memory of another kind, nothing free) stays as it is."""
        while (one := self._next()) is not None:
            address, nbytes = one
            start = -(-address // HUGE_BYTES) * HUGE_BYTES
            end = (address + nbytes) // HUGE_BYTES * HUGE_BYTES
            for lo in range(start, end, _AT_ONCE_BYTES):
                if self._stop or self._left_s <= 0:
                    break
                length, started_s = min(_AT_ONCE_BYTES, end - lo), time.monotonic()
                self.nbytes += length if self._collapse(lo, length) == 0 else 0
                self._left_s -= time.monotonic() - started_s

    def _next(self) -> tuple[int, int] | None:
        """The next range; None, and the thread is over: there is none, or it was told to end."""
        with self._lock:
            if self._stop or self._left_s <= 0:
                self._ranges.clear()
            self._idle = not self._ranges
            return None if self._idle else self._ranges.popleft()


def _collapse(address: int, nbytes: int) -> int:
    if sys.platform != "linux":
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_COLLAPSE) == 0:
        return 0
    return ctypes.get_errno()


__all__ = ["HUGE_BYTES", "Collapse", "HugePages"]
