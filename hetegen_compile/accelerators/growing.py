"""Caches that grow on an accelerator: a longer one is the shorter one and what is new behind it, in the same memory.

As on the host (``host_memory/growing.py``): laid out token by token (``passes/append_tokens.py``) a longer cache begins
as the shorter one does, so it needs no memory but its own, and no copy of all that was there. Before a step each cache
that it lengthens is made to lie at the beginning of a block with room behind it (``mirrors``): once, and again when it
has outgrown that. What is behind a cache is nobody's until a longer one has taken it, so whoever has the shorter one
does not see it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hetegen_compile.errors import ScheduleError
from hetegen_compile.geometry import token_strides

_GROWN = "_hetegen_grown"


@dataclass(eq=False)
class Block:
    """Memory for a cache of up to ``tokens`` tokens, of which the first ``used`` have been taken.

    ``token_bytes`` are those of one token of all sequences.
    """

    tokens: int
    used: int
    token_bytes: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.tokens * self.token_bytes

    def take(self, first: int, tokens: int) -> bool:
        """Whether so many tokens behind the ``first`` are the caller's from now on: nobody has had them."""
        if first != self.used or first + tokens > self.tokens:
            return False
        self.used = first + tokens
        return True


class Grown(NamedTuple):
    """Where a value lies: at the beginning of a block, with so many tokens."""

    block: Block
    tokens: int

    @classmethod
    def of(cls, cache: torch.Tensor, tokens: int) -> Grown:
        """In a new block with room for ``tokens`` of a cache of these sizes, or for those that it has."""
        own = int(cache.shape[-2])
        return cls(Block(max(own, tokens), own, token_bytes(cache)), own)

    @property
    def room(self) -> int:
        """Tokens behind it that nobody has had."""
        return self.block.tokens - self.tokens if self.tokens == self.block.used else 0


def block_of(value: Any) -> Block | None:
    """The block that a value of an accelerator lies in, if it does."""
    where = getattr(value, _GROWN, None)
    return None if where is None else where.block


def room_behind(value: Any) -> int:
    """By how many tokens a value can be lengthened where it lies."""
    where = getattr(value, _GROWN, None)
    return 0 if where is None else where.room


def have_room(values: Iterable[Any], tokens: int) -> bool:
    """Whether each of some values can be lengthened by so many tokens, all of them in one step."""
    lie_in = [getattr(value, _GROWN, None) for value in values]
    blocks = {id(where.block) for where in lie_in if where is not None and where.room >= tokens}
    return len(blocks) == len(lie_in)


def lengthening(name: str, value: Any, tokens: int) -> Grown:
    """Where a value will lie with ``tokens`` more, which are taken; ``name`` is the operation's.

    Raises:
        ScheduleError: there is no room behind it.
    """
    where: Grown | None = getattr(value, _GROWN, None)
    if where is None or not where.block.take(where.tokens, tokens):
        has = "is in no block" if where is None else f"has room for {where.room}"
        raise ScheduleError(f"{name} lengthens a cache by {tokens} tokens, which {has}")
    return Grown(where.block, where.tokens + tokens)


def note(value: Any, where: Grown) -> None:
    """Remember where a value lies."""
    setattr(value, _GROWN, where)


def token_bytes(cache: torch.Tensor) -> int:
    """Bytes of one token of all sequences of a cache, [sequences, heads, tokens, width]."""
    sequences, heads, _, width = cache.shape
    return int(sequences * heads * width * cache.element_size())


def empty_cache(like: torch.Tensor, tokens: int, device: torch.device) -> torch.Tensor:
    """A cache of the sizes and dtype of ``like``, token by token at the beginning of new memory for ``tokens``."""
    sequences, heads, _, width = like.shape
    with torch.inference_mode(False):  # a later step, which may be none of inference, writes it
        whole = torch.empty(tokens * sequences * heads * width, dtype=like.dtype, device=device)
        return whole.as_strided(like.shape, token_strides(like.shape))


def lengthened(cache: torch.Tensor, tokens: int) -> torch.Tensor:
    """A cache at the beginning of a block, with ``tokens`` in all."""
    sequences, heads, _, width = cache.shape
    return cache.as_strided((sequences, heads, tokens, width), token_strides(cache.shape))


__all__ = [
    "Block", "Grown", "block_of", "empty_cache", "have_room", "lengthened", "lengthening", "note", "room_behind",
    "token_bytes",
]  # fmt: skip
