"""Numbers from cost expressions: each different expression is compiled once, whatever reads it how often.

Why: equal layers have equal expressions, and every plan, bucket and context asks for all of them again.
Substituting symbols in sympy takes some thousand times longer than calling a compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import sympy
from torch.utils._sympy.printers import PythonPrinter


def evaluate(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, sympy.Integer | int]) -> float:
    """The expression at these sizes; a symbol that has none (it depends on data) counts as 1."""
    if expression.is_Integer:
        return float(expression.p)
    symbols, function = _compiled(expression)
    return float(function(*[int(sizes.get(symbol, 1)) for symbol in symbols]))


@lru_cache(maxsize=65536)
def _compiled(expression: sympy.Expr) -> tuple[tuple[sympy.Symbol, ...], Callable[..., Any]]:
    """The expression's symbols and a function of their values.

    Printed by torch, whose sizes hold functions of its own (FloorDiv, Mod, Max): sympy's printer writes the
    operands of a Mod without their parentheses.
    """
    symbols = tuple(sorted(expression.free_symbols, key=str))
    return symbols, sympy.lambdify(symbols, expression, modules="math", printer=PythonPrinter())


__all__ = ["evaluate"]
