"""The rings of the emulated accelerator: one byte buffer each, NaN wherever nothing valid lies."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch

from hetegen_compile.accelerators.values import Occupancy, Slot
from hetegen_compile.errors import ScheduleError

ALIGNMENT_BYTES = 256

POISON = 0xFF
"""A byte that makes every floating-point type NaN and every integer conspicuous."""


def make_slot(ring_bytes: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
    """A slot of a ring of ``ring_bytes``; ScheduleError if it is not aligned or does not fit."""
    nbytes = prod(shape) * dtype.itemsize
    if offset % ALIGNMENT_BYTES or offset < 0 or offset + nbytes > ring_bytes:
        raise ScheduleError(
            f"a slot of {nbytes} bytes at {offset} is not aligned to {ALIGNMENT_BYTES} bytes "
            f"or does not fit the ring of {ring_bytes} bytes"
        )
    return Slot(offset, nbytes, shape, dtype)


def slot_view(buffer: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The slot's bytes in a ring's buffer as a tensor of its shape and dtype."""
    return buffer[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)


class Ring:
    """A buffer that may be replaced by another one; slots stay valid because they are looked up at each use."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._views: dict[Slot, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Length of the ring."""
        return self.buffer.numel()

    def resize(self, nbytes: int) -> None:
        """Replace the buffer by one of ``nbytes``; what the old one held is lost."""
        self._views.clear()
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        with torch.inference_mode(False):
            self.buffer = torch.full((nbytes,), POISON, dtype=torch.uint8, device="cpu")

    def slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """A typed part of the ring; ScheduleError if it is not aligned or does not fit."""
        slot = make_slot(self.nbytes, offset, shape, dtype)
        self.view(slot)
        return slot

    def view(self, slot: Slot) -> torch.Tensor:
        """The slot's bytes as a tensor of its shape and dtype."""
        view = self._views.get(slot)
        if view is None:
            with torch.inference_mode(False):
                view = self._views[slot] = slot_view(self.buffer, slot)
        return view

    def poison(self, occupancies: Iterable[Occupancy]) -> None:
        """Fill ring bytes that no longer hold anything."""
        for occupancy in occupancies:
            self.buffer[occupancy.start : occupancy.end].fill_(POISON)
