"""The emulated accelerator: host memory played as a device, and a checker of a schedule's semantics.

Device tensors are copies in host memory; the three streams are threads that really run beside the host
thread. Every rule of the contract is checked when an operation is issued (``hazards``), so that a schedule
that lacks a wait is an error here whether or not the threads were lucky; slots are filled with NaN on
release. It runs on the host's own cores, so its times say nothing about a device, unless ``pace`` stretches
every lane to what the cost model predicts.

After ``fork`` the child has no worker threads: every method raises there instead of hanging.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from hetegen_compile.accelerators.base import Accelerator, Counters, Op, Span, Value, call_on_host
from hetegen_compile.accelerators.clocks import COMPUTE, DOWN, HOST, PIN, UP, Access
from hetegen_compile.accelerators.engine import Engine
from hetegen_compile.accelerators.geometry import has_lines, same_geometry, span_bytes
from hetegen_compile.accelerators.hazards import Hazards
from hetegen_compile.accelerators.ledger import MemoryLedger, PinTable
from hetegen_compile.accelerators.modes import Modes
from hetegen_compile.accelerators.ring import Ring
from hetegen_compile.accelerators.streams import Task
from hetegen_compile.accelerators.values import UNFINISHED, DeviceTensor, Occupancy, Slot, Staged, Token, Transfer
from hetegen_compile.accelerators.work import Call, DeviceWork, Issued
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import SMALL_UPLOAD_BYTES

OUT_OF_MEMORY = 2
"""What CUDA returns where no more host memory can be pinned."""


class EmulatedAccelerator(Accelerator):
    """Host memory as a device of ``memory_bytes``, with three streams that are threads.

    Args:
        memory_bytes: what ``upload`` and ``reserve_ring`` may hold in total.
        pace: every lane takes at least the predicted seconds of its operations times this; None: no pacing.
        seed: random delays of up to a millisecond before each operation of the streams and of the host thread that
            issues them; lanes differ in how long theirs are. None: no delays.
        pin_limit_bytes: host memory that may be pinned in place, as a limit of locked memory; None: no limit.
    """

    kind = "emulated"
    device = torch.device("cpu")

    def __init__(
        self,
        memory_bytes: int = 8 << 30,
        *,
        pace: float | None = None,
        seed: int | None = None,
        pin_limit_bytes: int | None = None,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.counters = Counters()
        self._ledger = MemoryLedger(self.counters, memory_bytes)
        self._pin_limit_bytes = pin_limit_bytes
        self._pins = PinTable(self._register, lambda address: None)
        self._ring = Ring()
        self._pinned = Ring()
        self._hazards = Hazards()
        self._work = DeviceWork(self._ledger)
        self._engine = Engine(pace, seed)

    @property
    def usable(self) -> bool:
        """False after ``close``, in a forked child, and once a worker thread has died."""
        return self._engine.why_unusable() is None

    @property
    def pinned_bytes(self) -> int:
        return self._pins.pinned_bytes + self._pinned.nbytes

    def reseed(self, seed: int | None) -> None:
        """Other random delays from the next step on, as if the accelerator had been opened with this seed."""
        self.synchronize()
        self._engine.reseed(seed)

    # ---- memory ------------------------------------------------------------------------------------
    def upload(self, op: Op, source: torch.Tensor, *, into: Value | None = None) -> DeviceTensor:
        self._engine.check_usable()
        self._hazards.refuse_on_host(op.name, source)
        access = self._hazards.clocks.issue(COMPUTE, op.name)
        if into is None:
            value = DeviceTensor(access)
            work = partial(self._work.copy_up, op, value, source)
        else:
            value = _uploaded_before(op, into, source)
            self._hazards.write(value, access)
            work = partial(self._work.overwrite, op, value, source, self._issued(access))
        done = threading.Event()
        self._engine.submit(COMPUTE, Task(op, work, done=done, lane=UP))
        done.wait()
        self._raise_failure()
        return value

    def _issued(self, access: Access) -> Issued:
        """An access with what its lane knows, for the checks when it runs."""
        return access, self._hazards.clocks.now(access.lane)

    def download(self, op: Op, value: Value) -> torch.Tensor:
        result: torch.Tensor = self.wait_host(Op(op.name), self.to_host(op, value))
        return result

    def limit_memory(self, nbytes: int) -> None:
        self._ledger.limit_bytes = nbytes

    def available_bytes(self) -> int:
        return self.memory_bytes

    def withdraw_memory(self, nbytes: int) -> None:
        """Play that somebody else takes ``nbytes`` of the device's memory (gives back, if negative)."""
        self.memory_bytes -= nbytes
        self._ledger.memory_bytes = self.memory_bytes

    def reserve_ring(self, nbytes: int) -> None:
        self._engine.check_usable()
        if nbytes == self._ring.nbytes:
            return
        self.synchronize()
        self._ledger.require("the staging ring", nbytes - self._ring.nbytes)
        self._hazards.restart("reserve_ring")
        self._ring.resize(nbytes)
        self._ledger.hold(self._ring.buffer, "slots")

    def slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        self._engine.check_usable()
        return self._ring.slot(offset, shape, dtype)

    def pin(self, owner: object, address: int, nbytes: int) -> int:
        self._engine.check_usable()
        return self._pins.pin(owner, address, nbytes)

    def _register(self, address: int, nbytes: int) -> int:
        """Nothing is locked here: only the limit is kept."""
        del address
        limit = self._pin_limit_bytes
        fits = limit is None or self._pins.pinned_bytes + nbytes <= limit
        return 0 if fits else OUT_OF_MEMORY

    def reserve_pinned(self, nbytes: int) -> None:
        self._engine.check_usable()
        if nbytes <= self._pinned.nbytes:
            return
        self.synchronize()
        self._hazards.restart("reserve_pinned")
        self._pinned.resize(nbytes)

    def pinned_slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        self._engine.check_usable()
        return self._pinned.slot(offset, shape, dtype)

    # ---- steps -------------------------------------------------------------------------------------
    def begin_step(self, carried: Sequence[Transfer] = ()) -> None:
        self._engine.check_usable()
        self.abandon_step()
        self._finish_step()
        self._work.aliases.clear()
        kept = [self._hazards.take_over(transfer) for transfer in carried]
        self._give_up(*self._hazards.restart("begin_step", kept))
        self._ledger.begin_step()
        self._engine.enter_step()

    def end_step(self) -> None:
        self._engine.check_usable()
        self._finish_step()
        self._engine.leave_step()
        self._hazards.check_lent()

    def abandon_step(self) -> None:
        if self._engine.in_step:
            self._engine.abort()
            self._work.aliases.clear()
            self._free_ring("abandon_step")

    def _finish_step(self) -> None:
        """Wait for everything but prefetches for the next step."""
        self._engine.drain_step()
        self._raise_failure()
        self._hazards.step_is_over()

    def _free_ring(self, reason: str) -> None:
        """All streams are idle: nothing in the ring is wanted any more."""
        self._hazards.clocks.join()
        self._give_up(*self._hazards.restart(reason))

    def _give_up(self, slots: list[Occupancy], pinned: list[Occupancy]) -> None:
        """Poison what nobody released; slots behind the copies into them that may still be under way."""
        self._pinned.poison(pinned)
        if slots:
            work = partial(self._ring.poison, slots)
            self._engine.submit(UP, Task(Op("begin_step"), work, done=threading.Event()))

    def synchronize(self) -> None:
        self._engine.check_usable()
        self._engine.drain()
        self._raise_failure()
        self._hazards.clocks.join()

    def _raise_failure(self) -> None:
        failure = self._engine.take_failure()
        if failure is not None:
            self._free_ring("the failed step")
            raise failure

    # ---- operations of a schedule --------------------------------------------------------------------
    def stage(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Transfer]) -> Transfer:
        self._engine.check_usable()
        self._hazards.refuse_on_host(op.name, source)
        _check_rows(op, source, slot)
        self._hazards.lend(op.name, source)
        access = self._hazards.stage(op.name, after)
        occupancy = Occupancy(op.name, slot.offset, slot.nbytes)
        self._hazards.occupy_pinned(occupancy, access)
        done = threading.Event()
        work = partial(self._work.fill_pinned, op, source, self._pinned.view(slot))
        self._engine.submit(PIN, Task(op, work, waits=_done(after), done=done))
        clock = self._hazards.clocks.now(PIN)
        return Transfer(op.name, "stage", access, clock, done=done, staged=Staged(slot, occupancy))

    def prefetch(self, op: Op, source: torch.Tensor | Transfer, slot: Slot, after: Sequence[Token]) -> Transfer:
        self._engine.check_usable()
        if isinstance(source, Transfer):
            return self._prefetch_staged(op, source, slot, after)
        self._hazards.refuse_on_host(op.name, source)
        self._hazards.lend(op.name, source)
        return self._start_prefetch(op, source, slot, after)

    def prefetch_ahead(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Token]) -> Transfer:
        self._engine.check_usable()
        self._hazards.refuse_on_host(op.name, source)
        return self._start_prefetch(op, source, slot, after, ahead=True)

    def holds(self, transfer: Transfer) -> bool:
        return not self._engine.in_step and self._hazards.held(transfer)

    def _prefetch_staged(self, op: Op, stage: Transfer, slot: Slot, after: Sequence[Token]) -> Transfer:
        staged = self._hazards.staged(stage, op.name)
        started = self._start_prefetch(op, self._pinned.view(staged.slot), slot, after, stage)
        staged.occupancy.released = started.access
        return started

    def _start_prefetch(
        self,
        op: Op,
        rows: torch.Tensor,
        slot: Slot,
        after: Sequence[Token],
        stage: Transfer | None = None,
        *,
        ahead: bool = False,
    ) -> Transfer:
        _check_rows(op, rows, slot)
        access = self._hazards.prefetch(op.name, after, ahead=ahead)
        occupancy = Occupancy(op.name, slot.offset, slot.nbytes)
        self._hazards.occupy(occupancy, access)
        value = DeviceTensor(access, occupancy=occupancy, arrived=False)
        work = partial(self._work.fill_slot, op, value, rows, self._ring.view(slot))
        waits, done = _done(after), threading.Event()
        if stage is not None and stage.staged is not None:
            work = partial(self._unstage, work, stage.staged.occupancy)
            waits = (*waits, *_done([stage]))
        kind = "prefetch_ahead" if ahead else "prefetch"
        transfer = Transfer(op.name, kind, access, self._hazards.clocks.now(UP), value, done, carried=ahead)
        task = Task(op, work, waits=waits, done=done, on_failure=transfer.fail if ahead else None)
        self._engine.submit(UP, task, carried=ahead)
        return transfer

    def _unstage(self, copy: Callable[[], None], occupancy: Occupancy) -> None:
        """Copy from the pinned ring, whose bytes then hold nothing valid any more."""
        copy()
        self._pinned.poison([occupancy])

    def wait(self, op: Op, transfer: Transfer) -> Any:
        self._engine.check_usable()
        transfer, values = self._hazards.waited(transfer, op.name)
        self._hazards.clocks.merge(COMPUTE, transfer.clock)
        access = self._hazards.clocks.issue(COMPUTE, op.name)
        for value in values:
            self._hazards.use(value, access)
        if transfer.done is not None:
            name, work = (Op(transfer.node), transfer.check) if transfer.carried else (op, None)
            self._engine.submit(COMPUTE, Task(name, work, waits=(transfer.done,)))
        return list(values) if transfer.value is None else transfer.value

    def release(self, op: Op, transfer: Transfer) -> Token:
        self._engine.check_usable()
        occupancy = self._hazards.release(transfer, op.name)
        done = threading.Event()
        self._engine.submit(COMPUTE, Task(op, partial(self._ring.poison, [occupancy]), done=done))
        return Token(op.name, self._hazards.clocks.now(COMPUTE), done)

    def to_host(self, op: Op, value: Value | Sequence[Value]) -> Transfer:
        self._engine.check_usable()
        single = not isinstance(value, list | tuple)
        values: list[Value] = [value] if single else list(value)
        access = self._hazards.download(op.name, values)
        self.counters.trips_down += 1
        clock, done = self._hazards.clocks.now(DOWN), threading.Event()
        transfer = Transfer(op.name, "to_host", access, clock, done=done, single=single)
        work = partial(self._work.copy_down, op, values, transfer)
        issued = self._engine.marker(COMPUTE, op)
        self._engine.submit(DOWN, Task(op, work, waits=(issued,), done=done))
        return transfer

    def wait_host(self, op: Op, transfer: Transfer) -> Any:
        self._engine.check_usable()
        transfer = self._hazards.started(transfer, op.name, ("to_host",))
        if transfer.done is not None:
            transfer.done.wait()
        start_s = time.perf_counter()
        self._raise_failure()
        self._hazards.clocks.merge(HOST, transfer.clock)
        self._engine.pace(op, HOST, start_s)
        if transfer.host_tensors is None:
            raise ScheduleError(f"{op.name} waits for {transfer.node}, whose step was aborted")
        return transfer.host_tensors[0] if transfer.single else transfer.host_tensors

    def to_accelerator(self, op: Op, tensors: Sequence[torch.Tensor]) -> Transfer:
        self._engine.check_usable()
        self._hazards.refuse_on_host(op.name, tensors)
        for tensor in tensors:
            self._hazards.lend(op.name, tensor)
        self.counters.trips_up += 1
        if sum(map(span_bytes, tensors)) <= SMALL_UPLOAD_BYTES:
            return self._lend(op, tensors)
        access, done = self._hazards.upload(op.name), threading.Event()
        values = [DeviceTensor(access, arrived=False) for _ in tensors]
        self._engine.submit(UP, Task(op, partial(self._work.copy_all_up, op, values, tensors), done=done))
        return Transfer(op.name, "to_accelerator", access, self._hazards.clocks.now(UP), values=values, done=done)

    def _lend(self, op: Op, tensors: Sequence[torch.Tensor]) -> Transfer:
        """Small tensors are read where they lie; the values keep the host's tensors alive."""
        access = self._hazards.clocks.issue(HOST, op.name)
        values = [DeviceTensor(access, borrowed=True, arrived=False) for _ in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            value.data = tensor.detach()
            self._ledger.hold(tensor, op.category, nbytes=0)
            self._ledger.uploaded(op.category, span_bytes(tensor))
        if self._engine.paced:  # the device takes its time to read them
            self._engine.submit(COMPUTE, Task(op, _nothing))
        return Transfer(op.name, "to_accelerator", access, self._hazards.clocks.now(HOST), values=values)

    def launch(
        self,
        op: Op,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        outputs: int | None = None,
        mutates: tuple[int, ...] = (),
    ) -> Any:
        self._engine.check_usable()
        access = self._hazards.clocks.issue(COMPUTE, op.name)
        self._hazards.use_arguments(args, access)
        self._hazards.require_tensors(op.name, args, op.tensors)
        for position in mutates:
            self._hazards.mutate(args[position], access)
        results = [DeviceTensor(access) for _ in range(1 if outputs is None else outputs)]
        call = Call(function, args, tuple(args[i] for i in mutates), results, outputs is None)
        work = partial(self._work.call, op, call, self._issued(access))
        self._engine.submit(COMPUTE, Task(op, work, Modes.current()))
        return results[0] if outputs is None else results

    def host(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._engine.check_usable()
        self._hazards.refuse_on_host(op.name, (args, kwargs))
        self._hazards.clocks.issue(HOST, op.name)
        start_s = time.perf_counter()
        result = call_on_host(op, function, args, kwargs)
        self._engine.account(op, HOST, start_s)
        return result

    # ---- life --------------------------------------------------------------------------------------
    def trace(self, enabled: bool) -> list[Span]:
        self._engine.check_usable()
        return self._engine.trace(enabled)

    def close(self) -> None:
        if self._engine.close():
            self._pins.close()
            self._ring = Ring()
            self._pinned = Ring()


def _uploaded_before(op: Op, into: Value, source: torch.Tensor) -> DeviceTensor:
    if not isinstance(into, DeviceTensor) or into.data is UNFINISHED:
        raise ScheduleError(f"{op.name} overwrites {into!r}, which was not uploaded before")
    if not same_geometry(into.tensor(), source):
        raise ScheduleError(f"{op.name} overwrites {into.node}, whose dtype, size or stride differs")
    return into


def _nothing() -> None:
    pass


def _done(started: Sequence[Token | Transfer]) -> tuple[threading.Event, ...]:
    """Events of what a task has to wait for."""
    return tuple(one.done for one in started if one.done is not None)


def _check_rows(op: Op, source: torch.Tensor, slot: Slot) -> None:
    if not has_lines(source) or source.dtype != slot.dtype or source.shape != slot.shape:
        raise ScheduleError(
            f"{op.name} copies {source.dtype} {tuple(source.shape)} with strides {source.stride()} "
            f"into a slot of {slot.dtype} {slot.shape}; rows must be contiguous and of one type"
        )
