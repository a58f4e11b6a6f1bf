"""How large the sizes of a captured graph get: no plan keeps room for more.

Three things tell. Dynamo's guards: beyond them another graph is called (while the window of a cache is not full, say).
And windows: what comes in next is what was returned, so a cache that is cut to 31 tokens has no more, and what else
tells where it lies (strides, offset, what it was cut from) does not grow. Guards alone do not tell that: torch compares
the lengths of keys and values with each other only where an operation needs it. And the stated context: what a step
returns has no more tokens, so what it is given has fewer by those that it adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from hetegen_compile.ir import info
from hetegen_compile.passes.expressions import evaluate
from hetegen_compile.passes.tensors import to_expr
from hetegen_compile.passes.windows import CACHE_DIMS, TOKENS, window_symbols, windowed_inputs
from hetegen_compile.planning.planned import Sizes


def size_limits(
    module: fx.GraphModule, sizes: Sizes, context: int | None = None
) -> Mapping[sympy.Symbol, sympy.Integer]:
    """The largest value of each symbol that has one, never less than it is in ``sizes``.

    ``context`` is the most tokens that a cache has.
    """
    limits = _of_guards(module)
    for symbol, limit in _of_context(module, context).items() if context is not None else ():
        limits[symbol] = min(limit, limits.get(symbol, limit))
    for symbol in window_symbols(module) & sizes.keys():
        limits[symbol] = sizes[symbol]
    for node, window in windowed_inputs(module).items():
        for symbol, limit in _of_window(info(node).value, int(evaluate(window, sizes)), sizes).items():
            limits[symbol] = min(limit, limits.get(symbol, limit))
    return {symbol: max(limit, sizes[symbol]) for symbol, limit in limits.items() if symbol in sizes}


def _of_guards(module: fx.GraphModule) -> dict[sympy.Symbol, sympy.Integer]:
    placeholders = module.graph.find_nodes(op="placeholder")
    given = [info(node).value.node for node in placeholders if isinstance(info(node).value, torch.SymInt)]
    highest = {size.expr: size.shape_env.bound_sympy(size.expr).upper for size in given if size.expr.is_Symbol}
    return {symbol: high for symbol, high in highest.items() if isinstance(high, sympy.Integer)}


def _of_context(module: fx.GraphModule, context: int) -> dict[sympy.Symbol, sympy.Integer]:
    """Limits of the symbols that a returned cache is longer than by a number of tokens."""
    returned = [info(node).value for node in module.graph.output_node().all_input_nodes]
    caches = [value for value in returned if isinstance(value, Tensor) and value.dim() >= CACHE_DIMS]
    found: dict[sympy.Symbol, sympy.Integer] = {}
    for length in {to_expr(cache.shape[TOKENS]) for cache in caches}:
        for symbol in length.free_symbols:
            added = length - symbol
            if isinstance(added, sympy.Integer) and added > 0:
                found[symbol] = min(context - added, found.get(symbol, context - added))
    return found


def _of_window(cache: Tensor, window: int, sizes: Sizes) -> dict[sympy.Symbol, sympy.Integer]:
    tokens = to_expr(cache.shape[TOKENS])
    lies: list[Any] = [*cache.stride(), cache.storage_offset(), cache.untyped_storage().nbytes()]
    symbols: set[Any] = set().union(*(to_expr(value).free_symbols for value in lies))
    limits = {symbol: sizes[symbol] for symbol in symbols & sizes.keys()}
    return {**limits, tokens: sympy.Integer(window)} if tokens.is_Symbol else limits


__all__ = ["size_limits"]
