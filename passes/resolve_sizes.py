"""Sizes of intermediate tensors become arithmetic on the graph's own size inputs.

Why: ``x.size(1)`` of a tensor on the accelerator would make the host wait for something that it knows
already. Fake propagation has told every size as an expression over symbols, and Dynamo passes each symbol
to the graph as an input.

Before:

    n = x.size(1); m = n + 1          # x: [1, s77, 64]

After:

    m = operator.add(s77, 1)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from hetegen_compile.errors import UnsupportedModelError
from hetegen_compile.ir import annotate, erase_dead_nodes, info, is_tensor
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.tensors import symbols_in

_BINARY: dict[Any, Callable[..., Any]] = {
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    sympy.Pow: operator.pow,
    Max: torch.sym_max,
    Min: torch.sym_min,
}
_FOLDED: dict[Any, Callable[..., Any]] = {sympy.Add: operator.add, sympy.Mul: operator.mul}


def resolve_sizes(module: fx.GraphModule, context: Context) -> None:
    """Cut every size that is read from a tensor loose from that tensor."""
    del context
    graph = module.graph
    symbols = size_inputs(graph)
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output") or info(node).data_dependent:
            continue
        value = info(node).value
        # a symbol that no input tells depends on data and stays where it is computed
        sizes = value if isinstance(value, (tuple, list)) else (value,)
        known = _is_size(value) and symbols_in(sizes) <= symbols.keys()
        if known and any(map(is_tensor, node.all_input_nodes)):
            with graph.inserting_before(node):
                _replace(node, emit_value(graph, info(node).value, symbols))
    erase_dead_nodes(graph)


def size_inputs(graph: fx.Graph) -> dict[sympy.Expr, fx.Node]:
    """The inputs that are sizes, by what they tell: a symbol as a rule."""
    return {
        info(node).value.node.expr: node
        for node in graph.find_nodes(op="placeholder")
        if isinstance(info(node).value, py_sym_types)
    }


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(isinstance(v, (int, *py_sym_types)) for v in value)
    return isinstance(value, py_sym_types)


def _replace(node: fx.Node, new: Any) -> None:
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(new, tuple):
            picked = new[user.args[1]]  # type: ignore[index]
            _substitute(user, picked)
    _substitute(node, new)


def _substitute(node: fx.Node, new: Any) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: new if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: new if n is node else n)


def emit_value(graph: fx.Graph, value: Any, symbols: dict[sympy.Expr, fx.Node]) -> Any:
    """Sizes as numbers and nodes that compute them, at the graph's place of insertion, from its ``size_inputs``."""
    if isinstance(value, (tuple, list)):
        return tuple(emit_value(graph, v, symbols) for v in value)
    return value if isinstance(value, int) else _emit(graph, value.node.expr, symbols)


def _emit(graph: fx.Graph, expression: sympy.Expr, symbols: dict[sympy.Expr, fx.Node]) -> Any:
    """Nodes that compute ``expression`` on the host from the graph's size inputs."""
    if expression in symbols:
        return symbols[expression]
    if expression.is_Integer:
        return int(expression)
    kind = type(expression)
    arguments = [_emit(graph, arg, symbols) for arg in expression.args]
    if kind in _FOLDED:
        return reduce(lambda a, b: _call(graph, _FOLDED[kind], a, b), arguments)
    if kind in _BINARY:
        return reduce(lambda a, b: _call(graph, _BINARY[kind], a, b), arguments)
    raise UnsupportedModelError(f"a size of the model is {expression}, which hetegen cannot compute on the host")


def _call(graph: fx.Graph, function: Callable[..., Any], a: Any, b: Any) -> fx.Node:
    node = graph.call_function(function, (a, b))
    values = [info(v).value if isinstance(v, fx.Node) else v for v in (a, b)]
    return annotate(node, value=function(*values), position=-1)
