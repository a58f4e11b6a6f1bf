"""Activations on their way between host and device, as lanes of threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hetegen_compile.accelerators.base import Op, Value
from hetegen_compile.accelerators.emulated.clocks import COMPUTE, DOWN, HOST, UP
from hetegen_compile.accelerators.emulated.engine import Engine
from hetegen_compile.accelerators.emulated.hazards import Hazards
from hetegen_compile.accelerators.emulated.streams import Task
from hetegen_compile.accelerators.emulated.values import DeviceTensor, Transfer
from hetegen_compile.accelerators.emulated.work import DeviceWork
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.accelerators.ledger import MemoryLedger
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import SMALL_UPLOAD_BYTES, VIEWED_UPLOAD_BYTES


class Activations:
    """Copies of activations; the rules are checked when a copy is issued."""

    def __init__(self, engine: Engine, hazards: Hazards, work: DeviceWork, ledger: MemoryLedger) -> None:
        self._engine = engine
        self._hazards = hazards
        self._work = work
        self._ledger = ledger

    def to_host(self, op: Op, value: Value | Sequence[Value]) -> Transfer:
        """``Accelerator.to_host``."""
        single = not isinstance(value, list | tuple)
        values: list[Value] = [value] if single else list(value)
        access = self._hazards.download(op.name, values)
        self._ledger.counters.trips_down += 1
        clock, done = self._hazards.clocks.now(DOWN), threading.Event()
        transfer = Transfer(op.name, "to_host", access, clock, done=done, single=single)
        work = partial(self._work.copy_down, op, values, transfer)
        issued = self._engine.marker(COMPUTE, op)
        self._engine.submit(DOWN, Task(op, work, waits=(issued,), done=done))
        return transfer

    def wait_host(self, op: Op, transfer: Transfer) -> Transfer:
        """Block until the download is over, or failed."""
        transfer = self._hazards.started(transfer, op.name, ("to_host",))
        if transfer.done is not None:
            transfer.done.wait()
        return transfer

    def received(self, op: Op, transfer: Transfer, start_s: float) -> Any:
        """The host's tensors of a download that has not failed; the host's lane went on at ``start_s``."""
        self._hazards.clocks.merge(HOST, transfer.clock)
        self._engine.pace(op, HOST, start_s)
        if transfer.host_tensors is None:
            raise ScheduleError(f"{op.name} waits for {transfer.node}, whose step was aborted")
        return transfer.host_tensors[0] if transfer.single else transfer.host_tensors

    def to_accelerator(self, op: Op, tensors: Sequence[torch.Tensor]) -> Transfer:
        """``Accelerator.to_accelerator``."""
        self._hazards.refuse_on_host(op.name, tensors)
        for tensor in tensors:
            self._hazards.lend(op.name, tensor)
        self._ledger.counters.trips_up += 1
        nbytes = sum(map(span_bytes, tensors))
        if nbytes <= VIEWED_UPLOAD_BYTES:
            return self._lend(op, tensors)
        lane = COMPUTE if nbytes <= SMALL_UPLOAD_BYTES else UP
        access = self._hazards.upload(op.name) if lane == UP else self._hazards.clocks.issue(COMPUTE, op.name)
        values, done = [DeviceTensor(access, arrived=False) for _ in tensors], threading.Event()
        self._engine.submit(lane, Task(op, partial(self._work.copy_all_up, op, values, tensors), done=done))
        return Transfer(op.name, "to_accelerator", access, self._hazards.clocks.now(lane), values=values, done=done)

    def _lend(self, op: Op, tensors: Sequence[torch.Tensor]) -> Transfer:
        """The smallest are read where they lie; the values keep the host's tensors alive."""
        access = self._hazards.clocks.issue(HOST, op.name)
        values = [DeviceTensor(access, borrowed=True, arrived=False) for _ in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            value.data = tensor.detach()
            self._ledger.hold(tensor, op.category, nbytes=0)
            self._ledger.uploaded(op.category, span_bytes(tensor))
        if self._engine.paced:  # the device takes its time to read them
            self._engine.submit(COMPUTE, Task(op, _nothing))
        return Transfer(op.name, "to_accelerator", access, self._hazards.clocks.now(HOST), values=values)


def _nothing() -> None:
    pass
