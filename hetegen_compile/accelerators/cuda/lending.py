"""Small host tensors for kernels to read where they lie: pinned buffers and CUDA views of them, used again and again.

Making a pinned buffer and a view of it takes longer than filling it, and a step that is split makes hundreds. What was
lent first in one step is lent first in the next one, and so on, unless somebody still holds a tensor on it: recorded
launches (``replays.py``) find what they read where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from hetegen_compile.accelerators.cuda.pinning import cuda_view
from hetegen_compile.accelerators.geometry import copy_span, empty_twin, span_bytes

ALIGNMENT_BYTES = 256
"""Where each tensor begins in a buffer: as the device's allocator aligns, which compiled kernels count on."""

LEAST_BYTES = 1 << 12
"""Buffers are as long as powers of two from here on, so that few are made where lengths vary."""


class _Lent(NamedTuple):
    """A pinned buffer of bytes, seen from either side, and how often the device's side is held if it is not lent."""

    host: torch.Tensor
    device: torch.Tensor
    holders: int


class Lending:
    """The pinned buffers of one device's small uploads. Used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in_turn: list[_Lent] = []
        self._next = 0

    @property
    def lent(self) -> int:
        """How many were lent since the last were taken back."""
        return self._next

    def lend(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """CUDA views, of the tensors' geometry, of copies that lie behind each other in one buffer."""
        buffers, views = self.lend_empty(tensors)
        for buffer, tensor in zip(buffers, tensors, strict=True):
            copy_span(buffer, tensor)
        return views

    def lend_empty(self, like: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Pinned tensors of this geometry to be filled, behind each other in one buffer, and CUDA views of them."""
        *offsets, nbytes = accumulate(map(_aligned_bytes, like), initial=0)
        lent = self._take(nbytes)
        places = list(zip(offsets, like, strict=True))
        return [_lying_at(lent.host, *place) for place in places], [_lying_at(lent.device, *place) for place in places]

    def take_back(self) -> None:
        """All kernels that read what was lent are over: it may be lent again."""
        self._next = 0

    def close(self) -> None:
        """Let go of all buffers."""
        self._in_turn.clear()
        self._next = 0

    def _take(self, nbytes: int) -> _Lent:
        turn, self._next = self._next, self._next + 1
        if turn < len(self._in_turn):
            lent = self._in_turn[turn]
            if nbytes <= lent.host.numel() and _holders(lent.device) == lent.holders:
                return lent
        made = self._made(max(LEAST_BYTES, 1 << (nbytes - 1).bit_length()))
        self._in_turn[turn : turn + 1] = [made]
        return made

    def _made(self, length: int) -> _Lent:
        geometry = torch.empty(length, dtype=torch.uint8, device="meta")
        host = empty_twin(geometry, torch.device("cpu"), pinned=True)
        device = cuda_view(host, self._device)
        return _Lent(host, device, _holders(device))


def _aligned_bytes(tensor: torch.Tensor) -> int:
    return -(-span_bytes(tensor) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _lying_at(packed: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes of a buffer from ``offset`` on as a tensor of the geometry of ``like``."""
    return packed.view(like.dtype).as_strided(like.shape, like.stride(), offset // like.element_size())


def _holders(tensor: torch.Tensor) -> int:
    """How often the tensor's storage is held: by it, by what it is a view of, and by its own views."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


__all__ = ["Lending"]
