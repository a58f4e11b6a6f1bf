"""Parts of a grouped product on tensors: the rows that some of its groups make. A leaf of the project.

A grouped product multiplies consecutive rows of activations, each group of them with a matrix of its own:

    y[ends[i - 1] : ends[i]] = x[ends[i - 1] : ends[i]] @ matrices[i]

How many rows a group has is known on the device only, so nothing here depends on it: every shape is one of the whole
product, and a part's rows are brought to the front before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[..., Tensor]
"""(x [rows, in], matrices [groups, in, out], offs=ends [groups]) -> [rows, out]."""


def product_of(name: str) -> Product:
    """The grouped product with this name: torch's ``_grouped_mm``, or transformers' ``grouped_mm_fallback``."""
    found: Any = torch._grouped_mm if name == "_grouped_mm" else getattr(torch.ops.transformers, name)
    return found  # type: ignore[no-any-return]


def whole_grouped(x: Tensor, stack: Tensor, ends: Tensor, dim: int, product: str) -> Tensor:
    """The whole product: x [rows, in] times a stack ([groups, out, in] for ``dim`` 0, [groups, in, out] for 1)."""
    return product_of(product)(x, _as_in_out(stack, dim), offs=ends)


def first_groups(x: Tensor, stack: Tensor, ends: Tensor, hi: int, dim: int, product: str | Product) -> Tensor:
    """The rows that groups ``0:hi`` of a product make, [rows, out], zero where others have theirs; on the host.

    ``product`` may be a function that computes what the operation of a name does.
    """
    run = product_of(product) if isinstance(product, str) else product
    made = run(x, _as_in_out(stack[:hi], dim), offs=ends[:hi])
    made[int(ends[hi - 1]) :].zero_()
    return made


def grouped_rows(
    x: Tensor, matrices: Tensor, ends: Tensor, others: Tensor | None, lo: int, dim: int, product: str
) -> Tensor:
    """The rows of a grouped product that some of its groups make, among those that are known already.

    Args:
        x: activations [rows, in], all of them, group by group.
        matrices: those of the groups from ``lo`` on: [n, out, in] for ``dim`` 0, [n, in, out] for ``dim`` 1.
        ends: where each of all groups ends, [groups], ascending; what is behind the last belongs to none.
        others: what other groups made, [rows, out]; None: nothing is known yet.
        lo: the first group.
        dim: how the matrices are stored.
        product: the operation's name (``product_of``).

    Returns:
        [rows, out], a new tensor: rows of these groups, else those of ``others``; where neither has any, zero.
    """
    rows = torch.arange(x.shape[0], dtype=ends.dtype, device=x.device)
    end = ends[lo + matrices.shape[0] - 1]
    mine = rows < end
    own = ends[lo : lo + matrices.shape[0]]
    if lo:
        start = ends[lo - 1]
        mine, own = mine & (rows >= start), own - start
        x = x.index_select(0, (rows + start) % x.shape[0])
    made = product_of(product)(x, _as_in_out(matrices, dim), offs=own)
    if lo:
        made = made.index_select(0, (rows - start) % x.shape[0])
    return torch.where(mine[:, None], made, made.new_zeros(()) if others is None else others)


def _as_in_out(matrices: Tensor, dim: int) -> Tensor:
    return matrices if dim else matrices.transpose(1, 2)


__all__ = ["Product", "first_groups", "grouped_rows", "product_of", "whole_grouped"]
