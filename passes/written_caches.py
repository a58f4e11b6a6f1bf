"""Whether a program may write a cache in place: directly, or what is the cache's memory only where it lies otherwise.

Why: a cache that is laid out token by token (``append_tokens``) is not contiguous, so ``contiguous`` and ``reshape``
copy what they return as it is where the cache is ``cat``'s. A write to that goes to the cache in eager, and here to a
copy.
Other writes have nothing to do with it: a mixture's router divides its weights in place.

    keys = append_tokens(past, new)
    flat = keys.reshape(-1);  flat[:7] = 0              # may be the cache's memory: the caches are copied, as in eager
    weights = softmax(q @ keys);  weights /= total      # is not: made anew, whatever the strides are
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from hetegen_compile.ir import GENERATOR, info
from hetegen_compile.passes.aten_listener import FREE_ATEN

_COPIES = frozenset({"clone", "_to_copy", "_reshape_alias", "_reshape_copy", "copy_", "lift_fresh", "lift_fresh_copy"})
"""What ``contiguous``, ``reshape`` and ``to`` do where they do not return what they are given, or a view of it."""

_PASSES_ON = FREE_ATEN | _COPIES


def writer_of_caches(graph: fx.Graph, caches: Iterable[fx.Node]) -> fx.Node | None:
    """The first node that writes what is one of these caches, or may be its memory at other strides; None: none does.

    ``caches`` are both the given ones and those that are made of them; the graph is annotated.
    """
    maybe = {*caches}
    storages = frozenset[int]().union(*(info(cache).storages for cache in maybe))
    node: fx.Node
    for node in graph.nodes:
        writes, read = info(node).writes - {GENERATOR}, maybe.intersection(node.all_input_nodes)
        if writes & storages or any(info(one).storages & writes for one in read):
            return node
        if read and not _makes_anew(node):
            maybe.add(node)
    return None


def _makes_anew(node: fx.Node) -> bool:
    """Whether all that a node returns lies in memory of its own, whatever the strides of its arguments are."""
    notes = info(node)
    if notes.storages & notes.reads or not notes.aten:
        return False
    own = [name not in _PASSES_ON for name in notes.aten]
    return any(own) if isinstance(notes.value, Tensor) else all(own)


__all__ = ["writer_of_caches"]
