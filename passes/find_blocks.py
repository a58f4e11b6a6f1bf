"""MLP blocks: Linears of one input, pointwise operations on their results, and the one Linear that reads the outcome.

Why: cut each by itself, such Linears cost two trips to the host and back, and what lies between them crosses both
times. Where every operation between acts on each column for itself, the first Linears can be cut by the columns of
their results and the last by the same columns of its input: the host goes through the block with some columns, the
accelerator with the others, and one partial sum crosses. Nothing is matched by name: the nodes between have to be
pointwise (torch's own tag), read nothing but the first Linears and numbers, and be read by nobody else.

A block (silu and product between):                      No block (the sum reads x, too; softmax mixes columns):

    g = linear(x, wg); u = linear(x, wu)                     y = linear(x, w); z = y + x
    a = silu(g); m = a * u                                   r = linear(z, v)
    d = linear(m, wd)                                        s = softmax(y, -1); t = linear(s, v)

A Linear that makes several intermediates side by side (a fused gate and up) takes part if the parts of its result that
are read are exactly those, and all of them: ``chunk``, ``split`` and slices are told by the geometry of what they
return. So are reshapes that keep the columns (GPT-2's Conv1D). Which blocks are cut is decided by the simulated step
(``balance``).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from hetegen_compile.ir import LINEAR, info, is_tensor
from hetegen_compile.operands import operands_of, weight_of, x_of
from hetegen_compile.passes.context import Context, Refusal
from hetegen_compile.passes.findings import Block
from hetegen_compile.passes.tensors import tensors_in, to_expr

_RESHAPES = frozenset({"view", "reshape"})
_ALSO_POINTWISE = frozenset({"_to_copy"})  # carries no tag: it may also change the device


def find_blocks(module: fx.GraphModule, context: Context) -> tuple[Block, ...]:
    """All blocks of the graph, in program order; no Linear is in two."""
    if context.options.pair_mlp is False:
        return ()
    found: list[Block] = []
    taken: set[int] = set()
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        block = _block(node)
        if block is not None and taken.isdisjoint(block.linears):
            found.append(block)
            taken.update(block.linears)
    if not found and context.options.pair_mlp is True:
        context.refuse(Refusal("pair_mlp", "no Linears with nothing but pointwise operations between them"))
    return tuple(found)


def _block(consumer: fx.Node) -> Block | None:
    x, weight, _, dim = operands_of(consumer)
    match = _Match(consumer, int(info(weight).value.shape[1 - dim]))
    if not match.take(x) or not match.siblings or not match.is_closed():
        return None
    linears = [*match.siblings, consumer]
    if len(set(map(weight_of, linears))) < len(linears) or not all(map(_has_one_dtype, linears)):
        return None
    siblings = sorted(match.siblings, key=_position)
    parts = ((_position(part), _position(source), way) for part, (source, way) in match.parts.items())
    return Block(
        siblings=tuple(map(_position, siblings)), ways=tuple(match.siblings[node] for node in siblings),
        parts=tuple(sorted(parts)), region=tuple(sorted(map(_position, match.region))),
        consumer=_position(consumer), columns=match.columns,
    )  # fmt: skip


@dataclass
class _Match:
    """What has been found going backwards from a consumer whose input has ``columns``.

    ``siblings`` with their ways; ``parts`` of the fused ones with the Linear that they are of and which way they are;
    ``views``: nodes between those two; ``region``: what computes.
    """

    consumer: fx.Node
    columns: int
    siblings: dict[fx.Node, int] = field(default_factory=dict)
    parts: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)
    views: set[fx.Node] = field(default_factory=set)
    region: dict[fx.Node, None] = field(default_factory=dict)

    def take(self, node: fx.Node) -> bool:
        """Take ``node`` and all that it is computed from into the block; whether that is possible."""
        if node in self.region or node in self.parts or not tensors_in(info(node).value):
            return True
        if node.target == LINEAR:
            return self._take_sibling(node, 1)
        if self._take_part(node):
            return True
        if not _is_pointwise(node, self.columns) and not _keeps_columns(node, self.columns):
            return False
        self.region[node] = None
        return all(self.take(operand) for operand in node.all_input_nodes)

    def _take_sibling(self, node: fx.Node, ways: int) -> bool:
        return info(node).value.shape[-1] == ways * self.columns and self.siblings.setdefault(node, ways) == ways

    def _take_part(self, node: fx.Node) -> bool:
        """Whether ``node`` is one of several intermediates in a Linear's result: a view of it, or an item of views."""
        between = _operand(node)
        source = _operand(between) if between is not None and node.target is operator.getitem else between
        if between is not None and between.target == LINEAR:
            source = between
        way = None if source is None or source.target != LINEAR else _way(node, source, self.columns)
        if between is None or source is None or way is None:
            return False
        self.parts[node] = source, way
        self.views |= {between} - {source}
        return self._take_sibling(source, int(info(source).value.shape[-1]) // self.columns)

    def is_closed(self) -> bool:
        """Whether the block reads all that lies between and nobody else does, and all first Linears read one input."""
        between = {*self.region, *self.parts, *self.views}
        read = (user in between or user is self.consumer for node in (*between, *self.siblings) for user in node.users)
        one_input = len({sibling.args[0] for sibling in self.siblings}) == 1
        return one_input and all(read) and all(map(self._is_used, self.siblings))

    def _is_used(self, sibling: fx.Node) -> bool:
        """Whether every intermediate that the sibling makes is read: a block computes no others."""
        used = {way for source, way in self.parts.values() if source is sibling}
        return len(used) == self.siblings[sibling] or self.siblings[sibling] == 1


def _operand(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _position(node: fx.Node) -> int:
    return info(node).position


def _has_one_dtype(node: fx.Node) -> bool:
    """Not so under autocast, where the parts of the Linear and what lies between would meet different dtypes."""
    return len({info(one).value.dtype for one in (node, x_of(node), weight_of(node))}) == 1


def _is_pointwise(node: fx.Node, columns: int) -> bool:
    """Whether every operation acts on each element for itself, and the result has the intermediate's columns."""
    notes = info(node)
    plain = node.op in ("call_function", "call_method") and not (notes.writes or notes.random or notes.data_dependent)
    if not plain or not is_tensor(node) or not notes.value.dim() or notes.value.shape[-1] != columns:
        return False
    return all(map(_is_tagged, notes.aten)) if notes.aten else _is_identity(node)


@cache
def _is_tagged(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return name in _ALSO_POINTWISE or any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def _is_identity(node: fx.Node) -> bool:
    """What runs nothing and returns its operand (dropout of a model in eval mode, a cast to the same dtype)."""
    source = _operand(node)
    if source is None or len(node.all_input_nodes) != 1 or not is_tensor(source):
        return False
    same = _geometry(info(node).value) == _geometry(info(source).value)
    return same and info(node).storages == info(source).storages


def _geometry(value: Tensor) -> tuple[Any, ...]:
    places = value.shape, value.stride(), [value.storage_offset()]
    return (value.dtype, *(tuple(map(to_expr, place)) for place in places))


def is_reshape(node: fx.Node) -> bool:
    """Whether the node is ``view`` or ``reshape``."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _RESHAPES


def reshape_sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes that a reshape asks for."""
    given = node.args[1:]
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else given


def _keeps_columns(node: fx.Node, columns: int) -> bool:
    """Whether the node is a reshape between tensors whose last dimension are the intermediate's columns."""
    source = _operand(node)
    if not is_reshape(node) or source is None or node.kwargs or not is_tensor(source):
        return False
    ends = [tuple(info(one).value.shape[-1:]) for one in (source, node)]
    return ends == [(columns,), (columns,)] and reshape_sizes(node)[-1:] in ((columns,), (-1,))


def _way(node: fx.Node, source: fx.Node, columns: int) -> int | None:
    """Which of the intermediates side by side in the result of ``source`` lies where ``node`` does."""
    if not is_tensor(node) or info(node).storages != info(source).storages:
        return None
    whole, part = _geometry(info(source).value), _geometry(info(node).value)
    width, offset = int(whole[1][-1]), part[3][0]
    fits = part[:3] == (whole[0], (*whole[1][:-1], columns), whole[2]) and offset.is_Integer
    if not fits or width <= columns or width % columns or offset % columns or offset >= width:
        return None
    return int(offset) // columns


__all__ = ["find_blocks", "is_reshape", "reshape_sizes"]
