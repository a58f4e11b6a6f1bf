"""Memory of caches that grow: each step returns longer ones, which lie where those of the step before the last lay.

A cache that grows is a new tensor in every step, in eager too, and C libraries hand large blocks back to the system
when they are freed, so that each step writes to pages that the system must first find and clear. That takes six times
as long as copying the cache does: on two processors of an EPYC (a virtual machine, 4 KiB pages) ``cat`` of 17 MB and a
token took 7.9 to 8.6 ms where pages were new and 1.3 ms where they were not; OPT-6.7B makes 64 such results in a step
with 2048 tokens. Here a block is lent again as soon as no tensor lies in it, whoever held it last.

What is kept unlent is never more than what is lent: the last cache that dies takes all of it along.
"""

from __future__ import annotations

import contextlib
import mmap
import operator
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, count

import torch
from torch import Tensor

from hetegen_compile.locks import if_free

LEAST_BYTES = 4 << 20
"""Of a cache that is worth a block: smaller ones mostly lie in what the C library keeps."""

_MAY_BE_CHANNELS_LAST = (4, 5)  # dimensions; torch lays a result out so if all tensors are

_GROWTH = 4
"""A block is longer than asked for by one part of so many; pages of it that nothing has lain in take no memory."""


class Recycled:
    """Blocks of anonymous memory. Safe in any thread, where the collector ends a tensor's life, and behind Ctrl-C."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []
        self._lent: dict[int, tuple[weakref.ref[memoryview], mmap.mmap]] = {}
        self._dead: deque[int] = deque()  # keys of ``_lent``
        self._keys = count()
        self._idle_bytes = self._lent_bytes = 0

    @property
    def lent_bytes(self) -> int:
        """Of the blocks in which something lies."""
        return self._lent_bytes

    @property
    def idle_bytes(self) -> int:
        """Of the blocks that wait for the next ``lend``."""
        return self._idle_bytes

    def lend(self, nbytes: int) -> memoryview:
        """So many bytes, of any content, which are lent again when nothing refers to the view.

        Raises:
            OSError: the system has none.
        """
        with self._lock:
            self._take_back()
            block = self._smallest(nbytes) or self._made(nbytes)
            view, key = memoryview(block)[:nbytes], next(self._keys)
            self._lent_bytes += len(block)
            self._lent[key] = weakref.ref(view, partial(self._died, key)), block
        self._settle()
        return view

    def _smallest(self, nbytes: int) -> mmap.mmap | None:
        found = min((block for block in self._idle if len(block) >= nbytes), key=len, default=None)
        if found is not None:
            self._idle.remove(found)
            self._idle_bytes -= len(found)
        return found

    def _made(self, nbytes: int) -> mmap.mmap:
        """A new block, in the stead of ones that have become too small."""
        length = nbytes + nbytes // _GROWTH
        dropped = 0
        while self._idle and dropped < length:
            dropped += self._drop()
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _drop(self) -> int:
        """Give the block that has been idle longest back to the system; its bytes."""
        length = len(self._idle.pop(0))
        self._idle_bytes -= length
        return length

    def _died(self, key: int, _: weakref.ref[memoryview]) -> None:
        """Called as a view ends, within the collector of any thread, so it waits for no lock: who has it goes on."""
        self._dead.append(key)
        self._settle()

    def _settle(self) -> None:
        while self._dead and if_free(self._lock, self._take_back):
            pass

    def _take_back(self) -> None:
        """Note who has died, and keep no more than is lent, and what blocks of one step differ by.

        Whatever interrupts this, no block is in both lists, a dead one stays noted until it is taken back, and sums are
        right again when nothing is lent.
        """
        while self._dead:
            found = self._lent.pop(self._dead[0], None)
            if found is not None:
                self._lent_bytes -= len(found[1])
                self._idle.append(found[1])
                self._idle_bytes += len(found[1])
            self._dead.popleft()
        if not self._lent:
            self._idle.clear()
            self._idle_bytes = self._lent_bytes = 0
        while self._idle and self._idle_bytes > self._lent_bytes + self._lent_bytes // _GROWTH:
            self._drop()


_MEMORY = Recycled()


def cat(tensors: list[Tensor] | tuple[Tensor, ...], dim: int = 0, *, memory: Recycled = _MEMORY) -> Tensor:
    """``torch.cat``, and where that makes a large contiguous tensor of CPU tensors of one kind, in recycled memory.

    The result is no view and has a storage of its own, of its own length, as torch's has. That storage cannot be
    resized.
    """
    shape = _shape(tensors, dim)
    if shape is not None:
        first = tensors[0]
        with contextlib.suppress(OSError):  # torch.cat says what it cannot allocate
            view = memory.lend(shape.numel() * first.element_size())
            result = torch.frombuffer(view, dtype=first.dtype)
            result.set_(result.untyped_storage(), 0, shape, _contiguous(shape))
            return torch.cat(tensors, dim, out=result)
    return torch.cat(tensors, dim)


def _shape(tensors: Sequence[Tensor], dim: int) -> torch.Size | None:
    """What ``torch.cat`` makes if it is large and contiguous for certain: where one tensor's channels are not last."""
    first = tensors[0]
    if first.nbytes < LEAST_BYTES or first.requires_grad or first.device.type != "cpu":
        return None
    shape = list(first.shape)
    if len(shape) in _MAY_BE_CHANNELS_LAST and first.stride(1) <= first.stride(-1):
        return None
    dim %= len(shape)
    for other in tensors[1:]:
        if other.dtype is not first.dtype or other.dim() != len(shape) or other.requires_grad:
            return None
        shape[dim] += other.shape[dim]
    return torch.Size(shape)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements."""
    return tuple(accumulate(shape[:0:-1], operator.mul, initial=1))[::-1]


__all__ = ["LEAST_BYTES", "Recycled", "cat"]
