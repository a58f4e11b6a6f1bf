"""What the passes read of a graph's fake tensors: sizes as sympy expressions, bytes, identity of storages."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.utils import _pytree as pytree


def to_expr(value: Any) -> sympy.Expr:
    """A number or SymInt as a sympy expression over the graph's symbols."""
    if type(value) is int:  # nearly all sizes; ``sympify`` looks at what else it might be first
        return sympy.Integer(value)
    return value.node.expr if isinstance(value, py_sym_types) else sympy.sympify(value, strict=True)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nest of containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, int | float | torch.SymInt):
        return []
    if type(value) in (list, tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def is_ids(tensor: Tensor) -> bool:
    """Whether it is integers [sequences, tokens], as tokens and masks of them are given."""
    return tensor.dim() == 2 and not tensor.dtype.is_floating_point


def tensor_bytes(tensor: Tensor) -> sympy.Expr:
    """Bytes of the tensor's elements (not of its storage), a sympy expression."""
    return _times(tensor.numel(), tensor.element_size())


def _times(number: Any, factor: int) -> sympy.Expr:
    """The product; of numbers it is taken before there is any algebra."""
    return sympy.Integer(number * factor) if type(number) is int else to_expr(number) * factor


def held_sizes(tensor: Tensor) -> list[Any]:
    """Sizes of the dimensions along which elements differ: along one of stride 0 (``expand``) all are one."""
    return [size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if type(step) is not int or step]


def held_bytes(tensor: Tensor) -> sympy.Expr:
    """Bytes of the tensor's different elements, a sympy expression."""
    sizes = held_sizes(tensor)
    if all(type(size) is int for size in sizes):
        return sympy.Integer(prod(sizes) * tensor.element_size())
    return sympy.Mul(*map(to_expr, sizes)) * tensor.element_size()


def symbols_in(sizes: Iterable[Any]) -> set[sympy.Symbol]:
    """The symbols in numbers and SymInts."""
    return set[sympy.Symbol]().union(*(to_expr(size).free_symbols for size in sizes if type(size) is not int))


def symbols_of(tensor: Tensor) -> set[sympy.Symbol]:
    """The symbols in the tensor's sizes and strides."""
    return symbols_in((*tensor.shape, *tensor.stride()))


__all__ = [
    "held_bytes", "held_sizes", "is_ids", "symbols_in", "symbols_of", "tensor_bytes", "tensors_in",
    "to_expr",
]  # fmt: skip
