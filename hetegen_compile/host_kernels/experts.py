"""Grouped products on the host: each expert with tokens is a Linear, by the kernel that the profile recorded for it.

Why: at one token of each expert torch's own kernels (a product for every expert, with tokens or without) read bfloat16
and float32 at about half of the memory's rate, and a mixture's decode step is little else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.host_kernels.choose import HostLinear, bind_kernels


@dataclass(frozen=True)
class HostExperts:
    """A grouped product: a callable (x [tokens, in], matrices [groups, in, out], offs [groups]) -> [tokens, out].

    ``plain`` is the operation itself, which computes what the kernels do not serve: other dtypes or devices, a bias,
    autocast, matrices with gaps in both directions. ``linear`` is one expert's product.
    """

    plain: Callable[..., Any]
    linear: HostLinear

    def __call__(self, x: Tensor, *operands: Any, **more: Any) -> Any:
        """The product; rows that belong to no group are zero."""
        matrices, ends = _operands(*operands, **more)
        if matrices is None or ends is None or not _serves(x, matrices, ends):
            return self.plain(x, *operands, **more)
        last = ends.tolist()
        counts = [end - start for start, end in pairwise((0, *last))]
        if min(counts) < 0 or last[-1] > x.shape[0]:
            return self.plain(x, *operands, **more)  # which says what is wrong with them
        rows = self.linear.dim == 0
        groups = self.linear.kernel(max(counts)).groups if rows else None
        if groups is not None:
            out = groups(x, matrices.transpose(1, 2), ends)
        else:
            out = x.new_empty((x.shape[0], matrices.shape[2]))
            for index, (start, end) in enumerate(pairwise((0, *last))):
                if start != end:
                    matrix = matrices[index]
                    out[start:end] = self.linear(x[start:end], matrix.t() if rows else matrix, None)
        out[last[-1] :].zero_()
        return out


def bind_experts(
    plain: Callable[..., Any],
    choices: Mapping[str, KernelChoice],
    matrices: Tensor,
    refuse: Callable[[str], None] = lambda reason: None,
) -> HostExperts | None:
    """The callable for a grouped product ``plain`` with such matrices [groups, in, out] (a fake is enough).

    None: no kernel of ours serves them on this machine. Each expert's matrix is a weight [out, in] or [in, out], by
    which of its dimensions is contiguous.
    """
    dim = 0 if matrices.stride(1) == 1 else 1
    matrix = matrices[0].t() if dim == 0 else matrices[0]
    if matrix.stride(1) != 1:
        return None
    linear = bind_kernels(choices, matrix, 0, int(matrix.shape[0]), dim, refuse)
    return None if linear.is_torchs else HostExperts(plain, linear)


def _operands(
    mat2: Any = None, offs: Any = None, bias: Any = None, out_dtype: Any = None, *, weight: Any = None
) -> tuple[Tensor | None, Tensor | None]:
    """Matrices and ends of groups, by the names of torch's operation and of transformers'; None: more is asked for."""
    if bias is not None or out_dtype is not None:
        return None, None
    return (weight if mat2 is None else mat2), offs


def _serves(x: Tensor, matrices: Tensor, ends: Tensor) -> bool:
    alike = x.dim() == 2 and matrices.dim() == 3 and x.dtype == matrices.dtype and x.shape[1] == matrices.shape[1]
    counted = ends.dtype == torch.int32 and ends.shape == matrices.shape[:1] and len(ends) > 0
    on_host = all(tensor.device.type == "cpu" for tensor in (x, matrices, ends))
    return alike and counted and on_host and not torch.is_autocast_enabled("cpu")
