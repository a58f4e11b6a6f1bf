"""Whether what a program writes in place allows its caches to be laid out token by token.

Why: a cache that is laid out so (``append_tokens``) is not contiguous, and neither is what elementwise operations make
of it. ``contiguous`` and ``reshape`` copy there what they return as it is where the cache is ``cat``'s, and the other
way round: a write in place behind them would go elsewhere than in eager. Which tensors share memory is known of both
ways, each propagated with its own strides; where they share alike, writes go where they go in eager. None may go to a
cache itself: a longer one shares memory with the one before it.

    weights = softmax(q @ keys);  weights /= weights.sum()   # shares memory with nothing, either way
    (keys * 2).reshape(-1)[:7] = 0                           # shares it with keys * 2, but not token by token
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import GENERATOR, info
from hetegen_compile.passes.append_tokens import lies_by_token
from hetegen_compile.passes.tensors import tensors_in

Sharing = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""By node: of each of its tensors, and of each storage that it writes, which of the program's storages it is, counted
in the order in which they appear."""


def sharing(graph: fx.Graph) -> Sharing:
    """Which tensors of an annotated graph share memory, and what is written, whatever the storages are."""
    number: dict[int, int] = {}
    found = []
    for node in _annotated(graph):
        lies_in = tuple(number.setdefault(storage_id(one), len(number)) for one in tensors_in(info(node).value))
        writes = sorted(number.setdefault(key, len(number)) for key in info(node).writes - {GENERATOR})
        found.append((lies_in, tuple(writes)))
    return found


def writes_in_place(graph: fx.Graph) -> bool:
    """Whether an annotated graph writes anything in place, or an operation inside a node does."""
    return any(
        info(node).writes - {GENERATOR} or any(name.endswith("_") for name in info(node).aten)
        for node in _annotated(graph)
    )


def writer_of_caches(graph: fx.Graph, caches: Iterable[fx.Node]) -> fx.Node | None:
    """The first node that writes one of these caches, or another input that is laid out as one, or moves a tensor.

    Such an input may lie in the same memory as a cache, which no storage tells.
    """
    storages = frozenset[int]().union(*(info(node).storages for node in (*caches, *inputs_laid_out(graph))))
    return next((node for node in _annotated(graph) if info(node).writes & storages or info(node).rebinds), None)


def inputs_laid_out(graph: fx.Graph) -> set[fx.Node]:
    """The inputs that lie token by token."""
    given = {node: info(node).value for node in graph.find_nodes(op="placeholder")}
    return {node for node, value in given.items() if isinstance(value, Tensor) and lies_by_token(value)}


def _annotated(graph: fx.Graph) -> Iterable[fx.Node]:
    return (node for node in graph.nodes if node.op != "output")


__all__ = ["Sharing", "inputs_laid_out", "sharing", "writer_of_caches", "writes_in_place"]
