"""Pacing: lanes that take at least the predicted time of each operation, by accumulated debt.

Short operations cannot be slept through one by one (a sleep is tens of microseconds too long), so each lane
has a virtual end: where it would be had every operation taken its time. A lane sleeps only once it is more
than a millisecond ahead of that.
"""

from __future__ import annotations

import threading
import time

from hetegen_compile.accelerators.emulated.clocks import RESOURCES

SHORTEST_SLEEP_S = 1e-3


class Pacer:
    """Virtual ends of the lanes; without a factor nothing ever sleeps."""

    def __init__(self, pace: float | None) -> None:
        self._pace = pace
        self._ends_s = [0.0] * len(RESOURCES)
        self._lock = threading.Lock()

    def charge(self, lane: int, start_s: float, seconds: float) -> None:
        """An operation predicted to take ``seconds`` began at ``start_s``: sleep what the lane owes."""
        if self._pace is None or seconds <= 0.0:
            return
        with self._lock:
            end_s = max(self._ends_s[lane], start_s) + seconds * self._pace
            self._ends_s[lane] = end_s
        debt_s = end_s - time.perf_counter()
        if debt_s > SHORTEST_SLEEP_S:
            time.sleep(debt_s)
