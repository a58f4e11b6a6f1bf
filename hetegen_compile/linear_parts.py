"""Parts of a Linear on tensors: computing rows or columns of it, and putting parts together. A leaf of the project.

What ``dim`` and the ``axis`` of a part mean is said in ``ir``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def linear_rows(x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int, axis: int = 0) -> Tensor:
    """The part of a Linear that ``lo:hi`` along one axis of its weight contribute.

    Args:
        x: activations [..., in].
        rows: the weight narrowed to ``lo:hi`` along ``axis``.
        bias: [out] or None; where parts are partial sums given to exactly one of them.
        lo, hi: the range.
        dim: 0 for a weight stored [out, in], 1 for [in, out].
        axis: the axis of the weight that is cut: 0 for its rows, 1 for its columns.

    Returns:
        Columns ``lo:hi`` of the result, [..., hi - lo], where the axis is that of the outputs (``axis == dim``); else a
        partial sum [..., out].
    """
    x, bias = narrowed_operands(x, bias, lo, hi, sums=axis != dim)
    if dim == 0:
        return torch.nn.functional.linear(x, rows, bias)
    product = torch.matmul(x, rows)
    return product if bias is None else product + bias.to(product.dtype)  # under autocast it is of another


def rows_function(lo: int, hi: int, dim: int, axis: int, *, biased: bool) -> Callable[..., Tensor]:
    """``linear_rows`` of one part as a function (x, rows, bias): ``F.linear`` alone where that is all it does.

    Each is an object of its own, by which an accelerator may tell the operations of several plans apart.
    """
    if dim == 0 and axis == 0 and not biased:
        return functools.partial(torch.nn.functional.linear)
    return functools.partial(linear_rows, lo=lo, hi=hi, dim=dim, axis=axis)


def usual_strides(x: Tensor) -> Tensor:
    """A contiguous tensor with a contiguous one's strides also where a dimension has one element; else ``x``.

    With others (one token's, behind attention) torch's bfloat16 Linear on the CPU takes 25 to 60 times as long.
    """
    return x.view(x.shape) if x.is_contiguous() else x


def behind_usual_strides(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function (x, rows, bias) of activations with ``usual_strides``."""
    return lambda x, rows, bias: linear(usual_strides(x), rows, bias)


def narrowed_operands(x: Tensor, bias: Tensor | None, lo: int, hi: int, *, sums: bool) -> tuple[Tensor, Tensor | None]:
    """What a part of a Linear reads of the activations and of the bias: with its weight they are a whole Linear."""
    return (x[..., lo:hi], bias) if sums else (x, None if bias is None else bias[lo:hi])


def pad_parts(x: Tensor, parts: Sequence[Tensor], starts: Sequence[int], columns: int) -> Tensor:
    """Columns of a Linear's result at their places in all ``columns`` of it, zero where the host has the others.

    ``x`` [..., in] gives the other dimensions and the dtype; ``starts`` are ascending.
    """
    if len(parts) == 1:
        return torch.nn.functional.pad(parts[0], (starts[0], columns - starts[0] - parts[0].shape[-1]))
    pieces, end = [], 0
    for part, start in zip(parts, starts, strict=True):
        pieces += [_zeros(x, start - end), part] if start > end else [part]
        end = start + part.shape[-1]
    pieces += [_zeros(x, columns - end)] if columns > end else []
    return torch.cat(pieces, dim=-1)


def _zeros(x: Tensor, columns: int) -> Tensor:
    return x.new_zeros((*x.shape[:-1], columns))


def join_parts(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts of one Linear put together: side by side for ``dim`` 0, summed in float32 for ``dim`` 1."""
    if len(parts) == 1:
        return parts[0]
    if dim == 0:
        return torch.cat(list(parts), dim=-1)
    if len(parts) == 2:
        return parts[0] + parts[1]  # torch adds halves in float32, too, and one operation is issued instead of four
    half = parts[0].dtype in (torch.float16, torch.bfloat16)
    total = parts[0].float() if half else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)


def whole_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """The whole Linear: x [..., in] times the weight ([out, in] for ``dim`` 0, [in, out] for ``dim`` 1)."""
    return linear_rows(x, weight, bias, 0, weight.shape[0], dim)


__all__ = [
    "behind_usual_strides",
    "join_parts",
    "linear_rows",
    "narrowed_operands",
    "pad_parts",
    "rows_function",
    "usual_strides",
    "whole_linear",
]
