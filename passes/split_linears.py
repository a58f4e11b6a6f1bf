"""Each Linear becomes a host part, accelerator parts with a prefetch or a resident weight, and a join.

Why: the host and the link then work on one Linear at the same time, and no matrix has to be on the
accelerator as a whole. Parts are in the order of their rows.

Before:

    y = linear(x, w, b, 0)                       # rows [0, 64) host, [64, 128) streamed, [128, 192) resident

After (transfers of activations come in the next pass; a weight that is not pinned is staged first:
``p = stage(w, [64, 128], 0, offset, []); t = prefetch(p, [0, 64], 0, offset, [])``):

    t = prefetch(w, [64, 128], 0, offset, [])
    s = partial_linear(x, wait(t), b, 64, 128, 0)
    _ = release(t)
    r = partial_linear(x, resident(w, 128, 192), b, 128, 192, 0)
    h = host_linear(x, w, b, 0, 64, 0)
    y = join([h, s, r], 0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import Tensor, fx

from hetegen_compile import ir
from hetegen_compile.ir import NodeInfo, Side, annotate, info
from hetegen_compile.passes.context import Context, LinearPlan, require

UNASSIGNED = -1
"""Offset of a prefetch whose slot the scheduler has not assigned yet."""


def split_linears(module: fx.GraphModule, context: Context) -> None:
    """Rewrite every ``hetegen.linear`` as its plan says."""
    splits = require(context.splits, "choose_splits")
    shapes: dict[object, Tensor] = {}
    for node in list(module.graph.nodes):
        if node.target == ir.LINEAR:
            with module.graph.inserting_before(node):
                _Splitter(module.graph, node, splits[info(node).position], shapes, context.staged).split()


@dataclass
class _Splitter:
    """Parts of one Linear. Notes of parts of equal length are the same object: a schedule has thousands of parts."""

    graph: fx.Graph
    node: fx.Node
    plan: LinearPlan
    shapes: dict[object, Tensor]
    staged: Mapping[str, str]
    notes: dict[tuple[str, int, Side | None], NodeInfo] = field(default_factory=dict)

    def split(self) -> None:
        self.x, self.weight, self.bias, self.dim = self.node.args
        parts = []
        accelerator = [self._streamed(lo, hi) for lo, hi in self.plan.streamed]
        if self.plan.resident is not None:
            accelerator.append(self._resident(*self.plan.resident))
        if self.plan.host:
            parts.append(self._host(0, self.plan.host, with_bias=bool(self.dim == 0 or not accelerator)))
        join = ir.call(self.graph, ir.JOIN, ([*parts, *accelerator], self.dim))
        nothing = frozenset[int]()
        annotate(join, info(self.node), side="accelerator", flops=sympy.Integer(0), reads=nothing, writes=nothing)
        self.node.replace_all_uses_with(join)
        self.graph.erase_node(self.node)

    def _call(self, target: object, args: tuple[object, ...], notes: NodeInfo) -> fx.Node:
        return annotate(ir.call(self.graph, target, args), notes)

    def _rows(self, length: int, side: Side | None = "accelerator") -> NodeInfo:
        """What is known of so many rows of the weight on the accelerator or on their way."""
        key = "rows", length, side
        if key not in self.notes:
            weight: Tensor = info(self.weight).value  # type: ignore[arg-type]
            self.notes[key] = self._noted(self._fake(weight, 0, length), side, sympy.Integer(0))
        return self.notes[key]

    def _part(self, length: int, side: Side) -> NodeInfo:
        """What is known of one part's result: some of the columns, or a partial sum."""
        key = "part", length, side
        if key not in self.notes:
            whole = info(self.node)
            columns = length if self.dim == 0 else int(whole.value.shape[-1])
            value = self._fake(whole.value, whole.value.dim() - 1, columns)
            self.notes[key] = self._noted(value, side, whole.flops * sympy.Rational(length, self.plan.rows))
        return self.notes[key]

    def _noted(self, value: Tensor, side: Side | None, flops: sympy.Expr) -> NodeInfo:
        whole = info(self.node)
        return NodeInfo(value=value, side=side, flops=flops, module=whole.module, position=whole.position)

    def _fake(self, whole: Tensor, dim: int, length: int) -> Tensor:
        """A fresh fake of ``whole`` narrowed to a length; equal layers share one, nothing tells them apart."""
        shape = (*whole.shape[:dim], length, *whole.shape[dim + 1 :])
        key = (str(shape), whole.dtype)
        if key not in self.shapes:
            self.shapes[key] = whole.new_empty(shape)
        return self.shapes[key]

    def _streamed(self, lo: int, hi: int) -> fx.Node:
        rows = self._rows(hi - lo)
        transfer = self._call(ir.PREFETCH, (*self._source(lo, hi), 0, UNASSIGNED, []), rows)
        arrived = self._call(ir.WAIT, (transfer,), rows)
        part = self._accelerator(arrived, lo, hi, first=lo == self.plan.host)
        self._call(ir.RELEASE, (transfer,), rows)
        return part

    def _source(self, lo: int, hi: int) -> tuple[object, list[int]]:
        """What a prefetch of rows ``lo:hi`` reads, and which of its rows."""
        weight: Any = self.weight
        if weight.name not in self.staged:
            return weight, [lo, hi]
        stage = self._call(ir.STAGE, (weight, [lo, hi], 0, UNASSIGNED, []), self._rows(hi - lo, side=None))
        return stage, [0, hi - lo]

    def _resident(self, lo: int, hi: int) -> fx.Node:
        weight = self._call(ir.RESIDENT, (self.weight, lo, hi), self._rows(hi - lo))
        return self._accelerator(weight, lo, hi, first=not self.plan.streamed)

    def _accelerator(self, weight: fx.Node, lo: int, hi: int, *, first: bool) -> fx.Node:
        bias = self.bias if self.dim == 0 or first else None
        arguments = (self.x, weight, bias, lo, hi, self.dim)
        return self._call(ir.PARTIAL_LINEAR, arguments, self._part(hi - lo, "accelerator"))

    def _host(self, lo: int, hi: int, *, with_bias: bool) -> fx.Node:
        arguments = (self.x, self.weight, self.bias if with_bias else None, lo, hi, self.dim)
        return self._call(ir.HOST_LINEAR, arguments, self._part(hi - lo, "host"))


__all__ = ["UNASSIGNED", "split_linears"]
