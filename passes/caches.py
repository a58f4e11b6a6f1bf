"""The caches that a captured graph makes for the steps after it, and how long they get in those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import sympy
from torch import Tensor, fx

from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import INPUT_OPS, info, written_storages
from hetegen_compile.passes.append_behind import appends
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.tensors import tensor_bytes, tensors_in, to_expr
from hetegen_compile.passes.windows import CACHE_DIMS, TOKENS, window_of


@dataclass(frozen=True)
class Forward:
    """Sizes of a forward.

    Attributes:
        tokens: new ones of each sequence.
        length: tokens in a cache that grows when it is over.
        padded: whether attention gets a mask because some sequences are shorter.
        follows: whether it comes after the captured one, whose caches it gets.
    """

    tokens: int
    length: int
    padded: bool = False
    follows: bool = True

    @property
    def before(self) -> Forward:
        """The forward before it, as far as the lengths of caches go."""
        return replace(self, length=self.length - self.tokens)


@dataclass(frozen=True)
class Cache:
    """A cache that the captured graph makes and returns.

    Attributes:
        nbytes: of all of it; of a window what that is cut from.
        tokens: that it has room for.
        grows: whether a next step returns a longer one.
        window: tokens that it keeps at most; None: all.
        written: it is written in place (a static cache).
        room: tokens that the memory has which the accelerator appends to, of one that is made so (``append_behind``);
            0: of any other.
    """

    nbytes: int
    tokens: int
    grows: bool
    window: int | None
    written: bool
    room: int = 0

    def length(self, forward: Forward) -> int:
        """Tokens of it that attention sees at most."""
        if not (self.grows and forward.follows):
            return self.tokens
        return forward.length if self.window is None else min(forward.length, self.window + 1)

    def bytes_after(self, forward: Forward) -> int:
        """Bytes of it when a forward is over, with its room."""
        return -(-self.nbytes * max(self.length(forward), self.room) // self.tokens)

    def masked(self, forward: Forward) -> bool:
        """Whether attention to it gets a mask, whatever it got in the captured forward."""
        full = self.window is not None and forward.length > self.window
        return forward.padded or (forward.follows and (self.written or full))


def returned_caches(module: fx.GraphModule, context: Context) -> dict[int, Cache]:
    """Each that the graph makes and returns, by storage; of one that it only lengthens neither grows nor is written."""
    return dict(_returned(module, context))


def _returned(module: fx.GraphModule, context: Context) -> Iterator[tuple[int, Cache]]:
    written = written_storages(module.graph.nodes)
    inputs = frozenset(storage_id(tensor) for node in module.graph.nodes for tensor in given_tensors(node))
    for node in module.graph.output_node().all_input_nodes:
        window = window_of(node)
        whole = node if window is None else node.all_input_nodes[0]
        longer = any(tensor.dim() >= CACHE_DIMS for one in whole.all_input_nodes for tensor in given_tensors(one))
        for tensor in tensors_in(info(whole).value):
            key = storage_id(tensor)
            if tensor.dim() >= CACHE_DIMS and key not in inputs:
                tokens, nbytes = max(1, shape_of(tensor, context)[TOKENS]), context.room(tensor_bytes(tensor))
                grows = key not in written and tokens == context.tokens_per_sequence and not longer
                if grows:  # of as many tokens, for the most sequences
                    nbytes = -(-nbytes * tokens // max(1, context.room(to_expr(tensor.shape[TOKENS]))))
                kept = None if window is None else int(context.number(window))
                room = max(tokens, room_tokens(tensor, context)) if appends(whole) else 0
                yield key, Cache(nbytes, tokens, grows, kept, key in written, room)


def longest_cache(context: Context) -> int:
    """Tokens of a cache, when a step is over, that room is kept for; 0: none beyond those that are there."""
    return context.options.context or (2 * context.tokens_per_sequence if context.spare else 0)


def longest_forward(caches: Iterable[Cache], context: Context, *, padded: bool = False) -> Forward | None:
    """The longest step after the captured one that is counted, None: none is."""
    length = longest_cache(context)
    if not length and any(cache.grows for cache in caches):
        return None
    return Forward(1, max(length, context.tokens_per_sequence), padded)


def room_tokens(cache: Tensor, context: Context) -> int:
    """For how many tokens there is room where the accelerator makes a cache; 0: for its own, as it grows no more.

    Those of an encoder's states are made once; one that grows has as many tokens as the graph is given.
    """
    grows = int(context.number(to_expr(cache.shape[TOKENS]))) == context.tokens_per_sequence
    return longest_cache(context) if grows else 0


def block_size(cache: Tensor, context: Context) -> sympy.Expr:
    """Bytes of the memory of a cache that the accelerator makes with room, an expression over the graph's sizes."""
    tokens, longest = to_expr(cache.shape[TOKENS]), room_tokens(cache, context)
    if isinstance(tokens, sympy.Integer):
        return tensor_bytes(cache) * sympy.Rational(max(int(tokens), longest), max(1, int(tokens)))
    return sympy.cancel(tensor_bytes(cache) / tokens) * sympy.Max(tokens, longest)


def caches_grow(module: fx.GraphModule, context: Context) -> bool:
    """Whether later forwards may bring longer caches than this one does."""
    ends = [node for node in module.graph.nodes if node.op in ("placeholder", "output")]
    tensors = [tensor for node in ends for tensor in tensors_in(info(node).value) if tensor.dim() >= CACHE_DIMS]
    return any(_symbolic(tensor) or is_new_cache(tensor, context.tokens_per_sequence) for tensor in tensors)


def _symbolic(tensor: Tensor) -> bool:
    return any(to_expr(size).free_symbols for size in tensor.shape)


def is_new_cache(tensor: Tensor, tokens: int) -> bool:
    """Whether a graph that is given ``tokens`` of each sequence (0: no fixed number) returns this as their cache."""
    if tensor.dim() < CACHE_DIMS or _symbolic(tensor) or not tokens:
        return False
    return int(tensor.shape[TOKENS]) == tokens


def given_tensors(node: fx.Node) -> list[Tensor]:
    """Those of an input of the graph; none of another node."""
    return tensors_in(info(node).value) if node.op in INPUT_OPS else []


def shape_of(tensor: Tensor, context: Context) -> tuple[int, ...]:
    """Its sizes in the context's call, as numbers; nothing is guarded."""
    return tuple(n if isinstance(n, int) else int(context.number(to_expr(n))) for n in tensor.shape)


__all__ = [
    "Cache", "Forward", "block_size", "caches_grow", "given_tensors", "is_new_cache", "longest_cache",
    "longest_forward", "returned_caches", "room_tokens", "shape_of",
]  # fmt: skip
