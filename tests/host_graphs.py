"""Schedules of the host's side alone, built node by node: what runs are found in, and what a step is bound of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from hetegen_compile import ir
from hetegen_compile.host_kernels import VECTORISED, HostLinear
from hetegen_compile.ir import info
from hetegen_compile.steps.host_runs import HostRun, host_runs
from tests.host_kernels.programs import random as numbers


class Host:
    """A schedule of the host's side, node by node; each node's note has the very value that eager computes."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.linears: dict[fx.Node, HostLinear] = {}

    def given(self, name: str, *shape: int, **notes: Any) -> fx.Node:
        return ir.annotate(self.graph.placeholder(name), value=numbers(*shape, seed=len(self.graph.nodes)), **notes)

    def call(self, name: str, target: Any, *args: Any, op: str = "call_function", **notes: Any) -> fx.Node:
        kwargs: dict[str, Any] = notes.pop("kwargs", {})
        node = self.graph.create_node(op, target, args, kwargs, name)
        function = getattr(Tensor, target) if op == "call_method" else target
        value = function(*fx.map_arg(args, lambda one: info(one).value.clone()), **kwargs)
        return ir.annotate(node, **{"value": value, "side": "host", "aten": (name,), **notes})

    def linear(
        self,
        name: str,
        x: fx.Node,
        weight: fx.Node,
        bias: fx.Node | None,
        lo: int,
        hi: int,
        axis: int = 0,
        **notes: Any,
    ) -> fx.Node:
        node = self.call(name, ir.HOST_LINEAR, x, weight, bias, lo, hi, 0, axis, **notes)
        self.linears[node] = HostLinear(lo, hi, 0, ((math.inf, VECTORISED),), axis)
        return node

    def end(self, *results: fx.Node) -> Host:
        self.graph.output(results)
        return self

    def runs(self) -> list[HostRun]:
        return host_runs(self.graph, self.linears)

    def names(self) -> list[list[str]]:
        return [names_of(run.nodes) for run in self.runs()]


def names_of(nodes: Iterable[fx.Node]) -> list[str]:
    return [node.name for node in nodes]


Between = Callable[[Host, fx.Node], fx.Node]
"""Makes the second Linear's operand of the first one's result."""


def mlp(between: Between | None = None, **down: Any) -> Host:
    """``up``, what ``between`` makes of its result, ``down``; ``down`` are notes on the last."""
    host = Host()
    x, w_up, b_up, w_down = (
        host.given(name, *shape) for name, shape in (("x", (2, 16)), ("wu", (32, 16)), ("bu", (32,)), ("wd", (8, 40)))
    )
    hidden = host.linear("up", x, w_up, b_up, 4, 28)
    hidden = host.call("act", torch.relu, hidden) if between is None else between(host, hidden)
    return host.end(host.linear("down", hidden, w_down, None, 0, 24, axis=1, **down))
