"""Rings: one byte buffer each, with typed slots in it. Staged weights lie in one on the device and in a pinned one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from hetegen_compile.accelerators.geometry import has_lines
from hetegen_compile.errors import ScheduleError

ALIGNMENT_BYTES = 256

POISON = 0xFF
"""A byte that makes every floating-point type NaN and every integer conspicuous."""


@dataclass(frozen=True)
class Slot:
    """A typed part of a ring: offset and length in bytes."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Ring:
    """A buffer that may be replaced by another one; slots stay valid because they are looked up at each use.

    ``make`` makes a buffer of so many bytes.
    """

    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        self._make = make
        self._views: dict[Slot, torch.Tensor] = {}
        with torch.inference_mode(False):
            self.buffer = make(0)

    @property
    def nbytes(self) -> int:
        """Length of the ring."""
        return self.buffer.numel()

    def resize(self, nbytes: int) -> None:
        """Replace the buffer by one of ``nbytes``; what the old one held is lost."""
        self._views.clear()
        with torch.inference_mode(False):
            self.buffer = self._make(0)  # gives the old one back first
            self.buffer = self._make(nbytes)

    def slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """A typed part of the ring; ScheduleError if it is not aligned or does not fit."""
        nbytes = prod(shape) * dtype.itemsize
        if offset % ALIGNMENT_BYTES or offset < 0 or offset + nbytes > self.nbytes:
            raise ScheduleError(
                f"a slot of {nbytes} bytes at {offset} is not aligned to {ALIGNMENT_BYTES} bytes "
                f"or does not fit the ring of {self.nbytes} bytes"
            )
        slot = Slot(offset, nbytes, shape, dtype)
        self.view(slot)
        return slot

    def view(self, slot: Slot) -> torch.Tensor:
        """The slot's bytes as a tensor of its shape and dtype."""
        view = self._views.get(slot)
        if view is None:
            with torch.inference_mode(False):
                part = self.buffer[slot.offset : slot.offset + slot.nbytes]
                view = self._views[slot] = part.view(slot.dtype).view(slot.shape)
        return view


def poisoned(nbytes: int, device: torch.device) -> torch.Tensor:
    """A buffer in which nothing valid lies."""
    return torch.full((nbytes,), POISON, dtype=torch.uint8, device=device)


def check_rows(name: str, source: torch.Tensor, slot: Slot) -> None:
    """ScheduleError if ``source`` cannot be copied into a slot as it lies."""
    if not has_lines(source) or source.dtype != slot.dtype or source.shape != slot.shape:
        raise ScheduleError(
            f"{name} copies {source.dtype} {tuple(source.shape)} with strides {source.stride()} "
            f"into a slot of {slot.dtype} {slot.shape}; rows must be contiguous and of one type"
        )
