"""Parts of a grouped product on tensors: the rows that some of its groups make. A leaf of the project.

A grouped product multiplies consecutive rows of activations, each group of them with a matrix of its own:

    y[ends[i - 1] : ends[i]] = x[ends[i - 1] : ends[i]] @ matrices[i]

A part is a product for each of its groups that has rows, so the host has to know where groups end: it waits for the
few numbers that the router has made, which it needs for its own groups anyway. torch's operation for all groups waits
for them as well, behind all that has been issued, unless it is in bfloat16 on the newest datacentre GPUs; and a part's
rows would have to be brought to the front and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
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


def grouped_rows(x: Tensor, matrices: Tensor, ends: Tensor, others: Tensor | None, lo: int, dim: int) -> Tensor:
    """The rows of a grouped product that some of its groups make, among those that are known already.

    Args:
        x: activations [rows, in], all of them, group by group.
        matrices: those of the groups from ``lo`` on: [n, out, in] for ``dim`` 0, [n, in, out] for ``dim`` 1.
        ends: where each of all groups ends, [groups], ascending; what is behind the last belongs to none.
        others: what other groups made, [rows, out]; None: nothing is known yet.
        lo: the first group.
        dim: how the matrices are stored.

    Returns:
        [rows, out], a new tensor: rows of these groups, else those of ``others``; where neither has any, zero.
    """
    known = None if others is None else others.clone()
    return add_groups(x, matrices, bounds_of(ends, lo, matrices.shape[0]), known, dim)


def bounds_of(ends: Tensor, lo: int, groups: int) -> list[int]:
    """Where the first of ``groups`` groups from ``lo`` on begins, and where each of them ends; ``ends`` on the host."""
    bounds: list[int] = ends[max(0, lo - 1) : lo + groups].tolist()
    return bounds if lo else [0, *bounds]


def add_groups(x: Tensor, matrices: Tensor, bounds: Sequence[int], others: Tensor | None, dim: int) -> Tensor:
    """The rows of some groups, a product for each that has any, written into ``others``, which is returned.

    None: into a new tensor, zero where none of them has rows. Further operands are those of ``grouped_rows``.
    """
    out = x.new_zeros((x.shape[0], matrices.shape[1 + dim])) if others is None else others
    for group, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            torch.mm(x[start:end], matrices[group] if dim else matrices[group].t(), out=out[start:end])
    return out


def _as_in_out(matrices: Tensor, dim: int) -> Tensor:
    return matrices if dim else matrices.transpose(1, 2)


__all__ = ["Product", "add_groups", "bounds_of", "first_groups", "grouped_rows", "product_of", "whole_grouped"]
