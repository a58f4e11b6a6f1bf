"""What a schedule holds for a CUDA device: copies that were started, and tokens of releases."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.accelerators.cuda.staging import Job
from hetegen_compile.errors import ScheduleError


@dataclass(eq=False)
class CudaTransfer:
    """A started copy: its result, what it reads (kept alive), and its event (None: readable at once).

    ``job`` is the pin thread's part, which sets the event of a prefetch that reads the pinned ring. ``reader``
    names the prefetch that reads a stage. ``gate`` is where the compute stream waits for what the worker sends,
    ``sent`` is set once it has. A prefetch for the next step keeps nothing alive: a finalizer completes
    it before its source's memory is freed.
    """

    node: str
    kind: str
    value: Any
    source: Any
    event: torch.cuda.Event | None = None
    released_by: str | None = None
    job: Job | None = None
    reader: str | None = None
    gate: int | None = None
    sent: threading.Event | None = None

    def issued(self) -> None:
        """Block until the pin thread has done its part."""
        if self.job is not None:
            self.job.result()


@dataclass(frozen=True)
class CudaToken:
    """What ``release`` leaves behind: compute's event at that point."""

    node: str
    event: torch.cuda.Event


def started(op: Op, transfer: object, kinds: tuple[str, ...]) -> CudaTransfer:
    """CUDA takes an event that was never recorded for done: a transfer that was never started is an error."""
    if not isinstance(transfer, CudaTransfer):
        raise ScheduleError(f"{op.name} waits for {type(transfer).__name__}, which was never started")
    if transfer.kind not in kinds:
        raise ScheduleError(f"{op.name} waits for {transfer.node}, which is a {transfer.kind}")
    return transfer
