"""A CUDA device as accelerator.

Unverified on a GPU: this module was written on machines without one and is verified only once
benchmarks/gpu has run on a device (ordering, asynchrony of copies from registered memory, views of pinned
buffers).

``compute`` is the caller's current stream; ``up`` and ``down`` are streams of the accelerator's own; staged
weights go up from the pin thread (``cuda_staging``). Values
are CUDA tensors. The rules of a schedule that the emulated accelerator checks are not checked here, beyond
what costs nothing; work that fails is reported by the call that meets it.
"""

from __future__ import annotations

import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hetegen_compile.accelerators.base import Accelerator, Counters, Op, Span, Value, call_on_host
from hetegen_compile.accelerators.cuda_copies import upload_lines
from hetegen_compile.accelerators.cuda_lending import Lending
from hetegen_compile.accelerators.cuda_pinning import SUCCESS, CudaHostMemory, pinned_by_others
from hetegen_compile.accelerators.cuda_staging import Job, PinThread, copy_rows
from hetegen_compile.accelerators.cuda_trace import CudaTracer
from hetegen_compile.accelerators.geometry import copy_span, empty_twin, has_lines, same_geometry, span, span_bytes
from hetegen_compile.accelerators.ledger import MemoryLedger, PinTable
from hetegen_compile.accelerators.ring import make_slot, slot_view
from hetegen_compile.accelerators.values import Slot
from hetegen_compile.errors import (
    AcceleratorError,
    AcceleratorMemoryError,
    AcceleratorUnavailableError,
    ScheduleError,
    SlotInUseError,
)
from hetegen_compile.ir import SMALL_UPLOAD_BYTES

ALLOCATOR_BLOCK_BYTES = (20 << 20) + (2 << 20)
"""Torch's allocator reserves in blocks: of 2 MiB for tensors below 1 MiB, of 20 MiB for those up to 10 MiB. For each
stream that tensors are made on (compute, up) the last of them are rarely full."""


@dataclass(eq=False)
class CudaTransfer:
    """A started copy: its result, what it reads (kept alive), and its event (None: readable at once).

    ``job`` is the pin thread's part, which sets the event of a prefetch that reads the pinned ring. ``reader``
    names the prefetch that reads a stage. A prefetch for the next step keeps nothing alive: a finalizer completes
    it before its source's memory is freed. ``ring`` is the buffer that its slot lies in.
    """

    node: str
    kind: str
    value: Any
    source: Any
    event: torch.cuda.Event | None = None
    released_by: str | None = None
    ring: torch.Tensor | None = None
    job: Job | None = None
    reader: str | None = None

    def issued(self) -> None:
        """Block until the pin thread has done its part."""
        if self.job is not None:
            self.job.result()


@dataclass(frozen=True)
class CudaToken:
    """What ``release`` leaves behind: compute's event at that point."""

    node: str
    event: torch.cuda.Event


def beside_allocator_bytes(device: torch.device | int) -> int:
    """Bytes of a GPU in use beside torch's allocator: the CUDA context, libraries' own memory, other processes.

    The driver's figures and the allocator's are not read at one instant, hence never less than 0.
    """
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return max(0, int(total_bytes) - int(free_bytes) - torch.cuda.memory_reserved(device))


class CudaAccelerator(Accelerator):
    """The current CUDA device, used through its current stream and two streams beside it.

    ``counters.held_bytes`` counts the ring and what ``upload`` and ``to_accelerator`` allocated; everything
    else comes from torch's allocator, whose peak of reserved bytes is ``counters.peak_bytes`` after a step.

    Args:
        memory_bytes: device memory that may be used; default: what is free now.

    Raises:
        AcceleratorUnavailableError: this torch has no CUDA, or there is no device or driver.
    """

    kind = "cuda"

    def __init__(self, memory_bytes: int | None = None) -> None:
        _require_device()
        self.device = _current_device()
        torch.cuda.empty_cache()  # what torch keeps without using it is neither free nor somebody else's
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        self.memory_bytes = free_bytes if memory_bytes is None else min(memory_bytes, free_bytes)
        self.counters = Counters()
        self._ledger = MemoryLedger(self.counters, self.memory_bytes)
        self._reserved_before = torch.cuda.memory_reserved(self.device)
        memory = CudaHostMemory(self.device)
        self._pins = PinTable(memory.register, memory.unregister)
        self._tracer = CudaTracer(self.device)
        self._up = torch.cuda.Stream(self.device)
        self._down = torch.cuda.Stream(self.device)
        self._ring = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._views: dict[Slot, torch.Tensor] = {}
        self._pinned_ring = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pinned_views: dict[Slot, torch.Tensor] = {}
        self._pin_thread = PinThread(partial(torch.cuda.set_device, self.device))
        self._staged: list[CudaTransfer] = []
        self._kept: list[torch.Tensor] = []
        self._lending = Lending(self.device)
        self._ahead: list[CudaTransfer] = []
        self._guards: deque[tuple[torch.cuda.Event, weakref.finalize[..., torch.UntypedStorage]]] = deque()
        self._uploaded: torch.cuda.Event | None = None
        self._in_step = False
        self._closed = False

    @property
    def pinned_bytes(self) -> int:
        return self._pins.pinned_bytes + self._pinned_ring.numel()

    @property
    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    # ---- memory ------------------------------------------------------------------------------------
    def upload(self, op: Op, source: torch.Tensor, *, into: Value | None = None) -> torch.Tensor:
        self._check_open()
        if into is not None and not same_geometry(into, source):
            raise ScheduleError(f"{op.name} overwrites a tensor whose dtype, size or stride differs")
        with self._work(op), self._tracer.stream_span(op.name, "up", self._compute), _copying():
            target = into
            if target is None:
                self._ledger.require(op.name, span_bytes(source))
                target = empty_twin(source, self.device)
                self._ledger.hold(target, op.category)
            if 0 < span_bytes(source) <= SMALL_UPLOAD_BYTES:
                self._read_in_place(target, source)
            else:
                copy_span(target, source)  # blocks until the source was read
        self._ledger.uploaded(op.category, span_bytes(source))
        return target

    def _read_in_place(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """A kernel reads a pinned copy: the copy engine may have prefetches queued that take longer than a step's rest.

        An operation of its own kind, because ``copy_`` between two addresses of the device may use that engine.
        """
        (lent,) = self._lending.lend([source])
        torch.bitwise_or(span(lent).view(torch.uint8), 0, out=span(target).view(torch.uint8))

    def download(self, op: Op, value: Value) -> torch.Tensor:
        self._check_open()
        with self._work(op), self._tracer.stream_span(op.name, "down", self._compute), _copying():
            result = empty_twin(value, torch.device("cpu"))
            copy_span(result, value)
        self._ledger.downloaded(op.category, span_bytes(value))
        return result

    def limit_memory(self, nbytes: int) -> None:
        self._ledger.limit_bytes = nbytes

    def available_bytes(self) -> int:
        """What is reserved by torch's allocator is ours; the driver says what is free beside it."""
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        return int(free_bytes) + torch.cuda.memory_reserved(self.device) - self._reserved_before

    def overhead_bytes(self) -> Mapping[str, int]:
        return {
            "cuBLAS workspace": cublas_workspace_bytes(torch.cuda.get_device_capability(self.device)),
            "rounding of torch's allocator": 2 * ALLOCATOR_BLOCK_BYTES,
        }

    @property
    def beside_bytes(self) -> int:
        return beside_allocator_bytes(self.device)

    def reserve_ring(self, nbytes: int) -> None:
        self._check_open()
        if nbytes == self._ring.numel():
            return
        self.synchronize()
        self._ledger.require("the staging ring", nbytes - self._ring.numel())
        self._views.clear()
        self._ring = torch.empty(0, dtype=torch.uint8, device=self.device)
        with self._work(Op("reserve_ring")), torch.inference_mode(False):
            self._ring = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=self.device)
        self._ledger.hold(self._ring, "slots")
        self.synchronize()  # the up stream may write to it from here on

    def slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        self._check_open()
        slot = make_slot(self._ring.numel(), offset, shape, dtype)
        self._view(slot)
        return slot

    def _view(self, slot: Slot) -> torch.Tensor:
        view = self._views.get(slot)
        if view is None:
            with torch.inference_mode(False):
                view = self._views[slot] = slot_view(self._ring, slot)
        return view

    def pin(self, owner: object, address: int, nbytes: int) -> int:
        self._check_open()
        code = self._pins.pin(owner, address, nbytes)
        return SUCCESS if code != SUCCESS and pinned_by_others(address, nbytes) else code

    def reserve_pinned(self, nbytes: int) -> None:
        self._check_open()
        if nbytes <= self._pinned_ring.numel():
            return
        self.synchronize()
        self._pinned_views.clear()
        with self._work(Op("the pinned ring")), torch.inference_mode(False):
            geometry = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            self._pinned_ring = empty_twin(geometry, torch.device("cpu"), pinned=True)

    def pinned_slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        self._check_open()
        slot = make_slot(self._pinned_ring.numel(), offset, shape, dtype)
        self._pinned_view(slot)
        return slot

    def _pinned_view(self, slot: Slot) -> torch.Tensor:
        view = self._pinned_views.get(slot)
        if view is None:
            with torch.inference_mode(False):
                view = self._pinned_views[slot] = slot_view(self._pinned_ring, slot)
        return view

    # ---- steps -------------------------------------------------------------------------------------
    def begin_step(self, carried: Sequence[CudaTransfer] = ()) -> None:
        self._check_open()
        for transfer in carried:
            if not self.holds(transfer):
                raise ScheduleError(f"begin_step takes over {transfer.node}, which is not held for it")
        self.abandon_step()
        self._give_up_ahead()
        for transfer in carried:
            transfer.kind = "prefetch"
        self._ledger.begin_step()
        self._up.wait_stream(self._compute)
        self._down.wait_stream(self._compute)
        self._in_step = True

    def end_step(self) -> None:
        self._check_open()
        if self._ahead:
            self._synchronize_step()
        else:
            self.synchronize()
        self._kept.clear()
        self._lending.take_back()
        while self._guards and self._guards[0][0].query():
            self._guards.popleft()[1].detach()
        self._in_step = False
        staged, self._staged = self._staged, []
        for transfer in staged:
            transfer.issued()  # raises what failed on the pin thread
        self._note_reserved()

    def _note_reserved(self) -> None:
        """The step's peak: what torch's allocator has reserved since; it gives nothing back while a step runs.

        Its own peak is not used: calibration, or whatever ran before, may have reached it.
        """
        reserved = torch.cuda.memory_stats_as_nested_dict(self.device)["reserved_bytes"]["all"]["current"]
        self.counters.step_peak_bytes = max(0, reserved - self._reserved_before)
        self.counters.peak_bytes = max(self.counters.peak_bytes, self.counters.step_peak_bytes)

    def abandon_step(self) -> None:
        if self._in_step:
            self.synchronize()
            self._kept.clear()
            self._lending.take_back()
            self._staged.clear()
            self._give_up_ahead()
            self._in_step = False

    def _give_up_ahead(self) -> None:
        """Forget prefetches for the next step; only later copies of the same stream overwrite their bytes."""
        for transfer in self._ahead:
            transfer.kind = "given up"
        self._ahead.clear()

    def _synchronize_step(self) -> None:
        """Block until everything but prefetches for the next step is over."""
        self._pin_thread.drain()
        with self._work(Op("end_step")):
            self._compute.synchronize()
            self._down.synchronize()
            if self._uploaded is not None:
                self._uploaded.synchronize()

    def synchronize(self) -> None:
        self._check_open()
        self._pin_thread.drain()
        with self._work(Op("synchronize")):
            for stream in (self._up, self._compute, self._down):
                stream.synchronize()

    # ---- operations of a schedule --------------------------------------------------------------------
    def stage(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[CudaTransfer]) -> CudaTransfer:
        self._check_open()
        view = self._pinned_view(slot)
        _check_rows(op, source, view)
        earlier = [_started(op, transfer, ("prefetch",)) for transfer in after]
        transfer = CudaTransfer(op.name, "stage", view, source)
        transfer.job = self._pin_thread.submit(op.name, partial(self._fill_pinned, op, source, view, earlier))
        self._staged.append(transfer)
        return transfer

    def _fill_pinned(self, op: Op, source: torch.Tensor, view: torch.Tensor, earlier: list[CudaTransfer]) -> None:
        """On the pin thread: once the uploads of what lay there are over, copy rows into the pinned ring."""
        for transfer in earlier:
            assert transfer.event is not None, "the pin thread issued this upload before"
            transfer.event.synchronize()
        with self._tracer.host_span(op.name, "pin"):
            copy_rows(view, source)
        self._ledger.staged(op.category, span_bytes(view))

    def prefetch(
        self, op: Op, source: torch.Tensor | CudaTransfer, slot: Slot, after: Sequence[CudaToken]
    ) -> CudaTransfer:
        self._check_open()
        view = self._view(slot)
        if isinstance(source, CudaTransfer):
            return self._prefetch_staged(op, source, view, after)
        _check_rows(op, source, view)
        transfer = CudaTransfer(op.name, "prefetch", view, source)
        self._fill_slot(op, transfer, after)
        self._uploaded = transfer.event
        return transfer

    def prefetch_ahead(
        self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[CudaToken]
    ) -> CudaTransfer:
        self._check_open()
        view = self._view(slot)
        _check_rows(op, source, view)
        transfer = CudaTransfer(op.name, "prefetch_ahead", view, source, ring=self._ring)
        self._fill_slot(op, transfer, after)
        assert transfer.event is not None, "every copy into a slot records its event"
        transfer.source = None
        guard = weakref.finalize(source.untyped_storage(), transfer.event.synchronize)
        guard.atexit = False
        self._guards.append((transfer.event, guard))
        self._ahead.append(transfer)
        return transfer

    def holds(self, transfer: CudaTransfer) -> bool:
        return not self._in_step and transfer.kind == "prefetch_ahead" and transfer.ring is self._ring

    def _prefetch_staged(
        self, op: Op, stage: CudaTransfer, view: torch.Tensor, after: Sequence[CudaToken]
    ) -> CudaTransfer:
        rows = _started(op, stage, ("stage",)).value
        _check_rows(op, rows, view)
        if stage.reader is not None:
            raise SlotInUseError(f"{op.name} reads {stage.node}, which {stage.reader} reads already")
        stage.reader = op.name
        transfer = CudaTransfer(op.name, "prefetch", view, rows)
        transfer.job = self._pin_thread.submit(op.name, partial(self._upload_staged, op, stage, transfer, after))
        self._staged.append(transfer)
        return transfer

    def _upload_staged(
        self, op: Op, stage: CudaTransfer, transfer: CudaTransfer, after: Sequence[CudaToken]
    ) -> None:
        """On the pin thread, behind the stage: start the upload unless there is nothing to upload."""
        stage.issued()
        self._fill_slot(op, transfer, after)
        self._uploaded = transfer.event

    def _fill_slot(self, op: Op, transfer: CudaTransfer, after: Sequence[CudaToken]) -> None:
        for token in after:
            self._up.wait_event(token.event)
        with self._work(op), self._on(self._up, "up", op):
            if transfer.source.is_contiguous():
                transfer.value.copy_(transfer.source, non_blocking=True)
            else:
                upload_lines(transfer.value, transfer.source, self._up.cuda_stream)
        self._ledger.uploaded(op.category, span_bytes(transfer.value))
        transfer.event = self._up.record_event()

    def wait(self, op: Op, transfer: CudaTransfer) -> Value:
        self._check_open()
        transfer = _started(op, transfer, ("prefetch", "to_accelerator"))
        transfer.issued()
        if transfer.event is not None:
            self._compute.wait_event(transfer.event)
        return transfer.value

    def release(self, op: Op, transfer: CudaTransfer) -> CudaToken:
        self._check_open()
        transfer = _started(op, transfer, ("prefetch",))
        if transfer.released_by is not None:
            raise SlotInUseError(
                f"{op.name} releases {transfer.node}, which {transfer.released_by} released already"
            )
        transfer.released_by = op.name
        return CudaToken(op.name, self._compute.record_event())

    def to_host(self, op: Op, value: Value | Sequence[Value]) -> CudaTransfer:
        self._check_open()
        values: list[Value] = list(value) if isinstance(value, list | tuple) else [value]
        for one in values:
            if not isinstance(one, torch.Tensor) or one.device != self.device:
                raise ScheduleError(f"{op.name} downloads {one!r:.80}, which is not on {self.device}")
        self._down.wait_event(self._compute.record_event())
        with self._work(op), self._on(self._down, "down", op):
            results = [self._start_down(op, one) for one in values]
        result = results if isinstance(value, list | tuple) else results[0]
        self.counters.trips_down += 1
        return CudaTransfer(op.name, "to_host", result, values, self._down.record_event())

    def _start_down(self, op: Op, value: torch.Tensor) -> torch.Tensor:
        """The transfer keeps ``value`` until its wait, so nothing is recorded for the allocator, which would keep the
        block from the next step's tensors. After an aborted step the copy may read what was reused: nobody reads it."""
        result = empty_twin(value, torch.device("cpu"), pinned=True)
        copy_span(result, value, non_blocking=True)
        self._ledger.downloaded(op.category, span_bytes(value))
        return result

    def wait_host(self, op: Op, transfer: CudaTransfer) -> Any:
        self._check_open()
        transfer = _started(op, transfer, ("to_host",))
        assert transfer.event is not None, "every download records its event"
        with self._work(op):
            transfer.event.synchronize()
        transfer.source = None
        return transfer.value

    def to_accelerator(self, op: Op, tensors: Sequence[torch.Tensor]) -> CudaTransfer:
        self._check_open()
        nbytes = sum(map(span_bytes, tensors))
        self._ledger.uploaded(op.category, nbytes)
        self.counters.trips_up += 1
        with self._work(op), _copying():
            if 0 < nbytes <= SMALL_UPLOAD_BYTES:
                return CudaTransfer(op.name, "to_accelerator", self._lending.lend(tensors), None)
            buffers = [self._pinned(tensor) for tensor in tensors]
            self._kept += buffers
            with self._on(self._up, "up", op):
                values = [self._start_up(op, buffer) for buffer in buffers]
        self._uploaded = self._up.record_event()
        return CudaTransfer(op.name, "to_accelerator", values, buffers, self._uploaded)

    def _start_up(self, op: Op, buffer: torch.Tensor) -> torch.Tensor:
        value = empty_twin(buffer, self.device)  # of the up stream's pool: nothing older uses it
        copy_span(value, buffer, non_blocking=True)
        self._ledger.hold(value, op.category)
        value.record_stream(self._compute)
        return value

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy in a pinned buffer of torch's caching host allocator."""
        if tensor.is_pinned():
            return tensor.detach()
        buffer = empty_twin(tensor, torch.device("cpu"), pinned=True)
        copy_span(buffer, tensor)
        return buffer

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
        with self._work(op), self._tracer.stream_span(op.name, "accelerator", self._compute):
            returned = function(*args)
        return returned if outputs is None else list(returned)

    def host(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._check_open()
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, CudaTransfer) or (
                isinstance(argument, torch.Tensor) and argument.is_cuda
            ):
                raise ScheduleError(f"{op.name} runs on the host but gets a value of the accelerator")
        with self._tracer.host_span(op.name):
            return call_on_host(op, function, args, kwargs)

    # ---- life --------------------------------------------------------------------------------------
    def trace(self, enabled: bool) -> list[Span]:
        self._check_open()
        return self._tracer.collect(enabled)

    def close(self) -> None:
        if self._closed:
            return
        self._pin_thread.close()
        torch.cuda.synchronize(self.device)
        self._kept.clear()
        self._lending.close()
        self._ahead.clear()
        self._staged.clear()
        self._views.clear()
        self._pinned_views.clear()
        self._ring = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._pinned_ring = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pins.close()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise AcceleratorError("the accelerator is closed")

    @contextmanager
    def _on(self, stream: torch.cuda.Stream, resource: str, op: Op) -> Iterator[None]:
        """Issue copies to a stream of the accelerator's own."""
        with _copying(), torch.cuda.stream(stream), self._tracer.stream_span(op.name, resource, stream):
            yield

    @contextmanager
    def _work(self, op: Op) -> Iterator[None]:
        """Errors of torch and CUDA name the node at which they were met."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise AcceleratorMemoryError(f"{op.name} found no memory on {self.device}: {error}") from error
        except RuntimeError as error:
            if isinstance(error, AcceleratorError):
                raise
            raise AcceleratorError(f"{op.name} failed on {self.device}: {error}") from error


@contextmanager
def _copying() -> Iterator[None]:
    """Copies record no graph and make ordinary tensors, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _check_rows(op: Op, source: torch.Tensor, view: torch.Tensor) -> None:
    if not has_lines(source) or source.dtype != view.dtype or source.shape != view.shape:
        raise ScheduleError(f"{op.name} copies into a slot of another dtype or shape, or rows that are not contiguous")


def _started(op: Op, transfer: object, kinds: tuple[str, ...]) -> CudaTransfer:
    """CUDA takes an event that was never recorded for done: a transfer that was never started is an error."""
    if not isinstance(transfer, CudaTransfer):
        raise ScheduleError(f"{op.name} waits for {type(transfer).__name__}, which was never started")
    if transfer.kind not in kinds:
        raise ScheduleError(f"{op.name} waits for {transfer.node}, which is a {transfer.kind}")
    return transfer


def cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """What torch gives cuBLAS for a handle and stream: what it says itself (torch 2.13), else what it documents.

    That is ``CUBLAS_WORKSPACE_CONFIG``, a list of ``:KiB:count``, else 32 MiB on Hopper and newer.
    """
    if hasattr(torch.backends.cuda, "cublas_workspace_size") and torch.version.cuda is not None:
        return int(torch.backends.cuda.cublas_workspace_size())
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return sum(int(kib) * int(count) for kib, count in pairs) * 1024
    return 32 << 20 if capability[0] >= 9 else (4096 * 2 + 16 * 8) * 1024


def _current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _require_device() -> None:
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        reason = "this build of torch has no CUDA; install a CUDA build of torch"
    else:
        reason = "torch finds no CUDA device; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    raise AcceleratorUnavailableError(f'{reason}, or use accelerator="emulated" or "auto"')
