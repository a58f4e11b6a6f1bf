"""The pin thread of a CUDA device: rows of weights that are not pinned, copied into a ring of pinned memory.

One worker runs everything that a staged weight needs, in issue order: the copy into the pinned ring, then the
start of its upload. So an upload is issued when its rows have arrived, without a flag that the device would
have to poll; whoever waits for that upload waits on the host until it has been issued. The copy is ``memmove``
through ctypes, which lets go of the interpreter lock (of columns numpy's copy, which does so, too).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy
import torch

from hetegen_compile.accelerators.cuda.job_thread import JobThread
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
    """A thread for jobs in issue order; ``prepare`` runs in front of each (a thread chooses its device)."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._thread = JobThread("hetegen-pin")

    def submit(self, node: str, work: Callable[[], None]) -> Job:
        """Enqueue work; returns at once."""
        job = Job(node, work)
        self._thread.submit(partial(_do, job, self._prepare))
        return job

    def drain(self) -> None:
        """Block until everything that was submitted is over."""
        self._thread.drain()

    def close(self) -> None:
        """End the thread after what is queued; the next job starts another one."""
        self._thread.close()


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a matrix, whose rows may lie apart, to a contiguous one on this thread, without the interpreter lock."""
    if source.is_contiguous():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel() * source.element_size())
    else:
        numpy.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())


def _nothing() -> None:
    pass


def _do(job: Job, prepare: Callable[[], None]) -> None:
    try:
        prepare()
        job.work()
    except BaseException as error:
        job.error = error
    finally:
        job.work = _nothing
        job.done.set()
