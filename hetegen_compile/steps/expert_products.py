"""What a bound step calls for products with a mixture's experts: whole ones and the parts of streamed ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.grouped_parts import add_groups, bounds_of, first_groups, product_of
from hetegen_compile.host_kernels import HostExperts, bind_experts
from hetegen_compile.ir import info
from hetegen_compile.operands import grouped_part, host_groups
from hetegen_compile.passes.grouped_products import AUTOCAST, grouped_product, is_under_autocast, left_to_torch
from hetegen_compile.steps.host_functions import host_function

Kernels = Mapping[str, KernelChoice]
Refuse = Callable[..., None]


def whole_product(node: fx.Node, kernels: Kernels, refuse: Refuse) -> HostExperts | None:
    """For a host operation that is a product with experts, the host's kernels for them; None: it is something else.

    Or torch computes it, of which ``refuse(reason, where)`` is told unless the profile records no kernel of ours.
    """
    found = grouped_product(node)
    if found is None:
        return None
    matrices, why = info(found.matrices).value, left_to_torch(node, found)
    return _by_kernels(host_function(node), matrices, kernels, refuse, why)


def bind_host_groups(node: fx.Node, kernels: Kernels, refuse: Refuse) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """For a ``host_grouped``: (x, stack, ends) -> what the host's experts make."""
    part = host_groups(node)
    plain, stack = product_of(part.product), info(part.stack).value
    matrices = stack if part.dim else stack.transpose(1, 2)
    ours = _by_kernels(plain, matrices, kernels, refuse, AUTOCAST if is_under_autocast(node) else None)
    return functools.partial(first_groups, hi=part.hi, dim=part.dim, product=ours or plain)


def accelerators_groups(node: fx.Node) -> tuple[Callable[[Tensor], list[int]], Callable[..., Tensor]]:
    """For a ``partial_grouped``: what reads the host's ends, and (x, matrices, what was read, others) -> its rows."""
    part = grouped_part(node)
    groups = int(info(part.matrices).value.shape[0])
    bounds = functools.partial(bounds_of, lo=part.lo, groups=groups)
    return bounds, functools.partial(add_groups, dim=part.dim)


def _by_kernels(
    plain: Callable[..., Any], matrices: Tensor, kernels: Kernels, refuse: Refuse, why: str | None
) -> HostExperts | None:
    return bind_experts(plain, kernels, matrices, functools.partial(refuse, where="products with experts"), why)


__all__ = ["accelerators_groups", "bind_host_groups", "whole_product"]
