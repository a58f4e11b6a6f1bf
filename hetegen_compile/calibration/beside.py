"""What goes on beside a measurement: other work in a thread of its own, and fewer threads that compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """torch's number of threads inside the block; None: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def repeatedly(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Iterator[list[float]]:
    """Run ``work`` again and again in another thread, begun before the block and ended after it.

    Yields the seconds of the rounds that are over, one that failed included. What ``work`` raises is raised here, after
    the block.
    """
    begun, stop = threading.Event(), threading.Event()
    rounds_s: list[float] = []

    def loop() -> None:
        begun.set()
        while not stop.is_set():
            started_s = clock()
            try:
                work()
            finally:
                rounds_s.append(max(clock() - started_s, 1e-9))

    with ThreadPoolExecutor(1, "hetegen-calibrate") as executor:
        ended = executor.submit(loop)
        begun.wait()
        try:
            yield rounds_s
        finally:
            stop.set()
    ended.result()


__all__ = ["computing_with", "repeatedly"]
