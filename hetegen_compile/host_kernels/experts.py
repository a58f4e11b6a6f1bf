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
from hetegen_compile.host_kernels.choose import HostLinear, bind_kernels, recorded
from hetegen_compile.host_kernels.kernels import LINEAR


@dataclass(frozen=True)
class HostExperts:
    """A grouped product: a callable (x [tokens, in], matrices [groups, in, out], offs [groups]) -> [tokens, out].

    Attributes:
        plain: the operation itself, which computes what the kernels do not serve: other dtypes, devices or layouts than
            bound, a bias, autocast, offsets that do not ascend.
        linear: chooses the kernel of an expert's tokens.
        dim: 0 where each expert's matrix is stored [out, in], 1 for [in, out].
    """

    plain: Callable[..., Any]
    linear: HostLinear
    dim: int

    def __call__(self, x: Tensor, *operands: Any, **more: Any) -> Any:
        """The product; of our kernels, rows that belong to no group are zero."""
        matrices, ends = _operands(*operands, **more)
        if matrices is None or ends is None or not self._serves(x, matrices, ends):
            return self.plain(x, *operands, **more)
        last = ends.tolist()
        counts = [end - start for start, end in pairwise((0, *last))]
        if min(counts) < 0 or last[-1] > x.shape[0]:
            return self.plain(x, *operands, **more)  # what it gives there, if anything, is torch's to say
        groups = self.linear.kernel(max(counts)).groups if self.dim == 0 else None
        out = self._one_by_one(x, matrices, last) if groups is None else groups(x, matrices.transpose(1, 2), ends)
        out[last[-1] :].zero_()
        return out

    def _one_by_one(self, x: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
        out = x.new_empty((x.shape[0], matrices.shape[2]))
        for index, (start, end) in enumerate(pairwise((0, *ends))):
            if start != end:
                rows = matrices[index].t() if self.dim == 0 else matrices[index]
                kernel = self.linear.kernel(end - start)
                out[start:end] = kernel.run(x[start:end], rows, None, 0, rows.shape[0], self.dim)
        return out

    def _serves(self, x: Tensor, matrices: Tensor, ends: Tensor) -> bool:
        alike = x.dim() == 2 and matrices.dim() == 3 and x.dtype == matrices.dtype and x.shape[1] == matrices.shape[1]
        counted = ends.dtype == torch.int32 and ends.shape == matrices.shape[:1]
        if not (alike and counted and matrices.numel() and matrices.stride(1 + self.dim) == 1):
            return False
        on_host = all(tensor.device.type == "cpu" for tensor in (x, matrices, ends))
        return on_host and not torch.is_autocast_enabled("cpu")


def bind_experts(
    plain: Callable[..., Any],
    choices: Mapping[str, KernelChoice],
    matrices: Tensor,
    refuse: Callable[[str], None] = lambda reason: None,
    by_torch: str | None = None,
) -> HostExperts | None:
    """The callable for a grouped product ``plain`` with such matrices [groups, in, out] (a fake is enough).

    None: the profile records no kernel of ours for them, they are contiguous in neither direction, or ``by_torch`` says
    why else torch is to compute the product; ``refuse`` is told of the last two. Sizes are not looked at: they may be
    symbols.
    """
    choice = recorded(choices, matrices.dtype)
    if choice is None or all(name == LINEAR.name for _, name in choice.limits()):
        return None
    contiguous = [dim for dim in (0, 1) if _is_one(matrices.stride(1 + dim))]
    reason = by_torch if contiguous else "the experts' matrices are contiguous in neither direction"
    if reason is not None:
        refuse(f"computed by torch: {reason}")
        return None
    rows = torch.empty((1, 1), dtype=matrices.dtype, device="meta")
    return HostExperts(plain, bind_kernels(choices, rows, 0, 1, contiguous[0], refuse), contiguous[0])


def _is_one(stride: Any) -> bool:
    return type(stride) is int and stride == 1


def _operands(
    mat2: Any = None, offs: Any = None, bias: Any = None, out_dtype: Any = None, *, weight: Any = None
) -> tuple[Tensor | None, Tensor | None]:
    """Matrices and ends of groups, by the names of torch's operation and of transformers'; None: more is asked for."""
    if bias is not None or out_dtype is not None:
        return None, None
    return (weight if mat2 is None else mat2), offs
