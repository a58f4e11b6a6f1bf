"""The host's worker of a CUDA device: a thread that does what it is given in that order, ahead of the accelerator.

It leaves a processor to the thread that issues where there are more than two, and one more where there are many, for
what else runs: the threads of a kernel end together, so one that shares its processor holds up all of them. On 16
processors of an H200's host kernels of 14 threads read 93 GB/s, of 15 threads 88 and of 12 threads 84, and every third
step of 15 threads stood still for some 13 ms, which none of the others did.

Where processors are left, the issuing thread's own OpenMP threads end in each step, as soon as the worker has something
to do: with both sets the worker's would sleep between any two kernels (``openmp.py``). Ending 15 of them took 0.8 ms.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from hetegen_compile.accelerators.cuda.job_thread import JobThread
from hetegen_compile.accelerators.modes import EnteredModes, Modes
from hetegen_compile.accelerators.openmp import end_own_threads

_FEW, _MANY = 2, 8
"""So few processors are all used for computing; so many leave two of them free, numbers between them one."""


@dataclass(eq=False)
class _Job:
    """One operation; ``finally_`` is done whatever becomes of ``work``, and ``done`` is set behind both."""

    work: Callable[[], None] | None
    finally_: Callable[[], None] | None = None
    done: threading.Event | None = None


@dataclass
class _Step:
    """What the thread knows of the step under way. ``modes`` are torch's, which it enters."""

    entered: EnteredModes = field(default_factory=EnteredModes)
    modes: Modes | None = None
    failure: BaseException | None = None
    skipping: bool = False

    @contextmanager
    def on_thread(self) -> Iterator[None]:
        """The thread's own settings begin and end."""
        torch.get_num_threads()  # a thread's first query takes the process's count: before our own is set
        try:
            yield
        finally:
            self.entered.leave()

    def do(self, job: _Job) -> None:
        """Do a job, and whatever happens what is done finally: nobody may wait for ever."""
        try:
            if job.work is not None and not self.skipping and self.failure is None:
                if self.modes is not None:
                    self.entered.enter(self.modes)
                job.work()
        except BaseException as error:
            self.failure = error
        finally:
            job.work = None
            if job.finally_ is not None:
                job.finally_()
            if job.done is not None:
                job.done.set()


def worker_threads(threads: int) -> int:
    """How many of a process's threads the worker computes with."""
    return threads - (0 if threads <= _FEW else 1 if threads < _MANY else 2)


class Worker:
    """The thread, started with the first step that gives it something; ``prepare`` is what it does first."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._step = _Step()
        self._thread = JobThread("hetegen-worker", self._step.on_thread)
        self._threads = 0
        self._alone = True

    @property
    def started(self) -> bool:
        """Whether the thread is there."""
        return self._thread.started

    def begin(self) -> None:
        """Take over the caller's modes of torch and number of threads, for a step."""
        if not self.started:
            self._threads = 0
            self.submit(self._prepare)
        self._step.modes = Modes.current()
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._set_threads(threads)
        self._alone = threads <= _FEW

    def make_room(self) -> None:
        """End the issuing thread's own OpenMP threads, once a step."""
        if not self._alone:
            self._alone = True
            end_own_threads()

    def _set_threads(self, threads: int) -> None:
        """``torch.set_num_threads`` sets the calling thread's own and the default of threads to come: set that back."""
        self.submit(lambda: torch.set_num_threads(worker_threads(threads)))
        self.drain()
        torch.set_num_threads(threads)
        self._threads = threads

    def submit(
        self, work: Callable[[], None], finally_: Callable[[], None] | None = None, done: threading.Event | None = None
    ) -> None:
        """Enqueue work; returns at once."""
        self._thread.submit(partial(self._step.do, _Job(work, finally_, done)))

    def raise_failure(self) -> None:
        """Raise what the work of this step has raised."""
        if self._step.failure is not None:
            raise self._step.failure

    def drain(self) -> None:
        """Block until everything submitted is over."""
        self._thread.drain()

    def abandon(self) -> None:
        """Pass over what is queued (what is done finally is done), and forget what failed."""
        self._step.skipping = True
        try:
            self.drain()
        finally:
            self._step.skipping = False
            self._step.failure = None

    def close(self) -> None:
        """End the thread after what is queued; another is started with the next step."""
        self._thread.close()


__all__ = ["Worker", "worker_threads"]
