"""Weights on their way up: into slots of the staging ring, through the pinned ring where they are not pinned."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.accelerators.cuda.copies import upload_lines
from hetegen_compile.accelerators.cuda.staging import PinThread, copy_rows
from hetegen_compile.accelerators.cuda.streams import CudaStreams
from hetegen_compile.accelerators.cuda.transfers import CudaToken, CudaTransfer, started
from hetegen_compile.accelerators.geometry import empty_twin, span_bytes
from hetegen_compile.accelerators.ledger import MemoryLedger
from hetegen_compile.accelerators.ring import Ring, Slot, check_rows, poisoned
from hetegen_compile.errors import SlotInUseError


class Prefetches:
    """Both rings, the pin thread, and the copies that fill slots.

    ``_guards`` complete a copy for the next step before its source's memory is freed.
    """

    def __init__(self, streams: CudaStreams, ledger: MemoryLedger) -> None:
        self.ring = Ring(partial(poisoned, device=streams.device))
        self.pinned = Ring(_pinned_bytes)
        self._streams = streams
        self._ledger = ledger
        self._pin_thread = PinThread(partial(torch.cuda.set_device, streams.device))
        self._staged: list[CudaTransfer] = []
        self._ahead: list[CudaTransfer] = []
        self._guards: deque[tuple[torch.cuda.Event, weakref.finalize[..., torch.UntypedStorage]]] = deque()

    # ---- steps -------------------------------------------------------------------------------------
    @property
    def under_way(self) -> bool:
        """Whether copies for the next step were started."""
        return bool(self._ahead)

    def take_over(self, carried: Sequence[CudaTransfer]) -> None:
        """Copies that an earlier step started are waited for and released as this step's; others are forgotten.

        Only later copies of the same stream overwrite the bytes of those.
        """
        self.give_up()
        for transfer in carried:
            transfer.kind = "prefetch"

    def give_up(self) -> None:
        """Forget the copies for the next step."""
        for transfer in self._ahead:
            transfer.kind = "given up"
        self._ahead.clear()

    def holds(self, transfer: CudaTransfer) -> bool:
        """Whether a copy for the next step is still there to be taken over."""
        return transfer.kind == "prefetch_ahead"

    def finish_step(self) -> None:
        """The step is over: raise what failed on the pin thread."""
        while self._guards and self._guards[0][0].query():
            self._guards.popleft()[1].detach()
        staged, self._staged = self._staged, []
        for transfer in staged:
            transfer.issued()

    def abandon_step(self) -> None:
        """Forget what the step has started."""
        self._staged.clear()
        self.give_up()

    def drain(self) -> None:
        """Block until the pin thread has issued everything."""
        self._pin_thread.drain()

    def end_thread(self) -> None:
        """End the pin thread after what is queued."""
        self._pin_thread.close()

    def close(self) -> None:
        """Everything is over: free both rings."""
        self.abandon_step()
        self.ring.resize(0)
        self.pinned.resize(0)

    # ---- operations --------------------------------------------------------------------------------
    def stage(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[CudaTransfer]) -> CudaTransfer:
        """``Accelerator.stage``."""
        view = self.pinned.view(slot)
        check_rows(op.name, source, slot)
        earlier = [started(op, transfer, ("prefetch",)) for transfer in after]
        transfer = CudaTransfer(op.name, "stage", view, source)
        transfer.job = self._pin_thread.submit(op.name, partial(self._fill_pinned, op, source, view, earlier))
        self._staged.append(transfer)
        return transfer

    def _fill_pinned(self, op: Op, source: torch.Tensor, view: torch.Tensor, earlier: list[CudaTransfer]) -> None:
        """On the pin thread: once the uploads of what lay there are over, copy rows into the pinned ring."""
        for transfer in earlier:
            assert transfer.event is not None, "the pin thread issued this upload before"
            transfer.event.synchronize()
        with self._streams.tracer.host_span(op, "pin"):
            copy_rows(view, source)
        self._ledger.staged(op.category, span_bytes(view))

    def start(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[CudaToken]) -> CudaTransfer:
        """``Accelerator.prefetch`` of rows of a host weight."""
        view = self.ring.view(slot)
        check_rows(op.name, source, slot)
        transfer = CudaTransfer(op.name, "prefetch", view, source)
        self._streams.uploaded = self._fill_slot(op, transfer, after)
        return transfer

    def start_ahead(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[CudaToken]) -> CudaTransfer:
        """``Accelerator.prefetch_ahead``."""
        view = self.ring.view(slot)
        check_rows(op.name, source, slot)
        transfer = CudaTransfer(op.name, "prefetch_ahead", view, source)
        event = self._fill_slot(op, transfer, after)
        transfer.source = None
        guard = weakref.finalize(source.untyped_storage(), event.synchronize)
        guard.atexit = False
        self._guards.append((event, guard))
        self._ahead.append(transfer)
        return transfer

    def start_staged(self, op: Op, stage: CudaTransfer, slot: Slot, after: Sequence[CudaToken]) -> CudaTransfer:
        """``Accelerator.prefetch`` of what a stage copies into the pinned ring."""
        view, rows = self.ring.view(slot), started(op, stage, ("stage",)).value
        check_rows(op.name, rows, slot)
        if stage.reader is not None:
            raise SlotInUseError(f"{op.name} reads {stage.node}, which {stage.reader} reads already")
        stage.reader = op.name
        transfer = CudaTransfer(op.name, "prefetch", view, rows)
        transfer.job = self._pin_thread.submit(op.name, partial(self._upload_staged, op, stage, transfer, after))
        self._staged.append(transfer)
        return transfer

    def _upload_staged(self, op: Op, stage: CudaTransfer, transfer: CudaTransfer, after: Sequence[CudaToken]) -> None:
        """On the pin thread, behind the stage: start the upload unless there is nothing to upload."""
        stage.issued()
        self._fill_slot(op, transfer, after)

    def _fill_slot(self, op: Op, transfer: CudaTransfer, after: Sequence[CudaToken]) -> torch.cuda.Event:
        streams = self._streams
        for token in after:
            streams.up.wait_event(token.event)
        with streams.work(op), streams.on(streams.up, "up", op):
            if transfer.source.is_contiguous():
                transfer.value.copy_(transfer.source, non_blocking=True)
            else:
                upload_lines(transfer.value, transfer.source, streams.up.cuda_stream)
        self._ledger.uploaded(op.category, span_bytes(transfer.value))
        transfer.event = streams.up.record_event()
        return transfer.event

    def release(self, op: Op, transfer: CudaTransfer) -> CudaToken:
        """``Accelerator.release``."""
        transfer = started(op, transfer, ("prefetch",))
        if transfer.released_by is not None:
            raise SlotInUseError(f"{op.name} releases {transfer.node}, which {transfer.released_by} released already")
        transfer.released_by = op.name
        return CudaToken(op.name, self._streams.compute.record_event())


def _pinned_bytes(nbytes: int) -> torch.Tensor:
    geometry = torch.empty(nbytes, dtype=torch.uint8, device="meta")
    return empty_twin(geometry, torch.device("cpu"), pinned=nbytes > 0)
