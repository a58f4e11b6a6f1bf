"""The host's kernels by name. A profile records these names, so a name is never given to another kernel.

None keeps a copy of a weight: host memory is never doubled, and which rows of a weight the host computes differs from
bucket to bucket. (oneDNN's prepacked layout needs one; calibration times it only to say what that leaves unused.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hetegen_compile.errors import HostKernelUnavailableError
from hetegen_compile.host_kernels.vectorised import DTYPES, Reading, library, vectorised_groups, vectorised_rows
from hetegen_compile.linear_parts import linear_rows, usual_strides


@dataclass(frozen=True)
class HostKernel:
    """One way to compute the part of a Linear that some rows of its weight contribute.

    Attributes:
        name: in profiles and reports.
        dtypes: of the weights that it takes.
        run: (x, rows, bias, lo, hi, dim) -> result, as ``linear_rows``.
        prepare: makes it ready on this machine, once a process; raises HostKernelUnavailableError.
        multiple: what the columns of the rows must be a multiple of.
        gaps: whether the rows may have gaps between them.
        groups: (x, matrices, ends) -> result, as ``vectorised_groups``; None: groups of tokens are computed one by one.
        reading: of a kernel of our own, how it reads weights: a host program (``program.py``) then computes so itself
            and does not call ``run``.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    run: Callable[[Tensor, Tensor, Tensor | None, int, int, int], Tensor]
    prepare: Callable[[], object]
    multiple: int = 1
    gaps: bool = True
    groups: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    reading: Reading | None = None

    def refusal(self, rows: Tensor) -> str | None:
        """Why this kernel cannot compute with such rows (a fake is enough) on this machine; None: it can."""
        if rows.dtype not in self.dtypes:
            return f"it has no form for {rows.dtype}"
        if self is not LINEAR and (rows.dim() != 2 or rows.stride(1) != 1):
            return f"the rows are not contiguous: strides {tuple(rows.stride())}"
        if not self.gaps and not rows.is_contiguous():
            return f"there are gaps between the rows: strides {tuple(rows.stride())}"
        if rows.shape[-1] % self.multiple:
            return f"{rows.shape[-1]} columns are no multiple of {self.multiple}"
        try:
            self.prepare()
        except HostKernelUnavailableError as error:
            return str(error)
        return None


INT8_COLUMNS = 16
"""torch's int8 kernel works on so many columns at a time and checks nothing: others give nonsense or crash."""


def int8_rows(x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int) -> Tensor:
    """``linear_rows`` for int8 weights as they are; a scale per row is the multiplication that follows.

    Raises:
        HostKernelUnavailableError: weights [in, out], which torch has no kernel for, or columns that it reads beyond.
    """
    if dim != 0:
        raise HostKernelUnavailableError("int8 weights [in, out] have no host kernel; store them [out, in]")
    if rows.shape[1] % INT8_COLUMNS:
        raise HostKernelUnavailableError(f"int8 weights need a multiple of {INT8_COLUMNS} columns, not {rows.shape[1]}")
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    ones = torch.ones(rows.shape[0], dtype=x.dtype, device="cpu")
    product: Tensor = torch.ops.aten._weight_int8pack_mm(flat, rows, ones)
    product = product.view(*x.shape[:-1], rows.shape[0])
    return product if bias is None else product + bias[lo:hi]


def torch_rows(x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int) -> Tensor:
    """``linear_rows``, which is torch's own Linear."""
    return linear_rows(usual_strides(x), rows, bias, lo, hi, dim)


def _nothing() -> None:
    """Nothing to prepare."""


def _vectorised(name: str, reading: Reading) -> HostKernel:
    run, groups = partial(vectorised_rows, reading), partial(vectorised_groups, reading)
    return HostKernel(name, DTYPES, run, library, groups=groups, reading=reading)


LINEAR = HostKernel("F.linear", (torch.float32, torch.bfloat16, torch.float16, torch.float64), torch_rows, _nothing)
VECTORISED = _vectorised("vectorised", Reading.ROWS)
TILED = _vectorised("vectorised, tiled", Reading.TILES)
TILED_THROUGH_L2 = _vectorised("vectorised, tiled through L2", Reading.TILES_THROUGH_L2)
INT8PACK = HostKernel("int8pack", (torch.int8,), int8_rows, _nothing, INT8_COLUMNS, gaps=False)

KERNELS = {kernel.name: kernel for kernel in (LINEAR, VECTORISED, TILED, TILED_THROUGH_L2, INT8PACK)}


def kernels_for(dtype: torch.dtype) -> tuple[HostKernel, ...]:
    """The kernels that take weights of a dtype, the one to fall back on first."""
    return tuple(kernel for kernel in KERNELS.values() if dtype in kernel.dtypes)
