"""Grouped products: consecutive rows of activations, each group with a matrix of its own out of a stack.

Why: the experts of a mixture lie in one parameter, and a token reads few of them. On the host that is a Linear for each
expert that has tokens, at the speed at which the host reads weights; torch's own kernels have half of it or less.

    y = _grouped_mm(x [tokens, in], matrices [experts, in, out], offs [experts])
    y[offs[i - 1] : offs[i]] = x[offs[i - 1] : offs[i]] @ matrices[i]

A stack that nothing reads but such products, of it or of its transpose, can be streamed by groups
(``stream_experts``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, fx

from hetegen_compile.cost_model import accelerator_linear_s, host_linear_s
from hetegen_compile.ir import GROUPED, info, is_tensor
from hetegen_compile.operands import GroupedPart
from hetegen_compile.passes.aten_listener import GROUPED_ATEN
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.tensors import tensor_bytes, to_expr

AUTOCAST = "autocast is on"


class GroupedProduct(NamedTuple):
    """What a grouped product reads: activations [tokens, in] and matrices [groups, in, out] or, for ``dim`` 0, the
    stack that they are the transposes of. ``ends`` is None where it is given anything else than where groups end."""

    x: fx.Node
    matrices: fx.Node
    ends: fx.Node | None = None
    dim: int = 1


def grouped_product(node: fx.Node) -> GroupedProduct | None:
    """The operands of a node that is one grouped product and nothing else; None: it is something else."""
    if node.op != "call_function" or len(info(node).aten) != 1 or GROUPED_ATEN.isdisjoint(info(node).aten):
        return None
    if node.target == GROUPED:
        x, stack, ends, dim, _ = node.args
        return GroupedProduct(x, stack, ends, dim)  # type: ignore[arg-type]
    operands = (*node.args[:2], *(node.kwargs[name] for name in ("mat2", "weight") if name in node.kwargs))
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    values = [info(operand).value for operand in operands if isinstance(operand, fx.Node)]
    dims = [value.dim() for value in values if isinstance(value, Tensor)]
    return GroupedProduct(*operands, _ends(node)) if dims == [2, 3] else None  # type: ignore[arg-type]


def _ends(node: fx.Node) -> fx.Node | None:
    """Where a product's groups end, if that is all that it is given beside its operands."""
    (*more,) = node.args[2:]
    named = {name: value for name, value in node.kwargs.items() if name not in ("mat2", "weight") and value is not None}
    ends = named.pop("offs", None) if not more else more.pop(0)
    known = isinstance(ends, fx.Node) and is_tensor(ends) and info(ends).value.dtype is torch.int32
    return ends if known and not named and not any(one is not None for one in more) else None  # type: ignore[return-value]


def left_to_torch(node: fx.Node, product: GroupedProduct) -> str | None:
    """Why the host's kernels for Linears do not compute a product, whatever the profile records; None: they do."""
    x, matrices = info(product.x).value, info(product.matrices).value
    if product.ends is None:
        return "it has more operands than the experts' matrices and where groups end, as int32"
    if x.dtype != matrices.dtype:
        return f"activations are {x.dtype}, the experts' matrices {matrices.dtype}"
    return AUTOCAST if is_under_autocast(node) else None


def is_under_autocast(node: fx.Node) -> bool:
    """Whether autocast is on for a node, by the caller or in the program."""
    mine = info(node).autocast
    return torch.is_autocast_enabled("cpu") if mine is None else mine != "off"


def products_with(stack: fx.Node, fixed: Collection[fx.Node] = ()) -> dict[fx.Node, GroupedProduct] | None:
    """The products that read a stack's matrices, with the stack as their operand; None if anything else does.

    Nor is a product known that is one of the nodes ``fixed`` or of another dtype than the stack.
    """
    found: dict[fx.Node, GroupedProduct] = {}
    for user in stack.users:
        matrices, dim = (user, 0) if _is_transpose(user, stack) else (stack, 1)
        for node in [*matrices.users] if dim == 0 else [user]:
            product = grouped_product(node)
            if product is None or product.ends is None or product.matrices is not matrices or node in fixed:
                return None
            if info(product.x).value.dtype != info(stack).value.dtype or not is_tensor(node):
                return None
            if not _is_aligned(info(stack).value) and "_grouped_mm" in info(node).aten:
                return None  # torch's operation takes padded rows, but a part's rows are put together without padding
            found[node] = product._replace(matrices=stack, dim=dim)
    return found or None


def _is_aligned(stack: Tensor) -> bool:
    """Whether rows of activations without padding are at multiples of 16 bytes."""
    return all(int(size) * stack.element_size() % 16 == 0 for size in stack.shape[1:])


def _is_transpose(node: fx.Node, stack: fx.Node) -> bool:
    """Whether a node is the stack with each matrix transposed."""
    if not is_tensor(node) or node.all_input_nodes != [stack] or info(node).storages != info(stack).storages:
        return False
    view, whole = info(node).value, info(stack).value
    swapped = (0, 2, 1)
    same = view.dim() == 3 and all(view.shape[a] == whole.shape[b] for a, b in enumerate(swapped))
    return same and all(view.stride(a) == whole.stride(b) for a, b in enumerate(swapped))


class Groups(NamedTuple):
    """What is expected of the experts of a product, or of a share of them: tokens are shared out equally.

    Attributes:
        read: how many have tokens, no more than there are tokens.
        tokens: those of each that has some.
        nbytes: of each matrix.
    """

    read: float
    tokens: float
    nbytes: float


def expected_groups(product: GroupedProduct, context: Context, share: float = 1.0) -> Groups:
    """What is expected of a ``share`` of a product's experts at the context's sizes."""
    tokens, groups = (context.number(to_expr(info(one).value.shape[0])) for one in (product.x, product.matrices))
    return _expected(tokens, groups, context.number(tensor_bytes(info(product.matrices).value)), share)


def expected_of_part(part: GroupedPart, context: Context) -> Groups:
    """The same of the experts of a part on the accelerator."""
    tokens, groups = (context.number(to_expr(info(one).value.shape[0])) for one in (part.x, part.ends))
    count = float(info(part.matrices).value.shape[0])
    nbytes = context.number(tensor_bytes(info(part.matrices).value))
    return _expected(tokens, groups, nbytes * groups / count, count / groups)


def _expected(tokens: float, groups: float, nbytes: float, share: float) -> Groups:
    read = max(1.0, min(groups, tokens))
    return Groups(share * read, max(1.0, tokens / read), nbytes / max(1.0, groups))


def grouped_on_host_s(
    product: GroupedProduct, dtype: str, flops: float, context: Context, share: float = 1.0, *, contended: bool = False
) -> float:
    """Seconds of a ``share`` of a product's experts on the host, which has ``flops``: a Linear for each of them.

    Where nothing of it is streamed it has the memory for itself, like the host's other operations: what is uploaded
    meanwhile is not counted.
    """
    profile, groups = context.profile, expected_groups(product, context, share)
    launch_s = profile.host.launch_s
    each_s = host_linear_s(profile, dtype, groups.tokens, groups.nbytes, flops / groups.read, contended=contended)
    return launch_s + groups.read * (each_s - launch_s)


def grouped_on_accelerator_s(groups: Groups, dtype: str, flops: float, context: Context) -> float:
    """Seconds of the accelerator for a Linear for each of the experts, which have ``flops``, one after the other."""
    each_s = accelerator_linear_s(context.profile, dtype, groups.tokens, groups.nbytes, flops / groups.read)
    return groups.read * each_s


def issuing_groups_s(groups: Groups, context: Context) -> float:
    """Seconds of the issuing thread for them, and for the zeros that they are written over."""
    return (1.0 + groups.read) * context.profile.accelerator.issuing_s(segment=False)


__all__ = [
    "AUTOCAST",
    "GroupedProduct",
    "Groups",
    "expected_groups",
    "expected_of_part",
    "grouped_on_accelerator_s",
    "grouped_on_host_s",
    "grouped_product",
    "is_under_autocast",
    "issuing_groups_s",
    "left_to_torch",
    "products_with",
]
