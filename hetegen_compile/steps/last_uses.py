"""When a step may let go of its values: each dies behind the last node that reads it."""

from __future__ import annotations

from torch import fx

from hetegen_compile import ir


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values (itself, if nothing reads it) that nothing reads after it."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "output" or _makes_nothing(node):
            continue
        last = max(node.users, key=order.__getitem__, default=node)
        dying.setdefault(last, []).append(node)
    return dying


def _makes_nothing(node: fx.Node) -> bool:
    nothing = (ir.TWIN, ir.WRITE_BACK, ir.PREFETCH_AHEAD, ir.CAUGHT_UP)
    return node.target in nothing or (node.op == "placeholder" and not node.users)


__all__ = ["last_uses"]
