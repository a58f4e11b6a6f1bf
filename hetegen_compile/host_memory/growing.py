"""Caches that grow on the host: a longer one is the shorter one and what is new behind it, in the same memory.

A cache that grows is a new tensor in every step. Made by ``cat`` it is copied each time, into memory that the C library
takes from the system anew (32 MiB and more always, less where nothing larger was freed), which finds and clears its
pages: OPT-6.7B with 16 sequences of 512 tokens copies 4 GiB in a step. Laid out token by token
(``passes/append_tokens.py``) a cache that has grown begins as it did before. So each lies at the beginning of a block
of memory with room for as many tokens again, pages of which take no memory until something lies in them, and one that
outgrows it is copied once.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

from hetegen_compile.geometry import token_strides
from hetegen_compile.passes.append_tokens import append_tokens

LEAST_ROOM_BYTES = 1 << 16
"""Behind a short cache, so that it is not copied every few tokens."""


class Block(mmap.mmap):
    """Anonymous memory; it ends with the last tensor in it. Nobody else's address lies in it meanwhile.

    Attributes:
        address: where it begins.
        free: where what lies in it ends, until somebody takes that place.
    """

    address: int
    free: dict[int, None]

    @classmethod
    def of(cls, nbytes: int, *, used: int) -> Block:
        """A new one, whose first ``used`` bytes are taken.

        Raises:
            OSError: the system has no such range.
        """
        block = cls(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        block.free = {used: None}
        _blocks[block.address] = block
        return block

    def take(self, first: int, nbytes: int) -> bool:
        """Whether so many bytes from ``first`` on are the caller's: nobody has had them, and they are there.

        One call decides it, so of two threads that append to one cache one gets another block. (Where Ctrl-C comes
        behind it both do.)
        """
        if first + nbytes > len(self) or self.free.pop(first, self) is self:
            return False
        self.free[first + nbytes] = None
        return True


_blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()  # by address


def append(past: Tensor, new: Tensor) -> Tensor:
    """``append_tokens`` on the host: behind ``past`` where there is room, else both in a new block.

    Args:
        past: [sequences, heads, tokens, width], or an empty tensor of one dimension.
        new: the same with further tokens.

    Returns:
        A tensor that is no view, with a storage of its own that begins where that of ``past`` begins, if it lies behind
        it: what is written to one of them in place is then written to the other, too. The storage cannot be resized.
    """
    if past.dim() != new.dim():
        past = new[:, :, :0]
    sequences, heads, tokens, width = past.shape
    further, stride = new.shape[2], token_strides(past.shape)
    token_bytes = sequences * heads * width * past.element_size()
    used, nbytes = tokens * token_bytes, (tokens + further) * token_bytes
    if past.dtype is not new.dtype or nbytes == 0:
        return append_tokens(past, new)
    block = _blocks.get(past.data_ptr()) if tokens and past.stride() == stride else None
    behind = block is not None and block.take(used, nbytes - used)
    if not behind:
        if tokens and past.untyped_storage().nbytes() != used:  # cut, and soon again: pages of a new block cost more
            result = append_tokens(past, new)
            return torch.empty(0, dtype=past.dtype).set_(result.untyped_storage(), 0, result.shape, result.stride())
        try:
            block = Block.of(nbytes + max(nbytes, LEAST_ROOM_BYTES), used=nbytes)
        except OSError:  # torch says what it cannot have
            return append_tokens(past, new)
    result = _tensor(block, nbytes, past.dtype)
    result.set_(result.untyped_storage(), 0, (sequences, heads, tokens + further, width), stride)
    if not behind:
        result[:, :, :tokens].copy_(past)
    result[:, :, tokens:].copy_(new)
    return result


def _tensor(block: Any, nbytes: int, dtype: torch.dtype) -> Tensor:
    """The first bytes of a block, which it keeps."""
    return torch.frombuffer(memoryview(block)[:nbytes], dtype=dtype)


__all__ = ["LEAST_ROOM_BYTES", "Block", "append"]
