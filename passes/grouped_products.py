"""Grouped products: consecutive rows of activations, each group with a matrix of its own out of a stack.

Why: the experts of a mixture lie in one parameter, and a token reads few of them. On the host that is a Linear for each
expert that has tokens, at the speed at which the host reads weights; torch's own kernels have half of it or less.

    y = _grouped_mm(x [tokens, in], matrices [experts, in, out], offs [experts])
    y[offs[i - 1] : offs[i]] = x[offs[i - 1] : offs[i]] @ matrices[i]
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, fx

from hetegen_compile.cost_model import host_linear_s
from hetegen_compile.ir import info
from hetegen_compile.passes.aten_listener import GROUPED_ATEN
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.tensors import tensor_bytes, to_expr


class GroupedProduct(NamedTuple):
    """What a grouped product reads: activations [tokens, in] and matrices [groups, in, out]."""

    x: fx.Node
    matrices: fx.Node


def grouped_product(node: fx.Node) -> GroupedProduct | None:
    """The operands of a node that is one grouped product and nothing else; None: it is something else."""
    if node.op != "call_function" or len(info(node).aten) != 1 or GROUPED_ATEN.isdisjoint(info(node).aten):
        return None
    operands = (*node.args[:2], *(node.kwargs[name] for name in ("mat2", "weight") if name in node.kwargs))
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    product = GroupedProduct(*operands)  # type: ignore[arg-type]
    values = [info(operand).value for operand in product]
    dims = [value.dim() for value in values if isinstance(value, Tensor)]
    return product if dims == [2, 3] else None


def grouped_on_host_s(product: GroupedProduct, dtype: str, flops: float, context: Context) -> float:
    """Seconds of a grouped product on the host: a Linear for each expert, with an equal share of the tokens.

    No more experts are read than there are tokens. Like the host's other operations it has the memory for itself; what
    is uploaded meanwhile is not counted.
    """
    profile = context.profile
    matrices = info(product.matrices).value
    tokens, groups = (context.number(to_expr(info(operand).value.shape[0])) for operand in product)
    read = max(1.0, min(groups, tokens))
    nbytes = context.number(tensor_bytes(matrices)) / max(1.0, groups)
    launch_s = profile.host.launch_s
    each_s = host_linear_s(profile, dtype, max(1.0, tokens / read), nbytes, flops / read, contended=False)
    return launch_s + read * (each_s - launch_s)


__all__ = ["GroupedProduct", "grouped_on_host_s", "grouped_product"]
