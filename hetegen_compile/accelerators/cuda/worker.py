"""The host's worker of a CUDA device: a thread that does what it is given in that order, ahead of the accelerator.

It leaves one processor to the thread that issues, where there are more than two: the threads of a kernel end together,
so one that shares its processor holds up all of them.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hetegen_compile.accelerators.modes import EnteredModes, Modes

_FEW = 2
"""So many processors or fewer are all used for computing."""


@dataclass(eq=False)
class Job:
    """One operation; ``finally_`` is done whatever becomes of ``work``, and ``done`` is set behind both."""

    work: Callable[[], None] | None
    finally_: Callable[[], None] | None = None
    done: threading.Event | None = None


@dataclass
class _Shared:
    """What the thread and its owner both see. ``modes`` are torch's of the step under way."""

    jobs: queue.SimpleQueue[Job | None] = field(default_factory=queue.SimpleQueue)
    modes: Modes | None = None
    failure: BaseException | None = None
    skipping: bool = False


class Worker:
    """The thread, started with the first step that gives it something; ``prepare`` is what it does first."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._shared = _Shared()
        self._thread: threading.Thread | None = None
        self._end: weakref.finalize[..., Worker] | None = None
        self._threads = 0

    def begin(self) -> None:
        """Take over the caller's modes of torch and number of threads, for a step."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._shared,), name="hetegen-worker", daemon=True)
            self._thread.start()
            self.submit(self._prepare)
            self._end = weakref.finalize(self, self._shared.jobs.put, None)
        self._shared.modes = Modes.current()
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._set_threads(threads)

    def _set_threads(self, threads: int) -> None:
        """``torch.set_num_threads`` sets the calling thread's own and the default of threads to come: set that back."""
        self._do(lambda: torch.set_num_threads(threads if threads <= _FEW else threads - 1))
        torch.set_num_threads(threads)
        self._threads = threads

    def submit(
        self, work: Callable[[], None], finally_: Callable[[], None] | None = None, done: threading.Event | None = None
    ) -> None:
        """Enqueue work; returns at once."""
        self._shared.jobs.put(Job(work, finally_, done))

    def raise_failure(self) -> None:
        """Raise what the work of this step has raised."""
        if self._shared.failure is not None:
            raise self._shared.failure

    def drain(self) -> None:
        """Block until everything submitted is over."""
        if self._thread is not None:
            done = threading.Event()
            self._shared.jobs.put(Job(None, done=done))
            done.wait()

    def abandon(self) -> None:
        """Pass over what is queued (what is done finally is done), and forget what failed."""
        self._shared.skipping = True
        try:
            self.drain()
        finally:
            self._shared.skipping = False
            self._shared.failure = None

    def close(self) -> None:
        """End the thread after what is queued; another is started with the next step.

        The worker itself may come here: whoever drops the last of a model's tensors sends its accelerator to rest.
        """
        if self._thread is not None:
            assert self._end is not None, "it came with the thread"
            self._end()
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread, self._shared = None, _Shared()
            self._threads = 0

    def _do(self, work: Callable[[], None]) -> None:
        self.submit(work)
        self.drain()


def _run(shared: _Shared) -> None:
    modes = EnteredModes()
    torch.get_num_threads()  # a thread's first query takes the process's count: before our own is set
    try:
        while (job := shared.jobs.get()) is not None:
            _finish(job, shared, modes)
            del job  # the next get() may block for long, and a job holds tensors
    finally:
        modes.leave()


def _finish(job: Job, shared: _Shared, modes: EnteredModes) -> None:
    """Do a job, and whatever happens what is done finally: nobody may wait for ever."""
    try:
        if job.work is not None and not shared.skipping and shared.failure is None:
            if shared.modes is not None:
                modes.enter(shared.modes)
            job.work()
    except BaseException as error:
        shared.failure = error
    finally:
        job.work = None
        if job.finally_ is not None:
            job.finally_()
        if job.done is not None:
            job.done.set()


__all__ = ["Worker"]
