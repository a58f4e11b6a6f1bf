"""The host's worker as one more lane: downloads that it waits for, what it computes, what it sends up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from hetegen_compile.accelerators.base import Op, call_on_host
from hetegen_compile.accelerators.emulated.clocks import HOST, WORKER
from hetegen_compile.accelerators.emulated.engine import Engine, HostFailure
from hetegen_compile.accelerators.emulated.hazards import Hazards
from hetegen_compile.accelerators.emulated.streams import Task
from hetegen_compile.accelerators.emulated.values import DeviceTensor, HostPromise, Transfer, deferred_in
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.accelerators.ledger import MemoryLedger
from hetegen_compile.accelerators.modes import Modes
from hetegen_compile.accelerators.promises import as_promised, kept_in
from hetegen_compile.errors import ScheduleError


class Ahead:
    """Operations of the worker; the rules are checked when one is issued."""

    def __init__(self, engine: Engine, hazards: Hazards, ledger: MemoryLedger) -> None:
        self._engine = engine
        self._hazards = hazards
        self._ledger = ledger
        self._gated = False
        self._closed: list[Transfer] = []

    def begin_step(self, *, gated: bool) -> None:
        """A GPU closes gates in this step, or (not ``gated``) whoever issues waits for the worker there."""
        self._gated = gated
        self._closed.clear()

    @property
    def behind_gates(self) -> bool:
        """Whether what is issued now may lie behind a closed gate."""
        return self._gated and bool(self._closed)

    def waits(self, transfer: Transfer) -> None:
        """The compute stream waits for what the worker sends: a gate."""
        if transfer.access.lane == WORKER:
            self._closed.append(transfer)

    def receive(self, op: Op, transfer: Transfer) -> HostPromise:
        """``Accelerator.receive``."""
        transfer = self._hazards.started(transfer, op.name, ("to_host",))
        self._hazards.clocks.merge(WORKER, transfer.clock)
        self._hazards.clocks.issue(WORKER, op.name)
        assert transfer.done is not None, "every download has an end"
        promise = HostPromise(op.name)
        work = partial(_receive, op, transfer, promise)
        self._engine.submit(WORKER, Task(op, work, waits=(transfer.done,)))
        return promise

    def host_ahead(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostPromise:
        """``Accelerator.host_ahead``."""
        for value in deferred_in((args, kwargs)):
            if not isinstance(value, HostPromise):
                value.refuse(op.name)
        self._hazards.clocks.issue(WORKER, op.name)
        promise = HostPromise(op.name)
        work = partial(_compute, op, function, args, kwargs, promise)
        self._engine.submit(WORKER, Task(op, work, Modes.current()))
        return promise

    def deliver(self, op: Op, promises: Sequence[HostPromise], like: Sequence[torch.Tensor]) -> Transfer:
        """``Accelerator.deliver``: what is sent is read where it lies."""
        access = self._hazards.clocks.issue(WORKER, op.name)
        self._ledger.counters.trips_up += 1
        values, done = [DeviceTensor(access, borrowed=True, arrived=False) for _ in promises], threading.Event()
        self._engine.submit(WORKER, Task(op, partial(self._send, op, promises, like, values), done=done))
        clock = self._hazards.clocks.now(WORKER)
        return Transfer(op.name, "to_accelerator", access, clock, values=values, done=done)

    def _send(
        self, op: Op, promises: Sequence[HostPromise], like: Sequence[torch.Tensor], values: Sequence[DeviceTensor]
    ) -> None:
        for promise, expected, value in zip(promises, like, values, strict=True):
            tensor = as_promised(op.name, promise.kept(), expected)
            value.data = tensor.detach()
            self._ledger.hold(tensor, op.category, nbytes=0)
            self._ledger.uploaded(op.category, span_bytes(tensor))

    def caught_up(self, op: Op, transfer: Transfer) -> None:
        """Wait for the worker; what it raised is for the caller to find."""
        transfer = self._hazards.started(transfer, op.name, ("to_accelerator",))
        if transfer.access.lane != WORKER or transfer.done is None:
            raise ScheduleError(f"{op.name} waits for {transfer.node}, which the worker does not send")
        transfer.done.wait()
        self._closed = [one for one in self._closed if one.access.tick > transfer.access.tick]
        self._hazards.clocks.merge(HOST, transfer.clock)


def _receive(op: Op, transfer: Transfer, promise: HostPromise) -> None:
    if transfer.host_tensors is None:
        raise ScheduleError(f"{op.name} waits for {transfer.node}, whose step was aborted")
    promise.keep(transfer.host_tensors[0] if transfer.single else transfer.host_tensors)


def _compute(
    op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], promise: HostPromise
) -> None:
    try:
        promise.keep(call_on_host(op, function, kept_in(args), kept_in(kwargs)))
    except Exception as error:
        raise HostFailure(error) from error
