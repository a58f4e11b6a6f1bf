"""GELU written out by its tanh formula becomes the one operation that torch has for it.

Why: GPT-2, GPT-J, Phi, BLOOM and others write the formula in Python. A segment's kernel fuses its eight operations, but
the host's part of an MLP block (``find_blocks``) ran them one by one: 28 us where ``F.gelu`` takes 7, for 3,328 columns
on the 2-core machine of ``benchmarks/README.md``.

Before:

    h = 0.5 * x; c = x ** 3.0; s = x + 0.044715 * c; t = tanh(0.7978845608 * s); y = h * (1.0 + t)

After:

    y = gelu(x, approximate="tanh")

Nothing depends on the order of the operations: what is below the ``tanh`` is read as a polynomial in x, what is above
it as one in x and the tanh. Their coefficients have to be the formula's to float32's precision, which halves are
computed in (to float64's of float64).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hetegen_compile.ir import annotate, erase_dead_nodes, info, is_tensor, written_storages
from hetegen_compile.passes.context import Context

Polynomial = Mapping[tuple[int, int], float]
"""Coefficients by the powers of x and of the tanh."""

_X: Polynomial = {(1, 0): 1.0}
_TANH: Polynomial = {(0, 1): 1.0}
_INNER: Polynomial = {(1, 0): math.sqrt(2.0 / math.pi), (3, 0): 0.044715 * math.sqrt(2.0 / math.pi)}
_GELU: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_DEGREE = 3
_OPERATIONS = 12
"""Operations below the tanh, and above it, at most: the longest known form has six."""

_TANHS = {torch.tanh, "tanh"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "__add__", "__radd__"}
_MUL = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "__mul__", "__rmul__"}
_POW = {operator.pow, torch.pow, "pow", "__pow__"}


def fold_gelu(module: fx.GraphModule, context: Context) -> None:
    """Replace each written out GELU of which the graph writes nothing in place."""
    del context
    written = written_storages(module.graph.nodes)
    for node in list(module.graph.nodes):
        if node.target in _TANHS and node.op in ("call_function", "call_method") and is_tensor(node):
            found = next(_formulas(node, written), None)
            if found is not None:
                _replace(module.graph, *found)
    erase_dead_nodes(module.graph)


def _formulas(tanh: fx.Node, written: frozenset[int]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The x and the result of a GELU that this tanh is part of."""
    if len(tanh.args) != 1 or tanh.kwargs:
        return
    below = list(_reached(tanh.all_input_nodes, lambda node: node.all_input_nodes))
    for x in below:
        formula = _Formula(x, tanh, written)
        if not info(x).value.dtype.is_floating_point or not formula.agrees(tanh.args[0], _INNER):
            continue
        for result in _reached(tanh.users, lambda node: node.users):
            if formula.agrees(result, _GELU):
                yield x, result


def _reached(start: Any, step: Callable[[fx.Node], Any]) -> Iterator[fx.Node]:
    """Tensor nodes within a few steps, each once, nearest first."""
    pending, seen = [node for node in start if is_tensor(node)], set[fx.Node]()
    while pending and len(seen) < _OPERATIONS:
        node = pending.pop(0)
        if node not in seen:
            seen.add(node)
            yield node
            pending += [one for one in step(node) if is_tensor(one)]


@dataclass(frozen=True)
class _Formula:
    """What nodes compute of ``x``, with the ``tanh`` as it is; ``written`` are the storages that the graph writes."""

    x: fx.Node
    tanh: fx.Node
    written: frozenset[int]

    def agrees(self, node: Any, formula: Polynomial) -> bool:
        """Whether a node is this polynomial (BLOOM has eight digits of the constant)."""
        found = self._polynomial(node, _OPERATIONS)
        if found is None or found.keys() != formula.keys():
            return False
        computed_in = torch.float64 if info(self.x).value.dtype == torch.float64 else torch.float32
        return all(math.isclose(found[key], formula[key], rel_tol=torch.finfo(computed_in).eps) for key in formula)

    def _polynomial(self, node: Any, depth: int) -> Polynomial | None:
        """A node as a polynomial in x and the tanh; None if it is none, is written, or of another dtype than x."""
        if isinstance(node, (int, float)) and not isinstance(node, bool):
            return {(0, 0): float(node)}
        if not isinstance(node, fx.Node) or not is_tensor(node) or not depth or info(node).storages & self.written:
            return None
        if info(node).value.dtype != info(self.x).value.dtype:
            return None
        if node is self.x or node is self.tanh:
            return _X if node is self.x else _TANH
        if len(node.args) != 2 or node.kwargs or node.op not in ("call_function", "call_method"):
            return None
        if node.target in _POW:
            return _power(self._polynomial(node.args[0], depth - 1), node.args[1])
        combine = _sum if node.target in _ADD else _product if node.target in _MUL else None
        operands = [self._polynomial(arg, depth - 1) for arg in node.args] if combine else [None]
        return combine(*operands) if combine and None not in operands else None


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in {**a, **b}}


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    found: dict[tuple[int, int], float] = {}
    for (i, j), left in a.items():
        for (k, m), right in b.items():
            found[i + k, j + m] = found.get((i + k, j + m), 0.0) + left * right
    return found if all(sum(powers) <= _DEGREE for powers in found) else None


def _power(base: Polynomial | None, exponent: Any) -> Polynomial | None:
    if base is None or not isinstance(exponent, (int, float)) or exponent not in range(1, _DEGREE + 1):
        return None
    found: Polynomial | None = base
    for _ in range(int(exponent) - 1):
        found = None if found is None else _product(found, base)
    return found


def _replace(graph: fx.Graph, x: fx.Node, result: fx.Node) -> None:
    with graph.inserting_before(result):
        gelu = graph.call_function(torch.nn.functional.gelu, (x,), {"approximate": "tanh"})
    traffic_bytes = 2 * info(result).made_bytes
    annotate(gelu, info(result), aten=("gelu",), reads=info(x).storages, traffic_bytes=traffic_bytes)
    result.replace_all_uses_with(gelu)
    graph.erase_node(result)


__all__ = ["fold_gelu"]
