"""What a schedule occupies on the accelerator, in issue order, as expressions over the graph's sizes.

Why: the budget is hard, so it is checked against the schedule and not against an estimate; and sizes change
from call to call (a cache grows), so what is kept are expressions. A later call with larger sizes is then
checked in milliseconds and not planned again.

A value lives from the node that makes its storage to the last node that touches it; what a download reads,
until the host has waited; what becomes a mirror, all the time, since in the next step it is there from the
start: a prefill's plan then holds for the decode steps after it. What goes up from the host may be made as soon as
the host has the operands for it, that is while the accelerator is still at the last download that the host has
waited for; a small transfer is read where it lies and takes nothing. Inner values of segments have points of their
own between those of the schedule's nodes, as if nothing were fused, and operations of several kernels count all that
these make: an upper bound for compiled code. Parts of a Linear and what puts them together count what their kernels
make beside their result.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sympy
from torch import Tensor, fx

from hetegen_compile import ir
from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import INPUT_OPS, info
from hetegen_compile.operands import linear_part
from hetegen_compile.passes.annotate_costs import value_size
from hetegen_compile.passes.append_behind import appends, lengthens
from hetegen_compile.passes.caches import block_size
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.findings import Life, MemoryNeed
from hetegen_compile.passes.liveness import larger, storage_lives
from hetegen_compile.passes.pieces import passed_on, sent_bytes, taken_by

_NOT_VALUES = (
    ir.MIRROR, ir.RESIDENT, ir.STAGE, ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED, ir.WAIT, ir.RELEASE,
    ir.TO_ACCELERATOR, ir.WAIT_ACCELERATOR,
)  # fmt: skip


def measure_memory(module: fx.GraphModule, context: Context) -> MemoryNeed:
    """Lives of all values of a schedule, and the workspace of each node that has one."""
    return _Meter(module, context).measure()


@dataclass(frozen=True)
class SegmentLives:
    """What a segment's values occupy.

    Attributes:
        storages: bytes of each storage that its nodes touch.
        inner: lives of the values that it makes and does not return, in places of its own order.
    """

    storages: Mapping[int, sympy.Expr]
    inner: Sequence[Life]


_KNOWN = WeakKeyDictionary[fx.GraphModule, SegmentLives]()


def segment_lives(segment: fx.GraphModule) -> SegmentLives:
    """Storages and inner values of a segment, looked at once: all schedules of a graph share it and none changes it."""
    if segment not in _KNOWN:
        _KNOWN[segment] = _segment_lives(segment)
    return _KNOWN[segment]


def _segment_lives(segment: fx.GraphModule) -> SegmentLives:
    inputs = [node for node in segment.graph.nodes if node.op in INPUT_OPS]
    returned = segment.graph.output_node().all_input_nodes
    outside = frozenset[int]().union(*(info(node).storages for node in (*inputs, *returned)))
    lives = storage_lives(segment.graph.nodes)
    inner = [life for key, life in lives.items() if key not in outside]
    inner += [
        (place, place, scratch) for place, node in enumerate(segment.graph.nodes) if (scratch := _scratch(node)) != 0
    ]
    return SegmentLives({key: size for key, (_, _, size) in lives.items()}, inner)


def _segments(module: fx.GraphModule) -> dict[fx.Node, fx.GraphModule]:
    """The segments that are not compiled yet, by the nodes that call them."""
    calls = module.graph.find_nodes(op="call_module")
    found = {call: module.get_submodule(str(call.target)) for call in calls}
    return {call: segment for call, segment in found.items() if isinstance(segment, fx.GraphModule)}


def _appended(segments: Iterable[fx.GraphModule]) -> tuple[frozenset[int], list[Tensor]]:
    """The storages of caches that segments lengthen where they lie, and the caches that they make with room."""
    made = [node for segment in segments for node in segment.graph.nodes if appends(node)]
    longer = frozenset[int]().union(*(info(node).storages for node in made if lengthens(node)))
    return longer, [info(node).value for node in made if not lengthens(node)]


def _scratch(node: fx.Node) -> sympy.Expr:
    """What an operation of several kernels makes beside its result (the statistics of a norm, a softmax)."""
    return info(node).made_bytes - value_size(node) if info(node).made_bytes != 0 else sympy.Integer(0)


class _Meter:
    def __init__(self, module: fx.GraphModule, context: Context) -> None:
        self._context = context
        self._nodes = list(module.graph.nodes)
        self._segments = _segments(module)
        lives = {call: segment_lives(segment) for call, segment in self._segments.items()}
        self._inner = {call: found.inner for call, found in lives.items()}
        self._bases = {key: size for found in lives.values() for key, size in found.storages.items()}
        self._longer, made = _appended(self._segments.values())
        self._bases |= {storage_id(cache): block_size(cache, context) for cache in made}
        own = (*self._nodes, *(node for segment in self._segments.values() for node in segment.graph.nodes))
        self._written = frozenset[int]().union(*(info(node).writes for node in own))
        self._points = self._points_of_nodes()
        self._end = max(last for _, last in self._points.values())
        self._received = self._worker_has_received()
        self._behind = self._where_the_accelerator_is_at_least()

    def measure(self) -> MemoryNeed:
        workspace = {node: size for node in self._nodes if (size := self._workspace(node))}
        lives, uploads = self._values()
        lives += self._inner_lives()
        lives += [(*self._points[node], size) for node, size in workspace.items() if node.op != "call_module"]
        return MemoryNeed(tuple(lives), workspace, self._context.largest_twice, tuple(uploads))

    def _points_of_nodes(self) -> dict[fx.Node, tuple[int, int]]:
        """First and last point of each node: a segment has one for each of its own nodes."""
        points, point = {}, 0
        for node in self._nodes:
            length = len(self._segments[node].graph.nodes) if node in self._segments else 1
            points[node] = (point, point + length - 1)
            point += length
        return points

    def _inner_lives(self) -> list[Life]:
        first = {call: self._points[call][0] for call in self._inner}
        return [(first[call] + born, first[call] + dies, size) for call, lives in self._inner.items()
                for born, dies, size in lives]  # fmt: skip

    def _where_the_accelerator_is_at_least(self) -> dict[fx.Node, int]:
        """For each upload the point that the accelerator has passed when the host issues it."""
        passed, behind = 0, {}
        for node in self._nodes:
            if node.target == ir.WAIT_HOST and not info(node).ahead:
                (transfer,) = node.all_input_nodes
                passed = max(passed, self._points[transfer][0])
            behind[node] = passed
        return behind

    def _worker_has_received(self) -> dict[fx.Node, int]:
        """For each download that the worker waits for the point at which the issuing thread knows that it has."""
        received, under_way = {}, dict[fx.Node, int]()
        for node in self._nodes:
            if node.target == ir.WAIT_HOST and info(node).ahead:
                under_way[node] = self._end
            if node.target == ir.CAUGHT_UP:
                (sent,) = node.all_input_nodes
                over = [wait for wait in under_way if self._points[wait] < self._points[sent]]
                received.update(dict.fromkeys(over, self._points[node][0]))
                for wait in over:
                    del under_way[wait]
        return {**under_way, **received}

    def _values(self) -> tuple[list[Life], list[Life]]:
        """The lives of pieces of memory and, on a GPU, apart from them those of what the link's queue brings up."""
        mirrored = frozenset[int]().union(*(info(node).storages for node in self._nodes if node.target == ir.MIRROR))
        pieces: dict[object, list[fx.Node]] = {}
        same: dict[object, object] = {}
        for node in self._nodes:
            if info(node).side != "accelerator" or node.op == "call_module" or node.target in _NOT_VALUES:
                continue
            keys = info(node).storages
            if keys & mirrored or keys & self._longer:  # a longer cache lies where the shorter one's mirror does
                continue
            key: object = keys or node
            part = passed_on(node, self._written)
            if part is not None:
                same[key] = _resolved(info(part).storages or part, same)
            pieces.setdefault(_resolved(key, same), []).append(node)
        lives: tuple[list[Life], list[Life]] = [], []
        for nodes in pieces.values():
            transfer = self._sent_by(nodes)
            apart = self._context.largest_twice and transfer is not None and self._is_queued(transfer)
            lives[apart].append(self._life(nodes, transfer))
        return lives

    def _is_queued(self, transfer: fx.Node) -> bool:
        """Whether it is too large for a kernel to read up."""
        return self._context.room(sent_bytes(transfer)) > ir.SMALL_UPLOAD_BYTES

    def _life(self, nodes: Sequence[fx.Node], transfer: fx.Node | None) -> Life:
        """That of a piece of memory, by the values that lie in it; ``transfer``: what it came up with."""
        size: sympy.Expr = sympy.Integer(0)
        for node in nodes:
            # a value may be a view of something larger that only its segment saw
            whole = [value_size(node), *(self._bases[key] for key in info(node).storages if key in self._bases)]
            size = functools.reduce(larger, whole, size)
        size = size if transfer is None else taken_by(transfer, size)
        return min(map(self._born, nodes)), max(map(self._last_use, nodes)), size

    def _sent_by(self, nodes: Sequence[fx.Node]) -> fx.Node | None:
        """The transfer that a piece of memory came up with, views of it included; None: some of it is made there."""
        keys = frozenset[int]().union(*(info(node).storages for node in nodes))
        waits: set[fx.Node] = set()
        for node in nodes:
            made_by = _maker(node)
            if made_by.target == ir.WAIT_ACCELERATOR:
                waits.add(made_by)
            elif made_by.op == "call_module":
                if not any(info(given).storages & keys for given in made_by.all_input_nodes):
                    return None
            elif passed_on(node, self._written) is None:
                return None
        return waits.pop().all_input_nodes[0] if len(waits) == 1 else None

    def _born(self, node: fx.Node) -> int:
        if any(user.target == ir.TWIN for user in node.users):
            return 0
        made_by = _maker(node)
        if made_by.target == ir.WAIT_ACCELERATOR:
            return self._behind[made_by.all_input_nodes[0]]
        return self._points[made_by][0]

    def _last_use(self, node: fx.Node) -> int:
        last = self._points[node][1]
        for user in node.users:
            if user.target == ir.TO_HOST:  # what is waited for later is in use until then
                waits = [self._received.get(wait, self._points[wait][1]) for wait in user.users]
                last = max(last, self._points[user][1], *waits)
            else:
                last = max(last, self._end if user.target == ir.TWIN else self._points[user][1])
        return last

    def _workspace(self, node: fx.Node) -> sympy.Expr:
        if node.op == "call_module":
            inner = MemoryNeed(tuple(self._inner.get(node, ())), {}, self._context.largest_twice)
            return sympy.Integer(inner.peak_bytes(self._context.room)) if inner.lives else sympy.Integer(0)
        if node.target == ir.PARTIAL_LINEAR:
            return _partial_size(node)
        if node.target == ir.JOIN and node.args[1] == 1:
            return _sum_size(node)
        if node.target == ir.PAD:
            return _zeros_size(node)
        return sympy.Integer(0)


def _maker(node: fx.Node) -> fx.Node:
    """The node that made a value, which may be an item of what that gave."""
    return node.args[0] if node.target is operator.getitem and isinstance(node.args[0], fx.Node) else node


def _resolved(key: object, same: Mapping[object, object]) -> object:
    return same.get(key, key)


def _partial_size(partial: fx.Node) -> sympy.Expr:
    """Bytes that a part of a Linear takes beside its result.

    Rows and activations in autocast's type; for partial sums columns of x put together; for [in, out] weights the
    product before the bias.
    """
    x, rows = partial.all_input_nodes[:2]
    result, found = info(partial).value, sympy.Integer(0)
    if info(rows).value.dtype != result.dtype:
        elements = value_size(rows) / info(rows).value.element_size() + value_size(x) / info(x).value.element_size()
        found += elements * result.element_size()
    part = linear_part(partial)
    if part.sums:
        found += _columns_size(partial)
    if part.dim == 1 and part.bias is not None:
        found += value_size(partial)
    return found


def _columns_size(partial: fx.Node) -> sympy.Expr:
    """Bytes of the columns of the activations that a partial sum reads."""
    part = linear_part(partial)
    return value_size(part.x) * sympy.Rational(part.hi - part.lo, int(info(part.x).value.shape[-1]))


def _zeros_size(pad: fx.Node) -> sympy.Expr:
    """Bytes of the zeros that stand for the host's columns, before they are put together with the others."""
    parts: Any = pad.args[1]
    return value_size(pad) - sum(map(value_size, parts), sympy.Integer(0))


def _sum_size(join: fx.Node) -> sympy.Expr:
    """Bytes that adding partial sums takes beside the sum: for half precision the sum in float32."""
    half = info(join).value.element_size() == 2
    return value_size(join) * 2 if half and len(join.all_input_nodes) > 1 else sympy.Integer(0)


__all__ = ["SegmentLives", "measure_memory", "segment_lives"]
