"""Each product with streamed experts becomes a host part, a part for each chunk of the rest, and a join.

Why: no stack has to be on the accelerator as a whole, and host and link work on it at the same time. The accelerator's
parts follow each other, each adding its experts' rows to those before. How many rows an expert has the host reads from
``ends`` when it issues a part, so that comes down first.

Before:

    y = grouped(x, stack, ends, 0, "_grouped_mm")             # eight experts: two the host's, three in a chunk

After (transfers of activations come in a later pass; a stack that is not pinned is staged first, as weights of Linears
are):

    t = prefetch(stack, [2, 5], 0, offset, [])
    p = partial_grouped(x, wait(t), ends, None, 2, 0); _ = release(t)
    u = prefetch(stack, [5, 8], 0, offset, [])
    q = partial_grouped(x, wait(u), ends, p, 5, 0); _ = release(u)
    h = host_grouped(x, stack, ends, 2, 0, "_grouped_mm")
    y = join([h, q], 1)
"""

from __future__ import annotations

import functools
from typing import Any

import sympy
from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import NodeInfo, annotate, info
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.stream_experts import grouped_nodes
from hetegen_compile.passes.streamed_parts import of_slot


def split_experts(module: fx.GraphModule, context: Context) -> None:
    """Rewrite every ``hetegen.grouped`` as its plan says."""
    splits = require(context.splits, "choose_splits")
    for position, node in grouped_nodes(module).items():
        with module.graph.inserting_before(node):
            whole = _Splitter(node, splits[position], context).whole()
        node.replace_all_uses_with(whole)
        module.graph.erase_node(node)


class _Splitter:
    def __init__(self, node: fx.Node, plan: LinearPlan, context: Context) -> None:
        self._node = node
        self._plan = plan
        self._context = context
        self._x, self._stack, self._ends, self._dim, self._product = node.args
        notes = info(node)
        self._noted = functools.partial(NodeInfo, module=notes.module, position=notes.position)

    def whole(self) -> fx.Node:
        """The parts put together."""
        known: fx.Node | None = None
        for lo, hi in self._plan.streamed:
            known = self._streamed(lo, hi, known)
        parts = [] if known is None else [known]
        if self._plan.host:
            arguments = (self._x, self._stack, self._ends, self._plan.host, self._dim, self._product)
            parts.insert(0, self._call(ir.HOST_GROUPED, arguments, self._made(self._plan.host, "host")))
        notes = info(self._node)
        changes = {"flops": sympy.Integer(0), "side": "accelerator", "reads": frozenset(), "writes": frozenset()}
        return self._call(ir.JOIN, (parts, 1), notes, **changes)

    def _streamed(self, lo: int, hi: int, others: fx.Node | None) -> fx.Node:
        whole = info(self._stack).value  # type: ignore[arg-type]
        brought = self._noted(value=whole.new_empty((hi - lo, *whole.shape[1:])), side="accelerator")

        def part(matrices: fx.Node) -> fx.Node:
            arguments = (self._x, matrices, self._ends, others, lo, self._dim)
            return self._call(ir.PARTIAL_GROUPED, arguments, self._made(hi - lo, "accelerator"))

        return of_slot(self._call, self._stack, [lo, hi], 0, brought, self._context.staged, part)  # type: ignore[arg-type]

    def _made(self, groups: int, side: ir.Side) -> NodeInfo:
        value = info(self._node).value
        flops = info(self._node).flops * sympy.Rational(groups, self._plan.rows)
        return self._noted(value=value.new_empty(value.shape), flops=flops, side=side)

    def _call(self, target: Any, arguments: tuple[Any, ...], notes: NodeInfo, **changes: Any) -> fx.Node:
        return annotate(ir.call(self._node.graph, target, arguments), notes, **changes)


__all__ = ["split_experts"]
