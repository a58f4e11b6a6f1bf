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

The Linears of a block that is cut (``find_blocks``) have their parts along the block's intermediate: the first ones
are put together on the accelerator only, with zeros for the host's columns, and what lies between is done on the
host's columns there (``cut_blocks``). Columns ``[0, 64)`` of ``a = silu(linear(x, w1, b1, 0)); y = linear(a, w2, b2,
0)`` on the host:

    s1 = partial_linear(x, wait(prefetch(w1, [64, 256], 0, ...)), b1, 64, 256, 0)
    h1 = host_linear(x, w1, b1, 0, 64, 0)
    a = segment_2(pad(x, [s1], [64], 256))
    s2 = partial_linear(a[0], wait(prefetch(w2, [0, 128, 64, 256], 2, ...)), None, 64, 256, 0, 1)
    h2 = host_linear(silu(h1), w2, b2, 0, 64, 0, 1)
    y = join([h2, join([s2], 0)], 1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import sympy
from torch import Tensor, fx

from hetegen_compile import ir
from hetegen_compile.ir import NodeInfo, annotate, erase_dead_nodes, info
from hetegen_compile.passes.choose_residency import aligned
from hetegen_compile.passes.choose_splits import slice_bytes
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.cut_blocks import cut_block
from hetegen_compile.passes.findings import Block
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.streamed_parts import UNASSIGNED, of_slot


def split_linears(module: fx.GraphModule, context: Context) -> None:
    """Rewrite every ``hetegen.linear`` as its plan says."""
    splits = require(context.splits, "choose_splits")
    ring_bytes = require(context.residency, "choose_residency").ring_bytes
    blocks = {block.consumer: block for block in context.blocks}
    shapes: dict[object, Tensor] = {}
    parts: dict[int, list[fx.Node]] = {}
    for node in list(module.graph.nodes):
        if node.target == ir.LINEAR:
            plan = splits[info(node).position]
            with module.graph.inserting_before(node):
                splitter = _Splitter(module, node, plan, shapes, context.staged, ring_bytes, parts)
                splitter.split(blocks.get(info(node).position) if plan.block is not None else None)
    if any(plan.block is not None and plan.host == plan.rows for plan in splits.values()):
        erase_dead_nodes(module.graph)  # nothing is left of such a block on the accelerator


@dataclass
class _Splitter:
    """One Linear. ``parts`` are the host's parts of the blocks' first Linears, by position."""

    module: fx.GraphModule
    node: fx.Node
    plan: LinearPlan
    shapes: dict[object, Tensor]
    staged: Mapping[str, str]
    ring_bytes: int
    parts: dict[int, list[fx.Node]]

    def split(self, block: Block | None) -> None:
        """``block`` is the one that the Linear is the last of, if that is cut."""
        self.graph = self.module.graph
        self.x, self.weight, self.bias, self.dim = self.node.args
        self.sums = self.dim != self.plan.axis
        accelerator = [self._rectangles(*self.plan.streamed[0])] if self.plan.lines else self._rows()
        with_bias = not self.sums or not accelerator or bool(self.plan.lines)
        host_x = self.x if block is None else self._through(block)
        host = [self._host(host_x, lo, hi, with_bias=with_bias) for lo, hi in self.plan.host_ranges]
        if self.plan.block is None or block is not None:
            whole = self._call(ir.JOIN, ([*host, *accelerator], int(self.sums)), info(self.node), side="accelerator")
        else:
            self.parts[info(self.node).position] = host
            whole = self._padded(accelerator)
        self.node.replace_all_uses_with(whole)
        self.graph.erase_node(self.node)

    def _rows(self) -> list[fx.Node]:
        """The accelerator's parts in the order of their rows.

        The resident rows come behind the chunks that the ring holds at once: the others are still on their way.
        """
        there = self._chunks_there()
        parts = [self._streamed(lo, hi) for lo, hi in self.plan.streamed[:there]]
        resident = [] if self.plan.resident is None else [self._resident(*self.plan.resident)]
        return [*parts, *(self._streamed(lo, hi) for lo, hi in self.plan.streamed[there:]), *resident]

    def _chunks_there(self) -> int:
        """How many of the chunks, the first ones, fit into the ring."""
        width = slice_bytes(self.weight, self.plan.axis)  # type: ignore[arg-type]
        filled = accumulate(aligned((hi - lo) * width) for lo, hi in self.plan.streamed)
        return sum(nbytes <= self.ring_bytes for nbytes in filled)

    def _through(self, block: Block) -> fx.Node:
        """The host's columns of what a block's last Linear reads."""
        return cut_block(self.module, block, self.node, self.parts, self.plan.host)

    def _padded(self, accelerator: list[fx.Node]) -> fx.Node:
        """The whole result on the accelerator, zero where a block's host part is."""
        notes = info(self.node)
        starts = [lo for lo, _ in self.plan.streamed]
        arguments = (self.x, accelerator, starts, int(notes.value.shape[-1]))
        return self._call(ir.PAD, arguments, notes, side="accelerator")

    def _call(self, target: object, args: tuple[object, ...], base: NodeInfo, **changes: object) -> fx.Node:
        node = ir.call(self.graph, target, args)
        if not changes and base.position == info(self.node).position:
            return annotate(node, base)  # as ``_cut`` and ``_part`` note them: a schedule has thousands of parts
        changes = {"flops": sympy.Integer(0), "position": info(self.node).position, **changes}
        return annotate(node, base, module=info(self.node).module, reads=frozenset(), writes=frozenset(), **changes)

    def _cut(self, lo: int, hi: int, lines: tuple[int, int] | None = None) -> NodeInfo:
        """What is known of ``lo:hi`` of the weight (and of ``lines`` only along the other axis) on the accelerator."""
        weight: Tensor = info(self.weight).value  # type: ignore[arg-type]
        if lines is not None:
            weight = self._fake(weight, 1 - self.plan.axis, *lines)
        return self._noted(self._fake(weight, self.plan.axis, lo, hi))

    def _noted(self, value: Tensor, flops: sympy.Expr = sympy.S.Zero) -> NodeInfo:
        """Notes on a new value of the accelerator that comes from this Linear."""
        own = info(self.node)
        return NodeInfo(value=value, side="accelerator", flops=flops, module=own.module, position=own.position)

    def _part(self, lo: int, hi: int) -> NodeInfo:
        """What is known of one part's result: some of the columns, or a partial sum."""
        whole = info(self.node)
        last = whole.value.dim() - 1
        columns = (0, int(whole.value.shape[-1])) if self.sums else (lo, hi)
        share = sympy.Rational(hi - lo, self.plan.rows)
        return self._noted(self._fake(whole.value, last, *columns), whole.flops * share)

    def _fake(self, whole: Tensor, dim: int, lo: int, hi: int) -> Tensor:
        """A fresh fake of ``whole`` narrowed to ``lo:hi``; equal layers share one, nothing tells them apart."""
        old = whole.shape
        shape = (*old[:dim], hi - lo, *old[dim + 1 :])
        key = (tuple(size if type(size) is int else str(size) for size in shape), whole.dtype)
        if key not in self.shapes:
            self.shapes[key] = whole.new_empty(shape)
        return self.shapes[key]

    def _streamed(self, lo: int, hi: int) -> fx.Node:
        first = (lo, hi) == self.plan.streamed[0]
        return self._of_slot([lo, hi], self._cut(lo, hi), lambda rows: self._accelerator(rows, lo, hi, first=first))

    def _of_slot(self, ranges: list[int], notes: NodeInfo, part: Callable[[fx.Node], fx.Node]) -> fx.Node:
        weight: Any = self.weight
        dim = ir.RECTANGLE if len(ranges) > 2 else self.plan.axis
        return of_slot(self._call, weight, ranges, dim, notes, self.staged, part)

    def _rectangles(self, lo: int, hi: int) -> fx.Node:
        """The partial sum of columns ``lo:hi`` of a weight [out, in], in pieces of its rows, side by side."""
        parts = [self._rectangle(lines, (lo, hi)) for lines in self.plan.lines]
        return self._call(ir.JOIN, (parts, 0), info(self.node), side="accelerator")

    def _rectangle(self, lines: tuple[int, int], columns: tuple[int, int]) -> fx.Node:
        notes, whole = self._cut(*columns, lines), info(self.node)
        flops = whole.flops * sympy.Rational(notes.value.numel(), info(self.weight).value.numel())  # type: ignore[arg-type]
        part = NodeInfo(value=self._fake(whole.value, whole.value.dim() - 1, *lines), side="accelerator")

        def partial_sum(rectangle: fx.Node) -> fx.Node:
            arguments = (self.x, rectangle, None, *self._range(*columns))
            return self._call(ir.PARTIAL_LINEAR, arguments, part, flops=flops)

        return self._of_slot([*lines, *columns], notes, partial_sum)

    def _resident(self, lo: int, hi: int) -> fx.Node:
        weight = self._call(ir.RESIDENT, (self.weight, lo, hi), self._cut(lo, hi))
        return self._accelerator(weight, lo, hi, first=not self.plan.streamed)

    def _accelerator(self, weight: fx.Node, lo: int, hi: int, *, first: bool) -> fx.Node:
        bias = None if self.sums and not first else self.bias
        part = self._part(lo, hi)
        return self._call(ir.PARTIAL_LINEAR, (self.x, weight, bias, *self._range(lo, hi)), part)

    def _host(self, x: object, lo: int, hi: int, *, with_bias: bool) -> fx.Node:
        bias = self.bias if with_bias else None
        part = self._part(lo, hi)
        arguments = (x, self.weight, bias, *self._range(lo, hi))
        return self._call(ir.HOST_LINEAR, arguments, part, flops=part.flops, side="host")

    def _range(self, lo: int, hi: int) -> tuple[object, ...]:
        """The operands that say which part it is; a cut by rows is the default and not written."""
        return (lo, hi, self.dim, self.plan.axis) if self.plan.axis else (lo, hi, self.dim)


__all__ = ["UNASSIGNED", "split_linears"]
