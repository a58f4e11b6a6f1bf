"""What the values of a captured graph take in forwards of other sizes, of which no graph has been captured yet.

Why: the budget holds for a generation, and prefill, whose numbers of tokens are fixed, is compiled before the steps
after it are seen. Those run the same operations on one token and a longer cache, so each value of the captured graph
says what its like takes then, by what it is made of:

    cache    what is returned for the next step
    keys     of this call made of nothing but a cache: as long as that (repeated for the heads that share it, say)
    pairs    [..., tokens, keys]: scores of attention, masks, biases of positions
    tokens   anything else that has a part for each token
    fixed    the rest

Fused attention is called with fakes of those sizes. Where it gets a mask that it did not get here (several sequences
are padded, a static cache is longer than what it holds, a window is full), keys and values are repeated for the heads
that share them, as transformers does then.

A cache that no token goes into (of the encoder's states, of an image) is made once: later forwards get it, and what is
computed for it alone is not computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx

from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.annotate_costs import value_size
from hetegen_compile.passes.caches import Cache, Forward, given_tensors, shape_of
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.fused_attention import (
    Attention,
    Shape,
    attention_arguments,
    is_fused_attention,
    scratch_bytes,
)
from hetegen_compile.passes.tensors import held_bytes, is_ids, tensors_in
from hetegen_compile.passes.windows import CACHE_DIMS, TOKENS


class _Kind(NamedTuple):
    """What a value is made of; ``cache``: the storage of the cache that it comes from."""

    name: Literal["cache", "keys", "pairs", "tokens", "fixed"]
    cache: int | None = None


MASK_BYTES = 8
"""Of one element of a mask that is given with a call."""

Life = tuple[int, int, int]
"""First and last place of a value in program order, and its bytes."""


class OtherForwards:
    """Forwards of the model that a graph was captured of, which got ``context.tokens_per_sequence`` tokens.

    ``caches`` are those that it returns (``returned_caches``); what is made ``on_host`` for the host alone does not
    count.
    """

    def __init__(
        self, module: fx.GraphModule, context: Context, caches: Mapping[int, Cache], on_host: Collection[fx.Node] = ()
    ) -> None:
        self._context = context
        self._nodes: list[fx.Node] = list(module.graph.nodes)
        self._by_storage = caches
        self._away = {node for node in on_host if all(user in on_host for user in node.users)}
        self.captured = Forward(self._tokens, self._tokens, follows=False)
        self._of_call: set[fx.Node] = set()
        self._kinds: dict[fx.Node, _Kind] = {}
        for node in self._nodes:
            self._kinds[node] = self._kind(node)
        self._held = {node: self._held_bytes(node) for node in self._nodes}
        self._once = self._made_once()
        self._again = self._computed_again() if self._once else set(self._nodes)
        self._scratch = {node: context.room(info(node).made_bytes - value_size(node)) for node in self._nodes
                         if info(node).made_bytes != 0}  # fmt: skip

    @property
    def _tokens(self) -> int:
        return self._context.tokens_per_sequence

    def peak_bytes(self, forward: Forward) -> int:
        """Most bytes of values at one time; caches are there all the time."""
        return max(self.bytes_at(forward), default=0)

    def bytes_at(self, forward: Forward) -> list[int]:
        """Bytes of values at each place."""
        lives = [*self._values(forward), *self._operations(forward), *self._masks(forward)]
        change = [max((nbytes for _, _, nbytes in lives), default=0) if self._context.largest_twice else 0]
        change += [0] * (len(self._nodes) + 1)
        for born, dies, nbytes in lives:
            change[born] += nbytes
            change[dies + 1] -= nbytes
        return list(accumulate(change))

    def linear_bytes(self, forward: Forward) -> int:
        """Most bytes of a Linear's input and output."""
        linears = [node for _, node in self._computed(forward) if node.target == LINEAR]
        return max((self._bytes(n, forward) + self._bytes(n.all_input_nodes[0], forward) for n in linears), default=0)

    def idle_bytes(self, forward: Forward) -> int:
        """Bytes of inputs of the captured forward that another one does not read."""
        idle = [node for node in self._nodes if node.op == "placeholder" and node not in self._again]
        given = [node for node in idle if node in self._of_call and node.users and given_tensors(node)]
        return sum(int(self._context.number(value_size(node))) for node in given) if forward.follows else 0

    # ---- what the graph is made of -----------------------------------------------------------------------------

    def _kind(self, node: fx.Node) -> _Kind:
        operands = [one for one in node.all_input_nodes if one in self._of_call]
        held = info(node).storages & self._by_storage.keys()
        if operands or held or (node.op == "placeholder" and node.name not in self._context.weights):
            self._of_call.add(node)
        if held:
            return _Kind("cache", min(held))
        kinds = [self._kinds[one] for one in operands]
        source = min((kind.cache for kind in kinds if kind.cache is not None), default=None)
        if source is not None and all(kind.name in ("cache", "keys") for kind in kinds):
            return _Kind("keys", source)
        if node not in self._of_call:
            return _Kind("fixed")
        return self._kind_by_shape([self._shape(tensor) for tensor in tensors_in(info(node).value)], source)

    def _kind_by_shape(self, shapes: list[Shape], source: int | None) -> _Kind:
        """That of a value of the call; attention's result is none of pairs, whatever its width."""
        keys = {self._tokens, self._tokens if source is None else self._by_storage[source].tokens}
        if any(shape[-2:] == (self._tokens, length) for shape in shapes for length in keys):
            return _Kind("pairs", source)
        return _Kind("tokens" if any(map(self._has_tokens, shapes)) else "fixed")

    def _made_once(self) -> frozenset[int]:
        """The storages of caches that no tokens go into."""
        ids = {node for node in self._of_call if any(map(is_ids, given_tensors(node)))}
        for node in self._nodes:
            if node.op != "output" and not ids.isdisjoint(node.all_input_nodes):
                ids.add(node)
        of_ids = frozenset[int]().union(*(info(node).storages for node in ids))
        kept = {key for key, cache in self._by_storage.items() if not cache.grows and not cache.written}
        return frozenset(kept - of_ids) if ids else frozenset()

    def _computed_again(self) -> set[fx.Node]:
        """What results depend on without what is made once."""
        found: set[fx.Node] = set()
        pending = [node for node in self._nodes if node.op == "output" or info(node).writes]
        while pending:
            node = pending.pop()
            if node not in found and (node.op == "output" or not info(node).storages & self._once):
                found.add(node)
                pending += node.all_input_nodes
        return found

    def _computed(self, forward: Forward) -> list[tuple[int, fx.Node]]:
        """The nodes that a forward computes on the accelerator, with their places."""
        nodes = [(place, node) for place, node in enumerate(self._nodes) if node not in self._away]
        return [(place, node) for place, node in nodes if not forward.follows or node in self._again]

    def _has_tokens(self, shape: Shape) -> bool:
        """Whether one of the sizes is one of tokens; the last, and that of sequences, may be equal by chance."""
        sizes = [n for place, n in enumerate(shape[:-1]) if place or n != self._context.sequences]
        return any(n % self._tokens == 0 for n in sizes)

    def _held_bytes(self, node: fx.Node) -> list[tuple[int, int]]:
        """(storage, bytes) of each tensor that the graph makes, where it is made."""
        if node.op in ("placeholder", "get_attr", "output"):
            return []
        return [(storage_id(one), self._context.room(held_bytes(one))) for one in tensors_in(info(node).value)]

    def _shape(self, tensor: Tensor) -> Shape:
        return shape_of(tensor, self._context)

    # ---- what it takes -----------------------------------------------------------------------------------------

    def _share(self, node: fx.Node, forward: Forward) -> Fraction:
        """How much of what it takes in the captured forward a value takes in another."""
        kind, tokens = self._kinds[node], Fraction(forward.tokens, self._tokens)
        if kind.name in ("tokens", "fixed"):
            return tokens if kind.name == "tokens" else Fraction(1)
        cache = self._by_storage.get(kind.cache) if kind.cache is not None else None
        longer = Fraction(forward.length, self._tokens) if cache is None else _longer(cache, forward)
        return tokens * longer if kind.name == "pairs" else longer

    def _bytes(self, node: fx.Node, forward: Forward) -> int:
        return ceil(self._context.room(value_size(node)) * self._share(node, forward))

    def _values(self, forward: Forward) -> list[Life]:
        """Each storage that the graph makes."""
        lives: dict[int, Life] = {}
        for place, node in self._computed(forward):
            share = self._share(node, forward)
            for key, own in self._held[node]:
                born, _, nbytes = lives.get(key, (place, place, 0))
                lives[key] = born, place, max(nbytes, ceil(own * share))
            for key in (info(node).storages | info(node).reads) & lives.keys():
                lives[key] = lives[key][0], place, lives[key][2]
        end = len(self._nodes)
        lives.update((key, (0, end, cache.bytes_after(forward))) for key, cache in self._by_storage.items())
        given = frozenset(storage_id(tensor) for node in self._nodes for tensor in given_tensors(node))
        return [life for key, life in lives.items() if key not in given]

    def _operations(self, forward: Forward) -> Iterator[Life]:
        """What operations of several kernels make beside their results."""
        for place, node in self._computed(forward):
            if is_fused_attention(node):
                call, padded = self._attention(node, forward)
                yield from ((place, place, nbytes) for nbytes in (call.repeated_bytes() if padded else ()))
                yield place, place, scratch_bytes(call)
            elif self._scratch.get(node):
                share = max(self._share(one, forward) for one in (node, *node.all_input_nodes))
                yield place, place, ceil(self._scratch[node] * share)
            if forward.padded and self._kinds[node].name == "pairs" and "bmm" in info(node).aten:
                queries = (one for one in node.all_input_nodes if self._kinds[one].name == "tokens")
                yield place, place, sum(self._bytes(one, forward) for one in queries)  # several sequences' are copied

    def _masks(self, forward: Forward) -> Iterator[Life]:
        """The largest mask that the captured graph does not have, and what it is made of: an integer for each token.

        Of several sequences that are padded both are given even where the graph makes one mask for all of them.
        """
        most = 0
        for _, node in self._computed(forward):
            if not is_fused_attention(node):
                continue
            call, padded = self._attention(node, forward)
            if call.mask is not None and (padded or forward.padded):
                sequences, (*_, tokens, length) = call.query[0], call.mask
                new = sequences if padded else sequences - self._masks_of(node)
                most = max(most, (new * tokens + sequences * MASK_BYTES * forward.padded) * length)
        yield 0, len(self._nodes), most

    def _masks_of(self, node: fx.Node) -> int:
        """How many sequences have a mask of their own: one for all may be expanded."""
        mask = info(attention_arguments(node)["attn_mask"]).value
        return 1 if mask.dim() < CACHE_DIMS or mask.stride()[0] == 0 else self._shape(mask)[0]

    def _attention(self, node: fx.Node, forward: Forward) -> tuple[Attention, bool]:
        """A call of fused attention as it is in a forward, and whether it has a mask there and none here."""
        call, source = self._captured_attention(node), self._kinds[attention_arguments(node)["key"]].cache
        cache = None if source is None else self._by_storage[source]
        padded = call.mask is None and cache is not None and cache.masked(forward)
        whole = cache is not None and (forward.follows or padded)  # a prefill may look at the written part only
        length = cache.length(forward) if cache is not None and whole else call.key[TOKENS]
        call = call.resized(max(1, call.query[TOKENS] * forward.tokens // self._tokens), length)
        return (call.padded() if padded else call), padded

    def _captured_attention(self, node: fx.Node) -> Attention:
        given = attention_arguments(node)
        query, key, value = (info(given[name]).value for name in ("query", "key", "value"))
        mask = None if given["attn_mask"] is None else info(given["attn_mask"]).value
        return Attention(
            self._shape(query), self._shape(key), self._shape(value), query.dtype,
            None if mask is None else self._shape(mask), torch.bool if mask is None else mask.dtype,
            given["dropout_p"], bool(given["is_causal"]), given["scale"], bool(given["enable_gqa"]),
        )  # fmt: skip


def _longer(cache: Cache, forward: Forward) -> Fraction:
    return Fraction(cache.length(forward), cache.tokens)


__all__ = ["MASK_BYTES", "OtherForwards"]
