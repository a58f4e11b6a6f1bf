"""The geometry of what the worker will send up, for who waits for it before it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from hetegen_compile.passes.expressions import evaluate
from hetegen_compile.passes.tensors import to_expr


def like(tensors: Sequence[Tensor], symbols: Sequence[sympy.Symbol], *sizes: int) -> list[Tensor]:
    """Meta tensors of this geometry, where the symbols in it have these sizes."""
    known = dict(zip(symbols, map(sympy.Integer, sizes), strict=True))
    geometries = [(_sizes(tensor.shape, known), _sizes(tensor.stride(), known), tensor.dtype) for tensor in tensors]
    return [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in geometries]


def _sizes(sizes: Sequence[Any], known: Mapping[sympy.Symbol, sympy.Integer]) -> tuple[int, ...]:
    return tuple(int(evaluate(to_expr(size), known)) for size in sizes)


__all__ = ["like"]
