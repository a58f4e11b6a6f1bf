"""The geometry of what will be there, for who asks before it is: of what the worker sends up, of a new cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from hetegen_compile.passes.expressions import evaluate
from hetegen_compile.passes.tensors import symbols_of, to_expr


def like(tensors: Sequence[Tensor], symbols: Sequence[sympy.Symbol], *sizes: int) -> list[Tensor]:
    """Meta tensors of this geometry, where the symbols in it have these sizes."""
    known = dict(zip(symbols, map(sympy.Integer, sizes), strict=True))
    geometries = [(_sizes(tensor.shape, known), _sizes(tensor.stride(), known), tensor.dtype) for tensor in tensors]
    return [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in geometries]


def like_text(
    tensors: Sequence[Tensor], constant: Callable[[str, Any], str], place_of: Callable[[sympy.Symbol], int]
) -> str:
    """Python for ``like(tensors, ...)`` in a step; ``place_of`` is the position of the input that is a size."""
    symbols = sorted(set[sympy.Symbol]().union(*map(symbols_of, tensors)), key=str)
    made_like = functools.lru_cache(maxsize=4)(functools.partial(like, tensors, symbols))
    return f"{constant('like', made_like)}({', '.join(f'inputs[{place_of(symbol)}]' for symbol in symbols)})"


def _sizes(sizes: Sequence[Any], known: Mapping[sympy.Symbol, sympy.Integer]) -> tuple[int, ...]:
    return tuple(int(evaluate(to_expr(size), known)) for size in sizes)


__all__ = ["like", "like_text"]
