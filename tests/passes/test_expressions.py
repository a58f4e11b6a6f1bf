"""Compiled expressions give what substitution gives."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max, Min, Mod, ModularIndexing, PythonMod

from hetegen_compile.passes import expressions
from hetegen_compile.passes.expressions import evaluate
from tests.passes.graphs import property_test

N, M = sympy.symbols("n m", integer=True, positive=True)

EXPRESSIONS = {
    "polynomial": 4 * N**2 * M + 256 * N + 7,
    "constant": sympy.Integer(12),
    "FloorDiv": FloorDiv(N, M + 1),
    "CeilDiv": CeilDiv(N, M + 1),
    "Mod": Mod(N, M + 3),
    "PythonMod": PythonMod(N, M + 3),
    "Max": Max(N, M) * 2,
    "Min": Min(N, 5, M),
    "sympy's Max and Min": sympy.Max(1, N) + sympy.Min(8, N) * 3,
    "ModularIndexing": ModularIndexing(N, 2, 7),
    "nested": 3 * FloorDiv(N + 7, 2) - Mod(M * N, FloorDiv(M, 2) + 5) * 2,
    "a fraction": N * M / 3,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@property_test
@given(n=st.integers(2, 5000), m=st.integers(2, 5000))
def test_compiled_is_substituted(name: str, n: int, m: int) -> None:
    expression = sympy.sympify(EXPRESSIONS[name])
    values = {N: sympy.Integer(n), M: sympy.Integer(m)}
    assert evaluate(expression, values) == pytest.approx(float(expression.xreplace(values)), rel=1e-12)


def test_a_symbol_without_a_size_counts_as_one() -> None:
    assert evaluate(10 * N + M, {M: sympy.Integer(5)}) == 15


def test_equal_expressions_are_compiled_once() -> None:
    expressions._compiled.cache_clear()
    for factor in (3, 3, 3, 4):
        evaluate(factor * N + 1, {N: sympy.Integer(2)})
    assert expressions._compiled.cache_info().misses == 2
