"""Results that share memory which the program computes into are returned as views made on the host.

Why: what the accelerator writes comes down as a copy. Where two results lie in one storage, or one in an input's, two
copies would not share memory as they do in eager: ``x += ...; return x``, or a result beside a row of it. An input that
is written is copied back as a whole after the step, so its views are simply made of it; for any other storage one
copy of what it was made as comes down, and the results are views of that. In-place operations on the way are left out:
the memory that is viewed shows their writes already.

Before:

    y = x.mul_(2); a = linear(y, w); b = a.mul_(3); c = a[0]
    return (y, b, c)

After:

    y = x.mul_(2); a = linear(y, w); b = a.mul_(3); c = a[0]
    d = clone(a); e = d[0]
    return (x, d, e)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from hetegen_compile.ir import INPUT_OPS, info, is_tensor, makers_of, writers_of
from hetegen_compile.passes.movement import is_view, moves_data


def return_views(graph: fx.Graph) -> bool:
    """Rewrite what a captured graph returns; whether anything was, in which case new nodes have no notes yet."""
    output = graph.output_node()
    outputs = [node for node in output.all_input_nodes if is_tensor(node) and node.op not in INPUT_OPS]
    returned = Counter(key for node in outputs for key in info(node).storages)
    changed = False
    makers = makers_of(graph.nodes)
    for key, writers in writers_of(graph.nodes).items():
        first = makers.get(key)
        if first is None or not is_tensor(first) or all(_is_repeated(node) for node in (first, *writers)):
            continue
        if returned[key] > (first.op not in INPUT_OPS):
            changed |= _return(output, first, key, [node for node in outputs if key in info(node).storages])
    return changed


def _is_repeated(node: fx.Node) -> bool:
    """Whether the host makes the value itself as a rule (``place_nodes``)."""
    notes = info(node)
    return moves_data(node) or notes.random or notes.data_dependent or "embedding" in notes.aten


def _return(output: fx.Node, first: fx.Node, key: int, results: Sequence[fx.Node]) -> bool:
    """Return ``results``, which lie in the storage ``key``, as views of its input or of a copy of ``first``."""
    chains = {node: _chain(node, key) for node in results}
    if any(chain is None for chain in chains.values()):
        return False
    with output.graph.inserting_before(output):
        made: dict[fx.Node, fx.Node] = {}
        if first.op not in INPUT_OPS:
            made[first] = output.graph.call_function(torch.clone, (first,))
        for node, chain in chains.items():
            output.replace_input_with(node, _replayed(output.graph, chain or [], made))
    for node in sorted({node for chain in chains.values() for node in chain or ()}, reverse=True):
        if not node.users and not info(node).writes and node.op not in INPUT_OPS:
            output.graph.erase_node(node)
    return True


def _chain(node: fx.Node, key: int) -> list[fx.Node] | None:
    """From what the storage begins with to ``node``, each showing memory of the one before; None if that is not all."""
    chain = [node]
    while sources := [one for one in node.all_input_nodes if key in info(one).storages]:
        if key in info(node).writes:
            sources = [one for one in sources if _alike(one, node)]
        if not sources or not (is_view(info(node)) or info(node).writes):
            return None
        node = sources[0]
        chain.append(node)
    return chain[::-1]


def _replayed(graph: fx.Graph, chain: Sequence[fx.Node], made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The last of a chain without what writes in it; ``made`` has the nodes that stand in the place of others."""
    place = made.setdefault(chain[0], chain[0])
    for before, node in zip(chain, chain[1:], strict=False):
        if node not in made:
            view = partial(_instead, before, place)
            made[node] = place if info(node).writes else graph.node_copy(node, view)
        place = made[node]
    return place


def _instead(old: fx.Node, new: fx.Node, argument: fx.Node) -> fx.Node:
    return new if argument is old else argument


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes show the same memory in the same way."""
    a, b = info(one).value, info(other).value
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.dtype == b.dtype and (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


__all__ = ["return_views"]
