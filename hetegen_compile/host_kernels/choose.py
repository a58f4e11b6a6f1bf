"""The kernel of each host part, as the hardware profile recorded it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.geometry import dtype_name
from hetegen_compile.host_kernels.kernels import KERNELS, LINEAR, HostKernel
from hetegen_compile.linear_parts import narrowed_operands


@dataclass(frozen=True)
class HostLinear:
    """``lo:hi`` of one Linear, along an axis of its weight, on the host: a callable (x, rows, bias) -> result.

    ``kernels`` are the kernels by the highest number of tokens that each serves, ascending; the last serves the rest.
    """

    lo: int
    hi: int
    dim: int
    kernels: tuple[tuple[float, HostKernel], ...]
    axis: int = 0

    def __call__(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """The part of the Linear that ``rows`` contribute."""
        tokens = x.numel() // (x.shape[-1] or 1)
        kernel = self.kernel(tokens)
        if not tokens or rows.is_floating_point() and (x.dtype != rows.dtype or torch.is_autocast_enabled("cpu")):
            kernel = LINEAR  # autocast decides the dtype; the rest are cases that only torch defines
        if self.axis == 0:
            return kernel.run(x, rows, bias, self.lo, self.hi, self.dim)
        x, bias = narrowed_operands(x, bias, self.lo, self.hi, sums=self.dim == 0)
        return kernel.run(x, rows, bias, 0, rows.shape[0], self.dim)  # a whole Linear with fewer columns

    @property
    def is_torchs(self) -> bool:
        """Whether ``F.linear`` computes it, whatever the number of tokens: then this is ``linear_rows``."""
        return all(kernel is LINEAR for _, kernel in self.kernels)

    def kernel(self, tokens: int) -> HostKernel:
        """The kernel for a number of tokens."""
        for most, kernel in self.kernels:
            if tokens <= most:
                return kernel
        return self.kernels[-1][1]


def bind_kernels(
    choices: Mapping[str, KernelChoice],
    rows: Tensor,
    lo: int,
    hi: int,
    dim: int,
    refuse: Callable[[str], None] = lambda reason: None,
    axis: int = 0,
) -> HostLinear:
    """The callable that computes ``rows`` (a fake is enough) with the kernels that a profile records.

    Each kernel is prepared here, so that no step builds one. A recorded kernel that cannot be used is replaced by
    ``F.linear``; ``refuse`` is told the reason.
    """
    choice = recorded(choices, rows.dtype)
    if choice is None:
        return HostLinear(lo, hi, dim, ((float("inf"), LINEAR),), axis)
    usable = tuple((most, _usable(name, rows, refuse)) for most, name in choice.limits())
    return HostLinear(lo, hi, dim, usable, axis)


def recorded(choices: Mapping[str, KernelChoice], dtype: torch.dtype) -> KernelChoice | None:
    """What a profile records for weights of a dtype."""
    return choices.get(dtype_name(dtype))


def _usable(name: str, rows: Tensor, refuse: Callable[[str], None]) -> HostKernel:
    kernel = KERNELS.get(name)
    reason = "this version has no kernel of that name" if kernel is None else kernel.refusal(rows)
    if kernel is not None and reason is None:
        return kernel
    refuse(f"computed with F.linear, not with the hardware profile's kernel '{name}': {reason}")
    return LINEAR
