"""What is issued ahead of the host's parts: downloads that the worker waits for, what it computes and what it sends up.

Until a step has run once at its sizes the issuing thread itself waits where gates would be: what runs for the first
time loads code, for which the driver may wait for all that was issued, with locks held that the worker needs. So does
torch's allocator where memory is short.

Device tensors die on the issuing thread only: torch's allocator may be waiting for the device then, with its lock held.

A result goes up as any small upload does, through a pinned buffer that kernels read where it lies. The buffer is lent
when the transfer is issued; the worker fills it and opens the gate that the compute stream waits at.

A trip that is a download, one host program on it and the transfer of its results is one native call of the worker's
(``native_trips.py``): its first two operations are kept back until the third one is issued.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from hetegen_compile.accelerators.base import Op, call_on_host
from hetegen_compile.accelerators.cuda.collection import NoCollection
from hetegen_compile.accelerators.cuda.gates import Gates
from hetegen_compile.accelerators.cuda.lending import Lending
from hetegen_compile.accelerators.cuda.native_trips import NativeTrip
from hetegen_compile.accelerators.cuda.streams import CudaStreams
from hetegen_compile.accelerators.cuda.transfers import CudaTransfer, started
from hetegen_compile.accelerators.cuda.worker import Worker
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.accelerators.ledger import MemoryLedger
from hetegen_compile.accelerators.promises import Promise, as_promised, kept_in
from hetegen_compile.accelerators.switching import QuickSwitching
from hetegen_compile.errors import ScheduleError
from hetegen_compile.host_kernels.program import Call, HostProgram


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
        self._kept_back: _Received | _Computed | None = None
        self._begun = False
        self.gated = False

    # ---- steps -------------------------------------------------------------------------------------
    def begin_step(self, *, gated: bool, in_turn: bool) -> None:
        """Gates are closed in a step that loads nothing and finds memory without waiting for the device.

        For a step without the worker it ends, with its OpenMP threads: beside them those of the issuing thread would
        sleep between any two kernels (``openmp.py``). On an H200 a model's prompts took 1.5 to 1.75 times as long where
        its answers have a worker as where they have none; that these threads are why was not shown there.
        """
        self.gated = gated
        if in_turn and self._worker.started:
            self._worker.close()

    def finish_step(self) -> None:
        """Wait for the worker and raise what it has raised. After a step that gave it nothing it ends."""
        if self._begun:
            self._submit_kept_back()
            self._worker.drain()
            self._worker.raise_failure()
            self._leave()
        elif self._worker.started:
            self._worker.close()

    def abandon_step(self) -> None:
        """Pass over what the worker still has to do; every gate opens."""
        if self._begun:
            self._kept_back = None
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
        self._submit_kept_back()
        promise = Promise(op.name)
        promise.keep(transfer.value)  # its elements are there once the worker has waited
        self._given.append(transfer)
        self._kept_back = _Received(op, transfer.event, promise)
        return promise

    def _receive(self, op: Op, event: torch.cuda.Event) -> None:
        with self._streams.work(op):
            event.synchronize()

    def host_ahead(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Promise:
        """``Accelerator.host_ahead``."""
        if not self._begun:
            self._begin()
        promise = Promise(op.name)
        received = self._kept_back
        traced = self._streams.tracer.enabled  # each operation has a span of its own then
        if isinstance(received, _Received) and isinstance(function, HostProgram) and not traced:
            self._kept_back = _Computed(op, function, args, promise, received)
            return promise
        self._submit_kept_back()
        self._worker.submit(partial(self._compute, op, function, args, kwargs, promise))
        return promise

    def _submit_kept_back(self) -> None:
        """What was to be a part of a native trip is not."""
        kept, self._kept_back = self._kept_back, None
        if isinstance(kept, _Computed):
            self._worker.submit(partial(self._receive, kept.received.op, kept.received.event))
            self._worker.submit(partial(self._compute, kept.op, kept.program, kept.args, {}, kept.promise))
        elif kept is not None:
            self._worker.submit(partial(self._receive, kept.op, kept.event))

    def _compute(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], promise: Promise
    ) -> None:
        with self._streams.tracer.host_span(op, "worker"):
            promise.keep(call_on_host(op, function, kept_in(args), kept_in(kwargs)))

    def pause(self, seconds: float) -> None:
        """The worker sleeps before what it is given next: for checks of what waits for it."""
        self._worker.submit(partial(time.sleep, seconds))

    def deliver(self, op: Op, promises: Sequence[Promise], like: Sequence[torch.Tensor]) -> CudaTransfer:
        """``Accelerator.deliver``."""
        self._ledger.uploaded(op.category, sum(map(span_bytes, like)))
        self._ledger.counters.trips_up += 1
        if self._gates is None:
            self._gates = Gates()
        buffers, values = self._lending.lend_empty(like)
        number, sent = self._gates.number(), threading.Event()
        sending = _Sending(op, promises, buffers, partial(self._gates.open, number))
        trip = self._native_trip(promises, buffers, number)
        work = sending.send if trip is None else partial(self._travel, op, trip, sending)
        self._worker.submit(work, finally_=sending.end, done=sent)
        self._worker.make_room()
        transfer = CudaTransfer(op.name, "to_accelerator", values, None, gate=number, sent=sent)
        self._given.append(transfer)
        return transfer

    def _native_trip(self, promises: Sequence[Promise], buffers: list[torch.Tensor], number: int) -> NativeTrip | None:
        """What was kept back as one call that fills ``buffers``; None, and it is submitted, where it cannot be."""
        kept = self._kept_back
        if isinstance(kept, _Computed) and kept.gives(promises):
            arguments = kept_in(kept.args)
            form = kept.program.form(arguments)
            if form is not None and form.takes(buffers):
                self._kept_back = None
                kept.promise.keep(buffers)
                self._ledger.counters.native_trips += 1
                assert self._gates is not None, "made before anything is sent"
                return NativeTrip(kept.received.event, Call(form, arguments, buffers), self._gates, number)
        self._submit_kept_back()
        return None

    def _travel(self, op: Op, trip: NativeTrip, sending: _Sending) -> None:
        with self._streams.work(op):
            trip.run()
        self._ledger.counters.read_ahead_bytes += trip.read_bytes
        sending.complete = True

    def wait(self, op: Op, transfer: CudaTransfer) -> None:
        """The compute stream waits for what the worker sends."""
        if not self.gated:
            self.caught_up(op, transfer)
        elif self._gates is not None and transfer.gate is not None:
            self._gates.close(transfer.gate, self._streams.compute)

    def caught_up(self, op: Op, transfer: CudaTransfer) -> None:
        """``Accelerator.caught_up``."""
        transfer = started(op, transfer, ("to_accelerator",))
        if transfer.sent is None:
            raise ScheduleError(f"{op.name} waits for {transfer.node}, which the worker does not send")
        self._submit_kept_back()
        transfer.sent.wait()
        self._worker.raise_failure()
        if transfer in self._given:
            self._let_go(transfer)


class _Received(NamedTuple):
    """A download that the worker is to wait for."""

    op: Op
    event: torch.cuda.Event
    promise: Promise


class _Computed(NamedTuple):
    """A host program that is to run behind it."""

    op: Op
    program: HostProgram
    args: tuple[Any, ...]
    promise: Promise
    received: _Received

    def gives(self, promises: Sequence[Promise]) -> bool:
        """Whether these are all of its results, in their order, and all that it reads is known where it lies."""
        results = list(range(len(self.program.results)))
        known = all(argument.known for argument in self.args if isinstance(argument, Promise))
        return known and [one.place_in(self.promise) for one in promises] == results


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
