"""What the host makes and the accelerator then writes in place is copied first, and the copy is written.

Why: an embedding's table stays on the host, and so does what is looked up in it. A model that scales it in place
(``x *= 8``) would have the accelerator write what the host has, and no transfer of values keeps such a storage
in step. The copy is the accelerator's own from the start, views of it included. Its segment makes one
kernel of copy and write.

Before:

    x = embedding(ids, table); y = x.mul_(8); z = linear(y, w)

After:

    x = embedding(ids, table); c = clone(x); y = c.mul_(8); z = linear(y, w)
"""

from __future__ import annotations

import torch
from torch import fx

from hetegen_compile.ir import NodeInfo, info, is_tensor, writers_of


def copy_before_writes(graph: fx.Graph) -> bool:
    """Insert the copies into a captured graph; returns whether there are any, which have no notes yet."""
    writers = writers_of(graph.nodes)
    made = [node for node in graph.nodes if is_tensor(node) and _is_hosts(info(node))]
    found = [node for node in made if _is_written_elsewhere(node, writers)]
    for node in found:
        _copy(graph, node)
    return bool(found)


def _is_hosts(notes: NodeInfo) -> bool:
    """Whether a node runs on the host as a rule: lookups in tables, random numbers, shapes that depend on data."""
    return "embedding" in notes.aten or notes.random or notes.data_dependent


def _is_written_elsewhere(node: fx.Node, writers: dict[int, list[fx.Node]]) -> bool:
    """Whether the node makes new memory that a node of the other side writes."""
    new = info(node).storages - info(node).reads
    return any(not _is_hosts(info(writer)) for key in new for writer in writers.get(key, ()))


def _copy(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        copy = graph.call_function(torch.clone, (node,))
    copy.meta.update({key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta})
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


__all__ = ["copy_before_writes"]
