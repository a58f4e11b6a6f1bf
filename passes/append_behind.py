"""Segments that lengthen a cache write what is new behind it, instead of copying all of it into a longer one.

Why: compiled as it stands, putting a cache and a token together makes the cache anew in each step, some bytes longer,
beside the one before; what the one before that had fits nothing longer. Laid out token by token (``append_tokens``) the
longer cache begins as the shorter one does. So the step hands a segment the longer one, in the same memory
(``accelerators/growing.py``), and the segment writes the end of it. To everybody else it returns a new value, as
before. A cache that is made of nothing (a prompt's) is made in such memory, too.

Before:

    def segment(past, new): keys = append_tokens(past, new); return attention(keys), keys

After, called with the longer cache in the place of ``past``:

    def segment(keys, new): write_behind(keys, new); return attention(keys)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor, fx

from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import annotate, copy_module, info
from hetegen_compile.passes.append_tokens import append_tokens
from hetegen_compile.passes.tensors import to_expr
from hetegen_compile.passes.windows import CACHE_DIMS, TOKENS


@dataclass(frozen=True)
class Appended:
    """A cache that a segment is given in the place of a shorter one, or to make it in.

    Attributes:
        given: its position among the segment's inputs.
        result: its position among what the segment returned before.
        value: a fake of it.
        tokens: how many are new of one that is lengthened, a number or a size of the graph; None: all, it is made of
            nothing.
    """

    given: int
    result: int
    value: Tensor
    tokens: sympy.Expr | None = None


def appends(node: fx.Node) -> bool:
    """Whether a node makes a cache that lies in memory with room behind it."""
    return node.target is append_tokens


def lengthens(node: fx.Node) -> bool:
    """Whether that is a longer one of a cache that is given."""
    return appends(node) and bool(info(node.all_input_nodes[0]).value.dim() == CACHE_DIMS)


def lengthened_inputs(nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The caches that some of the nodes lengthen, each with the node that does."""
    return {node.all_input_nodes[0]: node for node in nodes if lengthens(node)}


def write_behind(cache: Tensor, new: Tensor) -> None:
    """Fill the end of a cache."""
    cache[:, :, cache.shape[TOKENS] - new.shape[TOKENS] :].copy_(new)


def append_behind(segment: fx.GraphModule) -> tuple[fx.GraphModule, tuple[Appended, ...]]:
    """The segment that is given caches which have their new length, and which these are, in the order of results.

    The segment itself and nothing where it makes none. Those that it makes of nothing come behind its other inputs.
    """
    if not any(map(appends, segment.graph.nodes)):
        return segment, ()
    copied = copy_module(segment)
    graph = copied.graph
    results: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    found, kept = [], list(results)
    for node in [node for node in graph.nodes if appends(node)]:
        placeholders = graph.find_nodes(op="placeholder")
        past, new = node.all_input_nodes
        value, place = info(node).value, results.index(node)
        if lengthens(node):
            assert [*past.users] == [node], "who else reads the shorter one would read the longer one"
            found.append(Appended(placeholders.index(past), place, value, to_expr(info(new).value.shape[TOKENS])))
            _write(graph, annotate(past, value=value), new, node)
        else:
            found.append(Appended(len(placeholders), place, value))
            _write(graph, _new_input(graph, placeholders, value), new, node)
        kept.remove(node)
    graph.output_node().args = (tuple(kept),)
    copied.recompile()
    return copied, tuple(sorted(found, key=lambda one: one.result))


def _new_input(graph: fx.Graph, placeholders: Sequence[fx.Node], value: Tensor) -> fx.Node:
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(f"in_{len(placeholders)}")
    return annotate(node, value=value, storages=frozenset({storage_id(value)}))


def _write(graph: fx.Graph, cache: fx.Node, new: fx.Node, node: fx.Node) -> None:
    """``node`` becomes a write to the end of ``cache``, which is its value from there on."""
    with graph.inserting_before(node):
        annotate(graph.call_function(write_behind, (cache, new)), info(node), value=None)
    node.replace_all_uses_with(cache)
    graph.erase_node(node)


__all__ = ["Appended", "append_behind", "appends", "lengthened_inputs", "lengthens", "write_behind"]
