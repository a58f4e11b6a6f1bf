"""Every element of a Linear's weight is used once, by the part of the Linear that it belongs to.

Why: a part that is left out of a block is no error anywhere: its columns are zero on the accelerator. So the verifier
looks at what each part multiplies with. Parts of one Linear are those at its place in the program; each is a rectangle
of the weight, read off the transfer that brings it and compared with what the part says of itself.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from torch import fx

from hetegen_compile import ir
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import info
from hetegen_compile.operands import grouped_part, host_groups, linear_part
from hetegen_compile.passes.happens_before import name_of


class _Rectangle(NamedTuple):
    """Rows and columns of a weight."""

    weight: fx.Node
    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def overlaps(self, other: _Rectangle) -> bool:
        return (
            self.top < other.bottom and other.top < self.bottom
            and self.left < other.right and other.left < self.right
        )  # fmt: skip


def check_parts(graph: fx.Graph) -> None:
    """Check all Linears of a schedule.

    Raises:
        ScheduleError: an element of a weight is used twice or not at all, or a part says something else of itself.
    """
    linears: dict[int, list[tuple[fx.Node, _Rectangle]]] = {}
    products: dict[int, list[fx.Node]] = {}
    joins: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node.target in (ir.HOST_LINEAR, ir.PARTIAL_LINEAR):
            linears.setdefault(info(node).position, []).append((node, _used(node)))
        elif node.target == ir.HOST_GROUPED:
            part = host_groups(node)
            linears.setdefault(info(node).position, []).append((node, _cut(part.stack, 0, 0, part.hi)))
            products.setdefault(info(node).position, []).append(node)
        elif node.target == ir.PARTIAL_GROUPED:
            linears.setdefault(info(node).position, []).append((node, _used_groups(node)))
            products.setdefault(info(node).position, []).append(node)
        elif node.target == ir.PAD:
            _check_places(node)
        elif node.target == ir.JOIN:
            joins[info(node).position] = node
    for parts in linears.values():
        _check_tiling(parts)
    for position, nodes in products.items():
        _check_product(nodes, joins.get(position))


def _used(part: fx.Node) -> _Rectangle:
    """What a part multiplies with; where it names its range that has to be the same."""
    operands = linear_part(part)
    found = _cut(operands.weight, operands.axis, operands.lo, operands.hi)
    if part.target == ir.PARTIAL_LINEAR:
        found = brought(operands.weight)
        named = (found.left, found.right) if operands.axis else (found.top, found.bottom)
        if named != (operands.lo, operands.hi):
            raise ScheduleError(
                f"verify: {name_of(part)} is the part {operands.lo}:{operands.hi}, but reads {named[0]}:{named[1]} of "
                f"{found.weight}; missing edge: a prefetch of {operands.lo}:{operands.hi} -> {part}"
            )
    return found


def _used_groups(part: fx.Node) -> _Rectangle:
    """Which matrices of a stack a part multiplies with: each is a row of all of its elements."""
    operands = grouped_part(part)
    found = brought(operands.matrices)
    if found.top != operands.lo:
        raise ScheduleError(
            f"verify: {name_of(part)} is the part from {operands.lo} on, but reads {found.top}:{found.bottom} of "
            f"{found.weight}; missing edge: a prefetch from {operands.lo} on -> {part}"
        )
    return found


def _check_product(parts: list[fx.Node], join: fx.Node | None) -> None:
    """Parts of one product multiply the same with the same, each is written over those before it, which nothing else
    reads, and all are joined once."""
    same = {(*_operands(part), origin(_operand(part, 0)), origin(_operand(part, 2))) for part in parts}
    if len(same) > 1:
        raise ScheduleError(f"verify: {', '.join(map(name_of, parts))} are parts of one product, but of other operands")
    chain = [part for part in parts if part.target == ir.PARTIAL_GROUPED]
    for before, part in zip((None, *chain), chain, strict=False):
        others = grouped_part(part).others
        if others is not before:
            raise ScheduleError(
                f"verify: {name_of(part)} adds to {others}, so that what {before} makes is lost; "
                f"missing edge: {before} -> {part}"
            )
    due = [*(part for part in parts if part.target == ir.HOST_GROUPED), *chain[-1:]]
    found = [] if join is None else [origin(one) for one in _argument(join, 0)]
    if join is None or _argument(join, 1) != 1 or sorted(map(str, found)) != sorted(map(str, due)):
        raise ScheduleError(
            f"verify: what {', '.join(map(name_of, due))} make is not what is put together in {join}; "
            f"missing edge: {due[-1]} -> {join}"
        )
    for before, part in pairwise(chain):
        stranger = next((user for user in before.users if user is not part), None)
        if stranger is not None:
            raise ScheduleError(f"verify: {name_of(stranger)} reads {before}, which {name_of(part)} writes over")


def _operands(part: fx.Node) -> tuple[fx.Node, int]:
    """The stack that a part multiplies with, and how its matrices are stored."""
    if part.target == ir.HOST_GROUPED:
        return host_groups(part).stack, host_groups(part).dim
    operands = grouped_part(part)
    return brought(operands.matrices).weight, operands.dim


def _operand(part: fx.Node, place: int) -> fx.Node:
    operand: fx.Node = part.args[place]  # type: ignore[assignment]
    return operand


def origin(value: fx.Node) -> fx.Node:
    """Where a value was made, whichever transfers have moved it since."""
    while True:
        source = value.all_input_nodes[0] if value.all_input_nodes else None
        if value.target == ir.MIRROR and source is not None:
            value = source
        elif value.target is operator.getitem and source is not None and source.target in _MOVED:
            value = _argument(source.all_input_nodes[0], 0)[_argument(value, 1)]
        else:
            return value


_MOVED = (ir.WAIT_HOST, ir.WAIT_ACCELERATOR)


def brought(source: fx.Node) -> _Rectangle:
    """Which part of a weight lies where a part on the accelerator reads it."""
    while source.target in (ir.WAIT, ir.PREFETCH, ir.CARRIED) and _argument(source, 0).op != "placeholder":
        source = _argument(source, 0)  # through the wait, and the stage that a prefetch reads
    weight = _argument(source, 0)
    if source.target == ir.RESIDENT:
        return _cut(weight, 0, _argument(source, 1), _argument(source, 2))
    ranges, dim = _argument(source, 1), _argument(source, 2)
    return _Rectangle(weight, *ranges) if dim == ir.RECTANGLE else _cut(weight, dim, *ranges)


def _cut(weight: fx.Node, axis: int, lo: int, hi: int) -> _Rectangle:
    rows, *others = map(int, info(weight).value.shape)
    columns = prod(others)  # a matrix of a stack counts as one row of all of its elements
    return _Rectangle(weight, 0, rows, lo, hi) if axis else _Rectangle(weight, lo, hi, 0, columns)


def _argument(node: fx.Node, place: int) -> Any:
    return node.args[place]


def _check_tiling(parts: list[tuple[fx.Node, _Rectangle]]) -> None:
    last, first = parts[-1][0], parts[0][1]
    for i, (node, one) in enumerate(parts):
        twice = next((other for other, rectangle in parts[:i] if one.overlaps(rectangle)), None)
        if twice is not None:
            raise ScheduleError(f"verify: {name_of(node)} uses elements of {first.weight} that {twice} uses as well")
    missing = int(info(first.weight).value.numel()) - sum(rectangle.area for _, rectangle in parts)
    if missing:
        raise ScheduleError(
            f"verify: {missing} elements of {first.weight} are used by no part of {name_of(last)}; "
            f"missing edge: a part with them -> {last}"
        )


def _check_places(pad: fx.Node) -> None:
    """The parts of a result are put where the columns are that they were computed for."""
    for part, start in zip(_argument(pad, 1), _argument(pad, 2), strict=True):
        if part.target == ir.PARTIAL_LINEAR and linear_part(part).lo != start:
            raise ScheduleError(
                f"verify: {name_of(pad)} puts {part}, columns from {linear_part(part).lo} on, at column {start}"
            )


__all__ = ["brought", "check_parts", "origin"]
