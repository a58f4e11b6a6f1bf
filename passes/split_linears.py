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
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor, fx

from hetegen_compile import ir
from hetegen_compile.ir import NodeInfo, annotate, info
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
    graph: fx.Graph
    node: fx.Node
    plan: LinearPlan
    shapes: dict[object, Tensor]
    staged: Mapping[str, str]

    def split(self) -> None:
        self.x, self.weight, self.bias, self.dim = self.node.args
        parts = []
        accelerator = [self._streamed(lo, hi) for lo, hi in self.plan.streamed]
        if self.plan.resident is not None:
            accelerator.append(self._resident(*self.plan.resident))
        if self.plan.host:
            parts.append(self._host(0, self.plan.host, with_bias=bool(self.dim == 0 or not accelerator)))
        whole = info(self.node)
        join = self._call(ir.JOIN, ([*parts, *accelerator], self.dim), whole, side="accelerator")
        self.node.replace_all_uses_with(join)
        self.graph.erase_node(self.node)

    def _call(self, target: object, args: tuple[object, ...], base: NodeInfo, **changes: object) -> fx.Node:
        node = ir.call(self.graph, target, args)
        changes = {"flops": sympy.Integer(0), "position": info(self.node).position, **changes}
        return annotate(node, base, module=info(self.node).module, reads=frozenset(), writes=frozenset(), **changes)

    def _rows(self, lo: int, hi: int) -> NodeInfo:
        """What is known of rows ``lo:hi`` of the weight on the accelerator."""
        weight: Tensor = info(self.weight).value  # type: ignore[arg-type]
        return NodeInfo(value=self._fake(weight, 0, lo, hi), side="accelerator")

    def _part(self, lo: int, hi: int) -> NodeInfo:
        """What is known of one part's result: some of the columns, or a partial sum."""
        whole = info(self.node)
        last = whole.value.dim() - 1
        columns = (lo, hi) if self.dim == 0 else (0, int(whole.value.shape[-1]))
        share = sympy.Rational(hi - lo, self.plan.rows)
        return NodeInfo(
            value=self._fake(whole.value, last, *columns), flops=whole.flops * share, side="accelerator"
        )

    def _fake(self, whole: Tensor, dim: int, lo: int, hi: int) -> Tensor:
        """A fresh fake of ``whole`` narrowed to ``lo:hi``; equal layers share one, nothing tells them apart."""
        shape = (*whole.shape[:dim], hi - lo, *whole.shape[dim + 1 :])
        key = (str(shape), whole.dtype)
        if key not in self.shapes:
            self.shapes[key] = whole.new_empty(shape)
        return self.shapes[key]

    def _streamed(self, lo: int, hi: int) -> fx.Node:
        rows = self._rows(lo, hi)
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
        notes = self._rows(lo, hi)
        return self._call(ir.STAGE, (weight, [lo, hi], 0, UNASSIGNED, []), notes, side=None), [0, hi - lo]

    def _resident(self, lo: int, hi: int) -> fx.Node:
        weight = self._call(ir.RESIDENT, (self.weight, lo, hi), self._rows(lo, hi))
        return self._accelerator(weight, lo, hi, first=not self.plan.streamed)

    def _accelerator(self, weight: fx.Node, lo: int, hi: int, *, first: bool) -> fx.Node:
        bias = self.bias if self.dim == 0 or first else None
        part = self._part(lo, hi)
        return self._call(
            ir.PARTIAL_LINEAR, (self.x, weight, bias, lo, hi, self.dim), part, flops=part.flops
        )

    def _host(self, lo: int, hi: int, *, with_bias: bool) -> fx.Node:
        bias = self.bias if with_bias else None
        part = self._part(lo, hi)
        return self._call(
            ir.HOST_LINEAR, (self.x, self.weight, bias, lo, hi, self.dim), part, flops=part.flops, side="host"
        )


__all__ = ["UNASSIGNED", "split_linears"]
