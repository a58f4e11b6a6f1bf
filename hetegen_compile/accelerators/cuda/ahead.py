"""What is issued ahead of the host's parts: downloads that the worker waits for, what it computes and what it sends up.

Until a step has run once at its sizes the issuing thread itself waits where gates would be: what runs for the first
time loads code, for which the driver may wait for all that was issued, with locks held that the worker needs. So does
torch's allocator where memory is short.

Device tensors die on the issuing thread only: torch's allocator may be waiting for the device then, with its lock held.

A result goes up as any small upload does, through a pinned buffer that kernels read where it lies. The buffer is lent
when the transfer is issued; the worker fills it and opens the gate that the compute stream waits at.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hetegen_compile.accelerators.base import Op, call_on_host
from hetegen_compile.accelerators.cuda.collection import NoCollection
from hetegen_compile.accelerators.cuda.gates import Gates
from hetegen_compile.accelerators.cuda.lending import Lending
from hetegen_compile.accelerators.cuda.streams import CudaStreams
from hetegen_compile.accelerators.cuda.transfers import CudaTransfer, started
from hetegen_compile.accelerators.cuda.worker import Worker
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.accelerators.ledger import MemoryLedger
from hetegen_compile.accelerators.promises import Promise, as_promised, kept_in
from hetegen_compile.accelerators.switching import QuickSwitching
from hetegen_compile.errors import ScheduleError


class Ahead:
    """The worker of one device and its gates, made when a step first needs them. Used by one thread at a time."""

    def __init__(self, streams: CudaStreams, ledger: MemoryLedger, lending: Lending) -> None:
        self._streams = streams
        self._ledger = ledger
        self._lending = lending
        self._switching = QuickSwitching()
        self._uncollected = NoCollection()
        self._worker = Worker(partial(torch.cuda.set_device, streams.device))
        self._gates: Gates | None = None
        self._given: deque[CudaTransfer] = deque()
        self._begun = False
        self._gated = False

    # ---- steps -------------------------------------------------------------------------------------
    def begin_step(self, *, gated: bool) -> None:
        """Gates are closed in a step that loads nothing and finds memory without waiting for the device."""
        self._gated = gated

    def finish_step(self) -> None:
        """Wait for the worker and raise what it has raised. After a step without it, it ends, with its OpenMP threads:
        beside them those of the issuing thread would sleep between any two kernels (``openmp.py``)."""
        if self._begun:
            self._worker.drain()
            self._worker.raise_failure()
            self._leave()
        elif self._worker.started:
            self._worker.close()

    def abandon_step(self) -> None:
        """Pass over what the worker still has to do; every gate opens."""
        if self._begun:
            self._worker.abandon()
            self._leave()

    def close(self) -> None:
        """End the worker's thread, and a step that nobody has finished."""
        self.abandon_step()
        self._worker.close()

    def _begin(self) -> None:
        self._begun = True
        self._switching.enter()
        self._uncollected.enter()
        self._worker.begin()

    def _leave(self) -> None:
        self._begun = False
        self._let_go()
        self._switching.leave()
        self._uncollected.leave()

    def _let_go(self, sent: CudaTransfer | None = None) -> None:
        """The worker is through with all that was given to it, or up to what it has sent: downloads keep their source
        until then."""
        while self._given:
            transfer = self._given.popleft()
            transfer.source = None
            if transfer is sent:
                break

    def raise_failure(self) -> None:
        """Raise what the worker has raised in this step."""
        if self._begun:
            self._worker.raise_failure()

    # ---- operations --------------------------------------------------------------------------------
    def receive(self, op: Op, transfer: CudaTransfer) -> Promise:
        """``Accelerator.receive``."""
        transfer = started(op, transfer, ("to_host",))
        if not self._begun:
            self._begin()
        assert transfer.event is not None, "every download records its event"
        promise = Promise(op.name)
        self._given.append(transfer)
        self._worker.submit(partial(self._receive, op, transfer.event, transfer.value, promise))
        return promise

    def _receive(self, op: Op, event: torch.cuda.Event, value: Any, promise: Promise) -> None:
        with self._streams.work(op):
            event.synchronize()
        promise.keep(value)

    def host_ahead(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Promise:
        """``Accelerator.host_ahead``."""
        if not self._begun:
            self._begin()
        promise = Promise(op.name)
        self._worker.submit(partial(self._compute, op, function, args, kwargs, promise))
        return promise

    def _compute(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], promise: Promise
    ) -> None:
        with self._streams.tracer.host_span(op.name, "worker"):
            promise.keep(call_on_host(op, function, kept_in(args), kept_in(kwargs)))

    def deliver(self, op: Op, promises: Sequence[Promise], like: Sequence[torch.Tensor]) -> CudaTransfer:
        """``Accelerator.deliver``."""
        self._ledger.uploaded(op.category, sum(map(span_bytes, like)))
        self._ledger.counters.trips_up += 1
        if self._gates is None:
            self._gates = Gates()
        buffers, values = self._lending.lend_empty(like)
        number, sent = self._gates.number(), threading.Event()
        sending = _Sending(op, promises, buffers, partial(self._gates.open, number))
        self._worker.submit(sending.send, finally_=sending.end, done=sent)
        self._worker.make_room()
        transfer = CudaTransfer(op.name, "to_accelerator", values, None, gate=number, sent=sent)
        self._given.append(transfer)
        return transfer

    def wait(self, op: Op, transfer: CudaTransfer) -> None:
        """The compute stream waits for what the worker sends."""
        if not self._gated:
            self.caught_up(op, transfer)
        elif self._gates is not None and transfer.gate is not None:
            self._gates.close(transfer.gate, self._streams.compute)

    def caught_up(self, op: Op, transfer: CudaTransfer) -> None:
        """``Accelerator.caught_up``."""
        transfer = started(op, transfer, ("to_accelerator",))
        if transfer.sent is None:
            raise ScheduleError(f"{op.name} waits for {transfer.node}, which the worker does not send")
        transfer.sent.wait()
        self._worker.raise_failure()
        if transfer in self._given:
            self._let_go(transfer)


@dataclass
class _Sending:
    """Results on their way into lent buffers, and the gate behind which they are read: it opens in any case."""

    op: Op
    promises: Sequence[Promise]
    buffers: Sequence[torch.Tensor]
    open_gate: Callable[[], None]
    complete: bool = False

    def send(self) -> None:
        """Fill the buffers."""
        for promise, buffer in zip(self.promises, self.buffers, strict=True):
            buffer.copy_(as_promised(self.op.name, promise.kept(), buffer))
        self.complete = True

    def end(self) -> None:
        """What waits goes on; after a failure with zeros, since indices of an earlier step may be out of range."""
        try:
            for buffer in () if self.complete else self.buffers:
                buffer.zero_()
        finally:
            self.open_gate()


__all__ = ["Ahead"]
