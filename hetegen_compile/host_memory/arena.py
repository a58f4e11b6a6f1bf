"""One anonymous mapping that adopted storages lie in, and moving parameters into it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hetegen_compile.host_memory.mappings import Mapping, overlapping
from hetegen_compile.host_memory.memory_nodes import interleave
from hetegen_compile.system import numa_nodes, usable_cpus

ALIGNMENT_BYTES = 64
"""Of each storage in an arena: what vector instructions like."""


class Arena:
    """Anonymous memory for storages of the given lengths; unmapped when the last of them is gone.

    Every storage made here keeps the arena alive, so it is the owner to whose life a pin is tied: it dies, and
    what is tied to it ends, before its memory is unmapped.

    Raises:
        OSError: the system has no such range.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        ends = list(accumulate((_aligned(length) for length in lengths), initial=0))
        self.nbytes = ends[-1]
        self._places = list(zip(ends, lengths, strict=False))
        self._memory = mmap.mmap(-1, max(1, self.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # advice only: not every kernel has huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        interleave(self.address, self.nbytes, numa_nodes(usable_cpus()))

    def storage(self, index: int) -> torch.UntypedStorage:
        """The storage at one of the arena's places, each with an identity of its own."""
        offset, nbytes = self._places[index]
        window = (ctypes.c_uint8 * nbytes).from_address(self.address + offset)
        window.arena = self  # type: ignore[attr-defined]
        return torch.frombuffer(window, dtype=torch.uint8).untyped_storage()


def move(tensors: Iterable[Tensor], target: torch.UntypedStorage) -> None:
    """Copy the storage that ``tensors`` view into ``target`` and make them view that instead.

    Sizes, strides, offsets and version counters stay.
    """
    tensors = list(tensors)
    _bytes_of(target).copy_(_bytes_of(tensors[0].untyped_storage()))
    for tensor in tensors:
        view = torch.empty(0, dtype=tensor.dtype)
        tensor.data = view.set_(target, tensor.storage_offset(), tensor.size(), tensor.stride())


def drop_pages(mappings: Sequence[Mapping], address: int, nbytes: int) -> None:
    """Give back the pages of a file mapping that lie wholly in a range; they can be read from the file again.

    Nothing is done where a part of the mapping was written privately, since that would be lost.
    """
    found = overlapping(mappings, address, nbytes)
    if not found or any(mapping.modified_bytes != 0 for mapping in found):
        return
    start, end = _round_up(address, mmap.PAGESIZE), (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _aligned(nbytes: int) -> int:
    return _round_up(nbytes, ALIGNMENT_BYTES)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
