"""The operands of what a schedule computes part by part, and of its parts, by their names."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx


def x_of(node: fx.Node) -> fx.Node:
    """The activations that a Linear, a product with experts or a part of either reads."""
    return _operand(node, 0)


def weight_of(node: fx.Node) -> fx.Node:
    """The weight, or the stack of experts, that it reads."""
    return _operand(node, 1)


class Linear(NamedTuple):
    """The operands of a whole Linear; ``dim`` is the weight's dimension of results."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    dim: int


def operands_of(node: fx.Node) -> Linear:
    """The operands of ``node`` by their names."""
    return Linear(*node.args)  # type: ignore[arg-type]


class LinearPart(NamedTuple):
    """The operands of a ``host_linear`` or a ``partial_linear``."""

    x: Any
    weight: Any
    bias: Any
    lo: int
    hi: int
    dim: int
    axis: int = 0

    @property
    def sums(self) -> bool:
        """Whether it is a partial sum of the whole result, and not some of its columns."""
        return self.dim != self.axis


def linear_part(node: fx.Node) -> LinearPart:
    """The operands of ``node`` by their names."""
    return LinearPart(*node.args)  # type: ignore[arg-type]


class HostGroups(NamedTuple):
    """The operands of a ``host_grouped``: groups ``0:hi`` of a product."""

    x: Any
    stack: Any
    ends: Any
    hi: int
    dim: int
    product: str


def host_groups(node: fx.Node) -> HostGroups:
    """The operands of ``node`` by their names."""
    return HostGroups(*node.args)  # type: ignore[arg-type]


class GroupedPart(NamedTuple):
    """The operands of a ``partial_grouped``: those of ``grouped_rows``, of which ``ends`` is on the host."""

    x: Any
    matrices: Any
    ends: Any
    others: Any
    lo: int
    dim: int


def grouped_part(node: fx.Node) -> GroupedPart:
    """The operands of ``node`` by their names."""
    return GroupedPart(*node.args)  # type: ignore[arg-type]


def _operand(node: fx.Node, place: int) -> fx.Node:
    found = node.args[place]
    assert isinstance(found, fx.Node), f"{node} has no value as operand {place}"
    return found


__all__ = [
    "GroupedPart", "HostGroups", "Linear", "LinearPart", "grouped_part", "host_groups", "linear_part", "operands_of",
    "weight_of", "x_of",
]  # fmt: skip
