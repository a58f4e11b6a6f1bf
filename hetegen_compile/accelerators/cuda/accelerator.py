"""``CudaAccelerator``: the methods of the contract over one CUDA device.

Values are CUDA tensors. The rules of a schedule that the emulated accelerator checks are not
checked here, beyond what costs nothing; work that fails is reported by the call that meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hetegen_compile.accelerators.base import (
    NOTHING_KNOWN,
    Accelerator,
    LaunchChain,
    Op,
    StepFacts,
    Value,
    call_on_host,
)
from hetegen_compile.accelerators.choice import require_cuda
from hetegen_compile.accelerators.counters import Counters
from hetegen_compile.accelerators.cuda.activations import Activations
from hetegen_compile.accelerators.cuda.ahead import Ahead
from hetegen_compile.accelerators.cuda.allocator import (
    Excess,
    Unclaimed,
    beside_allocator_bytes,
    overhead_bytes,
    reserved_now_bytes,
)
from hetegen_compile.accelerators.cuda.gates import why_no_gates
from hetegen_compile.accelerators.cuda.lending import Lending
from hetegen_compile.accelerators.cuda.pinning import SUCCESS, CudaHostMemory, pinned_by_others
from hetegen_compile.accelerators.cuda.prefetches import Prefetches
from hetegen_compile.accelerators.cuda.replays import Replays
from hetegen_compile.accelerators.cuda.streams import CudaStreams, copying
from hetegen_compile.accelerators.cuda.transfers import CudaToken, CudaTransfer, started
from hetegen_compile.accelerators.geometry import copy_span, empty_result, empty_twin, same_geometry, span_bytes
from hetegen_compile.accelerators.growing import Grown, empty_cache, lengthened, lengthening, note
from hetegen_compile.accelerators.ledger import MemoryLedger, PinTable
from hetegen_compile.accelerators.promises import Promise
from hetegen_compile.accelerators.ring import Slot
from hetegen_compile.errors import AcceleratorError, ScheduleError
from hetegen_compile.geometry import storage_id
from hetegen_compile.rows import Span


class CudaAccelerator(Accelerator):
    """The current CUDA device, used through three streams of the accelerator's own.

    ``counters.held_bytes`` counts the ring and what ``upload`` and ``to_accelerator`` allocated; everything
    else comes from torch's allocator, whose reserved bytes are ``counters.peak_bytes`` after a step.

    Args:
        memory_bytes: device memory that may be used; default: what is free now.

    Raises:
        AcceleratorUnavailableError: this torch has no CUDA, or there is no device or driver.
    """

    kind = "cuda"
    streams_of: Callable[[torch.device], CudaStreams] = CudaStreams
    """Makes the streams of a device."""

    def __init__(self, memory_bytes: int | None = None) -> None:
        require_cuda()
        self.device = _current_device()
        torch.cuda.empty_cache()  # what torch keeps without using it is neither free nor somebody else's
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        self.memory_bytes = free_bytes if memory_bytes is None else min(memory_bytes, free_bytes)
        self.counters = Counters()
        self._ledger = MemoryLedger(self.counters, self.memory_bytes)
        self._reserved_before = torch.cuda.memory_reserved(self.device)
        memory = CudaHostMemory(self.device)
        self._pins = PinTable(memory.register, memory.unregister)
        self._streams = self.streams_of(self.device)
        self._prefetches = Prefetches(self._streams, self._ledger)
        lending = Lending(self.device)
        self._activations = Activations(self._streams, self._ledger, lending)
        self._ahead = Ahead(self._streams, self._ledger, lending)
        self._replays = Replays(self.device, self.counters)
        self._unclaimed = Unclaimed(self.device)
        self._excess, self._last_step_bytes = Excess(), 0
        self._overhead_bytes = sum(overhead_bytes(self.device).values())
        self._in_step = False
        self._closed = False

    @property
    def cannot_issue_ahead(self) -> str:
        return why_no_gates()

    @property
    def cannot_record(self) -> str:
        return self._replays.refusal

    @property
    def gated(self) -> bool:
        """Whether the step under way closes gates."""
        return self._ahead.gated

    @property
    def pinned_bytes(self) -> int:
        return self._pins.pinned_bytes + self._prefetches.pinned.nbytes

    # ---- memory ------------------------------------------------------------------------------------
    def upload(self, op: Op, source: torch.Tensor, *, into: Value | None = None) -> torch.Tensor:
        self._check_open()
        if into is not None and not same_geometry(into, source):
            raise ScheduleError(f"{op.name} overwrites a tensor whose dtype, size or stride differs")
        streams = self._streams
        with streams.work(op), streams.tracer.stream_span(op.name, "up", streams.compute), copying():
            target = into
            if target is None:
                self._ledger.require(op.name, span_bytes(source))
                target = empty_twin(source, self.device)
                self._ledger.hold(target, op.category)
            self._activations.fill(target, source)
        self._ledger.uploaded(op.category, span_bytes(source))
        return target

    def download(self, op: Op, value: Value) -> torch.Tensor:
        self._check_open()
        streams = self._streams
        with streams.work(op), streams.tracer.stream_span(op.name, "down", streams.compute), copying():
            result = empty_result(value)
            copy_span(result, value)
        self._ledger.downloaded(op.category, span_bytes(value))
        return result

    def share_memory(self, one: Value, other: Value) -> bool:
        return storage_id(one) == storage_id(other)

    def limit_memory(self, nbytes: int) -> None:
        self._ledger.limit_bytes = nbytes

    def available_bytes(self) -> int:
        """What is reserved by torch's allocator is ours; the driver says what is free beside it."""
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        return int(free_bytes) + torch.cuda.memory_reserved(self.device) - self._reserved_before

    def overhead_bytes(self) -> Mapping[str, int]:
        return overhead_bytes(self.device)

    @property
    def beside_bytes(self) -> int:
        return beside_allocator_bytes(self.device)

    def reserve_ring(self, nbytes: int) -> None:
        self._check_open()
        ring = self._prefetches.ring
        if nbytes == ring.nbytes:
            return
        self.synchronize()
        self._prefetches.give_up()
        self._ledger.require("the staging ring", nbytes - ring.nbytes)
        with self._streams.work(Op("reserve_ring")):
            ring.resize(nbytes)
        self._ledger.hold(ring.buffer, "slots")
        self.synchronize()  # the up stream may write to it from here on

    def slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        self._check_open()
        return self._prefetches.ring.slot(offset, shape, dtype)

    def pin(self, owner: object, address: int, nbytes: int) -> int:
        self._check_open()
        code = self._pins.pin(owner, address, nbytes)
        return SUCCESS if code != SUCCESS and pinned_by_others(address, nbytes) else code

    def reserve_pinned(self, nbytes: int) -> None:
        self._check_open()
        if nbytes <= self._prefetches.pinned.nbytes:
            return
        self.synchronize()
        with self._streams.work(Op("the pinned ring")):
            self._prefetches.pinned.resize(nbytes)

    def pinned_slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        self._check_open()
        return self._prefetches.pinned.slot(offset, shape, dtype)

    # ---- steps -------------------------------------------------------------------------------------
    def begin_step(self, carried: Sequence[CudaTransfer] = (), facts: StepFacts = NOTHING_KNOWN) -> None:
        self._check_open()
        for transfer in carried:
            if not self.holds(transfer):
                raise ScheduleError(f"begin_step takes over {transfer.node}, which is not held for it")
        self.abandon_step()
        self._prefetches.take_over(carried)
        limit_bytes = self._ledger.limit_bytes + self._overhead_bytes
        self._excess.give_back(self._last_step_bytes, limit_bytes, self._held_now_bytes)
        self._ledger.begin_step()
        opened = self._replays.wants_open_gates(facts.chains)
        gated = facts.again and not opened and facts.needs_bytes <= self._unclaimed.nbytes()
        self._in_step = True
        self._streams.begin_step()
        self._ahead.begin_step(gated=gated, in_turn=facts.in_turn)
        self._replays.begin_step(again=facts.again, gated=gated)

    def end_step(self) -> None:
        self._check_open()
        self._ahead.finish_step()
        self._prefetches.drain()
        if self._prefetches.under_way:
            self._streams.synchronize_step()
        else:
            self._streams.synchronize()
        self._streams.end_step()
        self._activations.finish_step()
        self._in_step = False
        self._prefetches.finish_step()
        self._note_reserved()

    def _note_reserved(self) -> None:
        """The step's peak: what torch's allocator has reserved since; it gives nothing back while a step runs.

        Its own peak is not used: calibration, or whatever ran before, may have reached it.
        """
        self._last_step_bytes = self.counters.step_peak_bytes = self._held_now_bytes()
        self.counters.peak_bytes = max(self.counters.peak_bytes, self.counters.step_peak_bytes)

    def _held_now_bytes(self) -> int:
        return max(0, reserved_now_bytes(self.device) - self._reserved_before)

    def abandon_step(self) -> None:
        if self._in_step:
            self._ahead.abandon_step()
            self.synchronize()
            self._streams.end_step()
            self._activations.finish_step()
            self._prefetches.abandon_step()
            self._in_step = False

    def synchronize(self) -> None:
        self._check_open()
        self._prefetches.drain()
        self._streams.synchronize()

    # ---- operations of a schedule --------------------------------------------------------------------
    def stage(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[CudaTransfer]) -> CudaTransfer:
        self._check_open()
        return self._prefetches.stage(op, source, slot, after)

    def prefetch(
        self, op: Op, source: torch.Tensor | CudaTransfer, slot: Slot, after: Sequence[CudaToken]
    ) -> CudaTransfer:
        self._check_open()
        if isinstance(source, CudaTransfer):
            return self._prefetches.start_staged(op, source, slot, after)
        return self._prefetches.start(op, source, slot, after)

    def prefetch_ahead(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[CudaToken]) -> CudaTransfer:
        self._check_open()
        return self._prefetches.start_ahead(op, source, slot, after)

    def holds(self, transfer: CudaTransfer) -> bool:
        return not self._in_step and self._prefetches.holds(transfer)

    def wait(self, op: Op, transfer: CudaTransfer) -> Value:
        self._check_open()
        transfer = started(op, transfer, ("prefetch", "to_accelerator"))
        transfer.issued()
        if transfer.gate is not None:
            self._ahead.wait(op, transfer)
        if transfer.event is not None:
            self._streams.compute.wait_event(transfer.event)
        return transfer.value

    def release(self, op: Op, transfer: CudaTransfer) -> CudaToken:
        self._check_open()
        return self._prefetches.release(op, transfer)

    def to_host(self, op: Op, value: Value | Sequence[Value]) -> CudaTransfer:
        self._check_open()
        return self._activations.to_host(op, value)

    def wait_host(self, op: Op, transfer: CudaTransfer) -> Any:
        self._check_open()
        self._ahead.raise_failure()
        return self._activations.wait_host(op, transfer)

    def to_accelerator(self, op: Op, tensors: Sequence[torch.Tensor]) -> CudaTransfer:
        self._check_open()
        return self._activations.to_accelerator(op, tensors)

    def new_cache(self, op: Op, like: torch.Tensor, tokens: int) -> torch.Tensor:
        self._check_open()
        where = Grown.of(like, tokens)
        with self._streams.work(op):
            result = empty_cache(like, where.block.tokens, self.device)
        note(result, where)
        return result

    def lengthen(self, op: Op, value: Value, tokens: int) -> torch.Tensor:
        self._check_open()
        where = lengthening(op.name, value, tokens)
        result = lengthened(value, where.tokens)
        note(result, where)
        return result

    def close_no_gates(self) -> None:
        self._ahead.gated = False

    def launch(
        self,
        op: Op,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        outputs: int | None = None,
        mutates: tuple[int, ...] = (),
    ) -> Any:
        self._check_open()
        streams = self._streams
        try:
            if streams.tracer.enabled:
                with streams.tracer.stream_span(op.name, "accelerator", streams.compute):
                    returned = function(*args)
            else:
                returned = function(*args)
        except AcceleratorError:
            raise
        except RuntimeError as error:
            raise streams.failure(op, error) from error
        return returned if outputs is None else list(returned)

    def launch_chain(self, chain: LaunchChain, given: list[Value]) -> tuple[Any, ...]:
        self._check_open()
        if self._streams.tracer.enabled:  # each launch has a span of its own
            return chain.function(given)
        try:
            return self._replays.launch(chain, given)
        except AcceleratorError:
            raise
        except RuntimeError as error:
            raise self._streams.failure(Op(chain.name), error) from error

    def host(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_open()
        _refuse_values(op, args, kwargs, (CudaTransfer, Promise))
        with self._streams.tracer.host_span(op):
            return call_on_host(op, function, args, kwargs)

    def receive(self, op: Op, transfer: CudaTransfer) -> Promise:
        self._check_open()
        return self._ahead.receive(op, transfer)

    def host_ahead(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Promise:
        self._check_open()
        _refuse_values(op, args, kwargs, (CudaTransfer,))
        return self._ahead.host_ahead(op, function, args, kwargs)

    def deliver(self, op: Op, promises: Sequence[Promise], like: Sequence[torch.Tensor]) -> CudaTransfer:
        self._check_open()
        return self._ahead.deliver(op, promises, like)

    def caught_up(self, op: Op, transfer: CudaTransfer) -> None:
        self._check_open()
        self._ahead.caught_up(op, transfer)

    # ---- life --------------------------------------------------------------------------------------
    def trace(self, enabled: bool) -> list[Span]:
        self._check_open()
        return self._streams.tracer.collect(enabled)

    def rest(self) -> None:
        if not self._closed:
            self._ahead.close()
            self._prefetches.end_thread()
            torch.cuda.synchronize(self.device)
            self._activations.close()
            self._prefetches.close()

    def close(self) -> None:
        self.rest()
        if not self._closed:
            self._pins.close()
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise AcceleratorError("the accelerator is closed")


def _refuse_values(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], refused: tuple[type, ...]) -> None:
    """An operation of the host gets no value of the accelerator, nor what is still under way."""
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, refused) or (isinstance(argument, torch.Tensor) and argument.is_cuda):
            raise ScheduleError(f"{op.name} runs on the host but gets a value of the accelerator or of the worker")


def _current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
