"""A thread that does what it is given, in that order: the life that the pin thread and the worker have in common."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Job = Callable[[], None]
Jobs = queue.SimpleQueue[Job | None]


class JobThread:
    """Started with the first job, ended by its owner or with it. Jobs raise nothing: nobody is there to be told.

    The thread is in a ``scope`` of its own for as long as it lives.
    """

    def __init__(self, name: str, scope: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._name = name
        self._scope = scope
        self._jobs: Jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._end: weakref.finalize[..., JobThread] | None = None

    @property
    def started(self) -> bool:
        """Whether it has been given something since it was last closed."""
        return self._thread is not None

    def submit(self, job: Job) -> None:
        """Enqueue a job; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._jobs, self._scope), name=self._name, daemon=True)
            self._thread.start()
            self._end = weakref.finalize(self, self._jobs.put, None)
        self._jobs.put(job)

    def drain(self) -> None:
        """Block until everything that was submitted is over."""
        if self._thread is not None:
            done = threading.Event()
            self._jobs.put(done.set)
            done.wait()

    def close(self) -> None:
        """End the thread after what is queued; the next job starts another one.

        The thread itself may come here: whoever drops the last of a model's tensors sends its accelerator to rest.
        """
        if self._thread is not None:
            assert self._end is not None, "it came with the thread"
            self._end()
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread, self._jobs = None, queue.SimpleQueue()


def _run(jobs: Jobs, scope: Callable[[], AbstractContextManager[object]]) -> None:
    with scope():
        while (job := jobs.get()) is not None:
            job()
            del job  # the next get() may block for long, and a job holds tensors


__all__ = ["Job", "JobThread"]
