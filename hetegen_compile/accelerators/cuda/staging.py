"""The pin thread of a CUDA device: rows of weights that are not pinned, copied into a ring of pinned memory.

One worker runs everything that a staged weight needs, in issue order: the copy into the pinned ring, then the
start of its upload. So an upload is issued when its rows have arrived, without a flag that the device would
have to poll; whoever waits for that upload waits on the host until it has been issued. The copy is ``memmove``
through ctypes, which lets go of the interpreter lock (of columns numpy's copy, which does so, too).
"""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy
import torch

from hetegen_compile.errors import AcceleratorError


@dataclass(eq=False)
class Job:
    """Work of the pin thread for one node; ``done`` is set when it is over, also if it failed."""

    node: str
    work: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def result(self) -> None:
        """Block until the work is over; raise AcceleratorError with the node's name if it failed."""
        self.done.wait()
        if isinstance(self.error, AcceleratorError):
            raise self.error
        if self.error is not None:
            raise AcceleratorError(f"{self.node} failed on the pin thread: {self.error}") from self.error


class PinThread:
    """A worker for jobs in issue order; started with the first one.

    ``prepare`` runs in front of each job (a thread chooses its device).
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, node: str, work: Callable[[], None]) -> Job:
        """Enqueue work; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_run, args=(self._queue, self._prepare), name="hetegen-pin", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._queue.put, None)
        job = Job(node, work)
        self._queue.put(job)
        return job

    def drain(self) -> None:
        """Block until everything that was submitted is over."""
        if self._thread is not None:
            self.submit("synchronize", _nothing).done.wait()

    def close(self) -> None:
        """End the thread after what is queued; the next job starts another one.

        The thread itself may call this (it let go of a model's last tensor): it ends afterwards.
        """
        if self._thread is not None:
            self._queue.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread, self._queue = None, queue.SimpleQueue()


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a matrix, whose rows may lie apart, to a contiguous one on this thread, without the interpreter lock."""
    if source.is_contiguous():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel() * source.element_size())
    else:
        numpy.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())


def _nothing() -> None:
    pass


def _run(jobs: queue.SimpleQueue[Job | None], prepare: Callable[[], None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            prepare()
            job.work()
        except BaseException as error:
            job.error = error
        finally:
            job.work = _nothing
            job.done.set()
        del job  # the next get() may block for long, and a job holds tensors
