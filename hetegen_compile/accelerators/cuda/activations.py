"""Activations on their way between host and device: trips down and up, and small uploads that a kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hetegen_compile.accelerators.base import Op, Value
from hetegen_compile.accelerators.cuda.lending import Lending
from hetegen_compile.accelerators.cuda.pinning import cuda_view
from hetegen_compile.accelerators.cuda.streams import CudaStreams, copying
from hetegen_compile.accelerators.cuda.transfers import CudaTransfer, started
from hetegen_compile.accelerators.geometry import copy_span, empty_result, empty_twin, span, span_bytes
from hetegen_compile.accelerators.ledger import MemoryLedger
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import SMALL_UPLOAD_BYTES, VIEWED_UPLOAD_BYTES

_HOST = torch.device("cpu")


class Activations:
    """Copies of activations.

    ``_kept`` are pinned buffers that copies of the step under way read. What fills mirrors is lent by itself
    (``_filling``): how much is new to a step varies, and what it sends up should lie where it did.
    """

    def __init__(self, streams: CudaStreams, ledger: MemoryLedger, lending: Lending) -> None:
        self._streams = streams
        self._ledger = ledger
        self._lending = lending
        self._filling = Lending(streams.device)
        self._kept: list[torch.Tensor] = []

    def finish_step(self) -> None:
        """All that read the step's buffers is over."""
        self._kept.clear()
        self._lending.take_back()
        self._filling.take_back()

    def close(self) -> None:
        """Let go of all buffers."""
        self._kept.clear()
        self._lending.close()
        self._filling.close()

    def to_host(self, op: Op, value: Value | Sequence[Value]) -> CudaTransfer:
        """``Accelerator.to_host``."""
        streams = self._streams
        values: list[Value] = list(value) if isinstance(value, list | tuple) else [value]
        for one in values:
            if not isinstance(one, torch.Tensor) or one.device != streams.device:
                raise ScheduleError(f"{op.name} downloads {one!r:.80}, which is not on {streams.device}")
        streams.down.wait_event(streams.compute.record_event())
        with streams.work(op), streams.on(streams.down, "down", op):
            results = [self._start_down(op, one) for one in values]
        result = results if isinstance(value, list | tuple) else results[0]
        self._ledger.counters.trips_down += 1
        return CudaTransfer(op.name, "to_host", result, values, streams.down.record_event())

    def _start_down(self, op: Op, value: torch.Tensor) -> torch.Tensor:
        """The transfer keeps ``value`` until its wait, so nothing is recorded for the allocator, which would keep the
        block from the next step's tensors. After an aborted step the copy may read what was reused: nobody reads it."""
        result = empty_result(value, pinned=True)
        copy_span(result, value, non_blocking=True)
        self._ledger.downloaded(op.category, span_bytes(value))
        return result

    def wait_host(self, op: Op, transfer: CudaTransfer) -> Any:
        """``Accelerator.wait_host``."""
        transfer = started(op, transfer, ("to_host",))
        assert transfer.event is not None, "every download records its event"
        with self._streams.work(op):
            transfer.event.synchronize()
        transfer.source = None
        return transfer.value

    def to_accelerator(self, op: Op, tensors: Sequence[torch.Tensor]) -> CudaTransfer:
        """``Accelerator.to_accelerator``."""
        streams = self._streams
        nbytes = sum(map(span_bytes, tensors))
        self._ledger.uploaded(op.category, nbytes)
        self._ledger.counters.trips_up += 1
        with streams.work(op), copying():
            if 0 < nbytes <= VIEWED_UPLOAD_BYTES:
                return CudaTransfer(op.name, "to_accelerator", self._lending.lend(tensors), None)
            buffers = [_in_pinned_memory(tensor) for tensor in tensors]
            self._kept += buffers
            if nbytes <= SMALL_UPLOAD_BYTES:
                values = [self._read_up(op, buffer) for buffer in buffers]
                return CudaTransfer(op.name, "to_accelerator", values, None)
            with streams.on(streams.up, "up", op):
                values = [self._start_up(op, buffer) for buffer in buffers]
        streams.uploaded = streams.up.record_event()
        return CudaTransfer(op.name, "to_accelerator", values, buffers, streams.uploaded)

    def _start_up(self, op: Op, buffer: torch.Tensor) -> torch.Tensor:
        value = empty_twin(buffer, self._streams.device)  # of the up stream's pool: nothing older uses it
        copy_span(value, buffer, non_blocking=True)
        self._ledger.hold(value, op.category)
        value.record_stream(self._streams.compute)
        return value

    def _read_up(self, op: Op, buffer: torch.Tensor) -> torch.Tensor:
        """The compute stream reads a pinned buffer once; its consumers may read the result as often as they like."""
        value = empty_twin(buffer, self._streams.device)
        self._ledger.hold(value, op.category)
        if buffer.numel():
            copy_by_kernel(value, cuda_view(span(buffer), self._streams.device))
        return value

    def fill(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a host tensor up on the compute stream; on return the source may be overwritten.

        Of a small one a kernel reads a pinned copy: the copy engine may have prefetches queued that take longer than a
        step's rest.
        """
        if not 0 < span_bytes(source) <= VIEWED_UPLOAD_BYTES:
            copy_span(target, source)  # blocks until the source was read
            return
        (lent,) = self._filling.lend([source])
        copy_by_kernel(target, span(lent))


def copy_by_kernel(target: torch.Tensor, seen: torch.Tensor) -> None:
    """Fill a device tensor from a 1-D view of pinned memory, of the same dtype, on the current stream.

    By an operation that computes, because ``copy_`` between two addresses of the device may use the copy engine.
    """
    torch.bitwise_or(seen.view(torch.uint8), 0, out=span(target).view(torch.uint8))


def _in_pinned_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy in a pinned buffer of torch's caching host allocator."""
    if tensor.is_pinned():
        return tensor.detach()
    buffer = empty_twin(tensor, _HOST, pinned=True)
    copy_span(buffer, tensor)
    return buffer
