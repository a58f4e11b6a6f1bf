"""Lives of values in program order, and the most bytes that are alive at once."""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from torch import fx

from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import INPUT_OPS, info
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.findings import Life, most_at_once
from hetegen_compile.passes.tensors import held_bytes, tensors_in


def activation_peak_bytes(module: fx.GraphModule, context: Context) -> int:
    """Most bytes that values made by the graph occupy at one time, views and in-place results counted once.

    A value lives from the node that makes its storage to the last node that reads or writes that storage.
    Inputs are not counted.
    """
    nodes = list(module.graph.nodes)
    inputs = frozenset[int]().union(*(info(n).storages for n in nodes if n.op in INPUT_OPS))
    lives = [life for key, life in storage_lives(nodes).items() if key not in inputs]
    return most_at_once((born, dies, context.room(size)) for born, dies, size in lives)


def storage_lives(nodes: Iterable[fx.Node]) -> dict[int, Life]:
    """(first place, last place, bytes) of each storage that the nodes touch, views counted with their base."""
    lives: dict[int, Life] = {}
    for place, node in enumerate(nodes):
        for tensor in tensors_in(info(node).value):
            key = storage_id(tensor)
            born, _, size = lives.get(key, (place, place, sympy.Integer(0)))
            lives[key] = born, place, larger(size, held_bytes(tensor))
        for key in (info(node).storages | info(node).reads) & lives.keys():
            born, _, size = lives[key]
            lives[key] = born, place, size
    return lives


def larger(one: sympy.Expr, other: sympy.Expr) -> sympy.Expr:
    """The larger of two numbers of bytes."""
    if one.is_Integer and other.is_Integer:  # ``Max`` takes two hundred times as long
        return one if one.p >= other.p else other
    return other if one in (0, other) else sympy.Max(one, other)


__all__ = ["activation_peak_bytes", "larger", "storage_lives"]
