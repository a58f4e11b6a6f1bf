"""Runs: what the host computes without anything in between, host Linears among it, which becomes one host program.

Before:                                          After:

    h = host(op_1, linear_1, (x, w1[0:64], b1))      _run = host(op_3, program, (w1[0:64], w2[:, 0:64], x, b1))
    a = host(op_2, relu, (h,))                       p = _run[0]
    p = host(op_3, linear_2, (a, w2[:, 0:64], None))

What nothing outside a run reads has no name in the step. Whether a run is computed natively is decided by what it is
called with (``host_kernels.program``); what it computes is the same either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx

from hetegen_compile import ir
from hetegen_compile.host_kernels import HostLinear
from hetegen_compile.host_kernels.program import HostProgram, Place, Step, pointwise_name
from hetegen_compile.ir import info
from hetegen_compile.operands import linear_part
from hetegen_compile.steps.host_functions import host_function

Linears = Mapping[fx.Node, HostLinear]
"""The kernels of the host's parts that our own kernels compute."""


@dataclass(frozen=True)
class HostRun:
    """Nodes that follow each other, and how they are called as one.

    Attributes:
        nodes: in issue order.
        given: the nodes that the program's arguments come from; of a weight, its rows.
        rows: which of ``given`` are weights, with the host's part that reads their rows.
        results: the nodes that others read.
        program: computes them.
    """

    nodes: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    rows: Mapping[int, fx.Node]
    results: tuple[fx.Node, ...]
    program: HostProgram


def host_runs(graph: fx.Graph, linears: Linears, ahead_bytes: int = 0) -> list[HostRun]:
    """All runs of the graph with a host part in them, in issue order; trips with them read ``ahead_bytes`` ahead."""
    groups = [
        tuple(nodes) for kind, nodes in groupby(graph.nodes, lambda node: _kind(node, linears)) if kind is not None
    ]
    found = [nodes for nodes in groups if any(node in linears for node in nodes)]
    return [_Builder(nodes, linears, ahead_bytes).run() for nodes in found]


def _kind(node: fx.Node, linears: Linears) -> bool | None:
    """Of what may be part of a run, whether it is the worker's: a run is of one of them."""
    return info(node).ahead if node in linears or _is_pointwise(node) else None


def _is_pointwise(node: fx.Node) -> bool:
    """Whether it has a native form, and tensors of the host alone to read."""
    notes = info(node)
    if notes.side != "host" or notes.writes or notes.random or not ir.is_tensor(node):
        return False
    return bool(pointwise_name(node.target, node.args, node.kwargs)) and all(map(_is_host_tensor, _operands(node)))


def _operands(node: fx.Node) -> tuple[Any, ...]:
    count = 2 if pointwise_name(node.target, node.args, node.kwargs) == "mul" else 1
    return node.args[:count]


def _is_host_tensor(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and ir.is_tensor(operand) and info(operand).side != "accelerator"


class _Builder:
    """Gives every value of a run its place."""

    def __init__(self, nodes: tuple[fx.Node, ...], linears: Linears, ahead_bytes: int) -> None:
        self._nodes = nodes
        self._linears = linears
        self._ahead_bytes = ahead_bytes
        own, parts = frozenset(nodes), [node for node in nodes if node in linears]
        read = dict.fromkeys(operand for node in nodes for operand in self._read(node) if operand not in own)
        # each part reads rows of its own, also where two are of one weight, or a weight is read as it is, too
        self._rows = dict(enumerate(parts))
        self._given = [*(linear_part(part).weight for part in parts), *read]
        self._weights = {part: Place(index) for index, part in self._rows.items()}
        values = [*read, *nodes]
        self._place = {node: Place(index) for index, node in enumerate(values, start=len(parts))}

    def _read(self, node: fx.Node) -> list[fx.Node]:
        if node not in self._linears:
            return list(_operands(node))
        part = linear_part(node)
        return [part.x] if part.bias is None else [part.x, part.bias]

    def run(self) -> HostRun:
        own = frozenset(self._nodes)
        results = tuple(node for node in self._nodes if any(user not in own for user in node.users))
        steps, places = [self._step(node) for node in self._nodes], [self._place[node] for node in results]
        program = HostProgram(steps, len(self._given), places, self._ahead_bytes)
        return HostRun(self._nodes, tuple(self._given), self._rows, results, program)

    def _step(self, node: fx.Node) -> Step:
        if node in self._linears:
            part = linear_part(node)
            places = (self._place[part.x], self._weights[node], None if part.bias is None else self._place[part.bias])
            return Step(self._linears[node], places, places, {})
        operands = tuple(self._place[operand] for operand in _operands(node))
        args = (*operands, *node.args[len(operands) :])
        name = pointwise_name(node.target, node.args, node.kwargs)
        return Step(host_function(node), operands, args, node.kwargs, name)


def dying_behind(dying: Mapping[fx.Node, list[fx.Node]], runs: Iterable[HostRun]) -> dict[fx.Node, list[fx.Node]]:
    """What dies behind each line of a step, where runs are one line: of what is inside, nothing has a name."""
    found = dict(dying)
    for run in runs:
        unnamed = set(run.nodes) - set(run.results)
        dead = [one for node in run.nodes for one in found.pop(node, ()) if one not in unnamed]
        if dead:
            found[run.nodes[-1]] = dead
    return found


__all__ = ["HostRun", "dying_behind", "host_runs"]
