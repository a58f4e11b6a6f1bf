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

from hetegen_compile.accelerators.base import (
    NOTHING_KNOWN,
    Accelerator,
    Op,
    StepFacts,
    Value,
    call_on_host,
)
from hetegen_compile.accelerators.counters import Counters
from hetegen_compile.accelerators.emulated.activations import Activations
from hetegen_compile.accelerators.emulated.ahead import Ahead
from hetegen_compile.accelerators.emulated.clocks import COMPUTE, HOST, UP, Access
from hetegen_compile.accelerators.emulated.engine import Engine
from hetegen_compile.accelerators.emulated.hazards import Hazards
from hetegen_compile.accelerators.emulated.prefetches import Prefetches
from hetegen_compile.accelerators.emulated.streams import Task
from hetegen_compile.accelerators.emulated.values import UNFINISHED, DeviceTensor, HostPromise, Token, Transfer
from hetegen_compile.accelerators.emulated.work import Call, DeviceWork, Issued, lengthened_and_poisoned
from hetegen_compile.accelerators.geometry import same_geometry
from hetegen_compile.accelerators.growing import Grown, lengthening, note
from hetegen_compile.accelerators.ledger import MemoryLedger, PinTable
from hetegen_compile.accelerators.modes import Modes
from hetegen_compile.accelerators.ring import Slot
from hetegen_compile.errors import ScheduleError
from hetegen_compile.geometry import storage_id
from hetegen_compile.rows import Span

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
        self._hazards = Hazards()
        self._work = DeviceWork(self._ledger)
        self._engine = Engine(pace, seed)
        self._prefetches = Prefetches(self._engine, self._hazards, self._work)
        self._activations = Activations(self._engine, self._hazards, self._work, self._ledger)
        self._ahead = Ahead(self._engine, self._hazards, self._ledger)

    @property
    def usable(self) -> bool:
        """False after ``close``, in a forked child, and once a worker thread has died."""
        return self._engine.why_unusable() is None

    @property
    def pinned_bytes(self) -> int:
        return self._pins.pinned_bytes + self._prefetches.pinned.nbytes

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

    def share_memory(self, one: Value, other: Value) -> bool:
        self._engine.check_usable()
        self._engine.marker(COMPUTE, Op("where values lie")).wait()
        return storage_id(one.tensor()) == storage_id(other.tensor())

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
        if nbytes == self._prefetches.ring.nbytes:
            return
        self.synchronize()
        self._ledger.require("the staging ring", nbytes - self._prefetches.ring.nbytes)
        self._hazards.restart("reserve_ring")
        self._prefetches.ring.resize(nbytes)
        self._ledger.hold(self._prefetches.ring.buffer, "slots")

    def slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        self._engine.check_usable()
        return self._prefetches.ring.slot(offset, shape, dtype)

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
        if nbytes <= self._prefetches.pinned.nbytes:
            return
        self.synchronize()
        self._hazards.restart("reserve_pinned")
        self._prefetches.pinned.resize(nbytes)

    def pinned_slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        self._engine.check_usable()
        return self._prefetches.pinned.slot(offset, shape, dtype)

    # ---- steps -------------------------------------------------------------------------------------
    def begin_step(self, carried: Sequence[Transfer] = (), facts: StepFacts = NOTHING_KNOWN) -> None:
        self._engine.check_usable()
        self.abandon_step()
        self._finish_step()
        self._work.aliases.clear()
        kept = [self._hazards.take_over(transfer) for transfer in carried]
        self._prefetches.give_up(*self._hazards.restart("begin_step", kept))
        self._ledger.begin_step()
        self._ahead.begin_step(gated=facts.again)
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
        self._prefetches.give_up(*self._hazards.restart(reason))

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
        return self._prefetches.stage(op, source, slot, after)

    def prefetch(self, op: Op, source: torch.Tensor | Transfer, slot: Slot, after: Sequence[Token]) -> Transfer:
        self._engine.check_usable()
        if isinstance(source, Transfer):
            return self._prefetches.start_staged(op, source, slot, after)
        return self._prefetches.start(op, source, slot, after)

    def prefetch_ahead(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Token]) -> Transfer:
        self._engine.check_usable()
        return self._prefetches.start_ahead(op, source, slot, after)

    def holds(self, transfer: Transfer) -> bool:
        return not self._engine.in_step and self._hazards.held(transfer)

    def wait(self, op: Op, transfer: Transfer) -> Any:
        self._engine.check_usable()
        transfer, values = self._hazards.waited(transfer, op.name)
        self._hazards.clocks.merge(COMPUTE, transfer.clock)
        access = self._hazards.clocks.issue(COMPUTE, op.name)
        for value in values:
            self._hazards.use(value, access)
        self._ahead.waits(transfer)
        if transfer.done is not None:
            name, work = (Op(transfer.node), transfer.check) if transfer.carried else (op, None)
            self._engine.submit(COMPUTE, Task(name, work, waits=(transfer.done,)))
        return list(values) if transfer.value is None else transfer.value

    def release(self, op: Op, transfer: Transfer) -> Token:
        self._engine.check_usable()
        return self._prefetches.release(op, transfer)

    def to_host(self, op: Op, value: Value | Sequence[Value]) -> Transfer:
        self._engine.check_usable()
        return self._activations.to_host(op, value)

    def wait_host(self, op: Op, transfer: Transfer) -> Any:
        self._engine.check_usable()
        transfer = self._activations.wait_host(op, transfer)
        start_s = time.perf_counter()
        self._raise_failure()
        return self._activations.received(op, transfer, start_s)

    def to_accelerator(self, op: Op, tensors: Sequence[torch.Tensor]) -> Transfer:
        self._engine.check_usable()
        return self._activations.to_accelerator(op, tensors)

    def new_cache(self, op: Op, like: torch.Tensor, tokens: int) -> DeviceTensor:
        self._engine.check_usable()
        result, where = DeviceTensor(self._hazards.clocks.issue(COMPUTE, op.name)), Grown.of(like, tokens)
        note(result, where)
        work = partial(self._work.new_cache, op, result, like, where.block)
        self._engine.submit(COMPUTE, Task(op, work, Modes.current()))
        return result

    def lengthen(self, op: Op, value: Value, tokens: int) -> DeviceTensor:
        where = lengthening(op.name, value, tokens)
        result: DeviceTensor = self.launch(op, lengthened_and_poisoned, (value, where.tokens))
        note(result, where)
        return result

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
        written = tuple(args[i] for i in mutates)
        call = Call(function, args, written, results, outputs is None, self._ahead.behind_gates)
        work = partial(self._work.call, op, call, self._issued(access))
        self._engine.submit(COMPUTE, Task(op, work, Modes.current()))
        return results[0] if outputs is None else results

    def host(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._engine.check_usable()
        self._hazards.refuse_on_host(op.name, (args, kwargs))
        self._hazards.clocks.issue(HOST, op.name)
        start_s = time.perf_counter()
        result = call_on_host(op, function, args, kwargs)
        self._engine.account(op, HOST, start_s)
        return result

    def receive(self, op: Op, transfer: Transfer) -> HostPromise:
        self._engine.check_usable()
        return self._ahead.receive(op, transfer)

    def host_ahead(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostPromise:
        self._engine.check_usable()
        return self._ahead.host_ahead(op, function, args, kwargs)

    def deliver(self, op: Op, promises: Sequence[HostPromise], like: Sequence[torch.Tensor]) -> Transfer:
        self._engine.check_usable()
        return self._ahead.deliver(op, promises, like)

    def caught_up(self, op: Op, transfer: Transfer) -> None:
        self._engine.check_usable()
        self._ahead.caught_up(op, transfer)
        self._raise_failure()

    # ---- life --------------------------------------------------------------------------------------
    def trace(self, enabled: bool) -> list[Span]:
        self._engine.check_usable()
        return self._engine.trace(enabled)

    def rest(self) -> None:
        if self.usable:
            self._engine.rest()
            self._hazards.clocks.join()
            self._hazards.restart("rest")
            self._free_rings()

    def close(self) -> None:
        if self._engine.close():
            self._pins.close()
            self._free_rings()

    def _free_rings(self) -> None:
        self._prefetches.ring.resize(0)
        self._prefetches.pinned.resize(0)


def _uploaded_before(op: Op, into: Value, source: torch.Tensor) -> DeviceTensor:
    if not isinstance(into, DeviceTensor) or into.data is UNFINISHED:
        raise ScheduleError(f"{op.name} overwrites {into!r}, which was not uploaded before")
    if not same_geometry(into.tensor(), source):
        raise ScheduleError(f"{op.name} overwrites {into.node}, whose dtype, size or stride differs")
    return into
