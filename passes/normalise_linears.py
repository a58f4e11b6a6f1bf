"""Every form of Linear with a stored weight becomes one node kind.

Why: a model says the same thing as ``F.linear``, as GPT-2's ``addmm`` with a weight stored [in, out], or as
a ``matmul`` with a parameter or its transpose; later passes want to see one form.

Before:

    y = torch._C._nn.linear(x, w, b)        z = torch.addmm(b, x, w)        u = x @ w.t()

After:

    y = hetegen.linear(x, w, b, 0)          z = hetegen.linear(x, w, b, 1)  u = hetegen.linear(x, w, None, 0)

``dim`` 0 is a weight stored [out, in], 1 one stored [in, out]. A Linear whose weight is not a whole,
contiguous, two-dimensional parameter that the graph leaves alone stays as it is, and the reason is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from hetegen_compile.ir import INPUT_OPS, LINEAR, annotate, erase_dead_nodes, info, is_tensor
from hetegen_compile.passes.autocast import autocast_regions
from hetegen_compile.passes.context import Context, Refusal
from hetegen_compile.passes.fold_transforms import Folded
from hetegen_compile.passes.sources import source_name

_LINEAR = {torch._C._nn.linear, torch.nn.functional.linear, torch.ops.aten.linear.default}
_ADDMM = {torch.addmm, "addmm"}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__"}
_TRANSPOSES = {torch.t, torch.transpose, torch.permute, torch.swapaxes, "t", "transpose", "permute", "swapaxes"}
_FUSED = {torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention}
_FUSED_REASON = (
    "its Linears are inside torch's fused path, which is not cut: torch.backends.mha.set_fastpath_enabled(False) "
    "before the model is called leaves them apart"
)


@dataclass(frozen=True)
class LinearMatch:
    """A node read as a Linear: its operands and whether the weight operand is [in, out]."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    weight_is_in_out: bool
    is_scaled: bool = False


def normalise_linears(module: fx.GraphModule, context: Context) -> None:
    """Replace every Linear that can be split by ``hetegen.linear``; keep a reason for each that cannot."""
    written = frozenset[int]().union(*(info(node).writes for node in module.graph.nodes))
    stored = made_of_weights(module.graph.nodes, context.weights)
    under_autocast = {node for region in autocast_regions(list(module.graph.nodes)) for node in region}
    for node in list(module.graph.nodes):
        if isinstance(node.target, Folded) and any(match_linear(inner) for inner in node.target.module.graph.nodes):
            context.refuse(Refusal(info(node).module or node.name, "it has products inside a vmap, which is not cut"))
        if node.target in _FUSED:
            context.refuse(Refusal(info(node).module or node.name, _FUSED_REASON))
        match = match_linear(node)
        if match is None:
            continue
        weight, dim = _stored_weight(match)
        if (weight.op not in INPUT_OPS and weight not in stored) or _is_with_cache(node, weight, context):
            continue  # a product of two activations
        reason = _why_not(match, weight, written, context)
        if match.x in stored:
            reason = "it is a product of parameters: nothing that the call is given is in it"
        if node in under_autocast:
            reason = "it is inside an autocast region of the forward, which is not cut"
        if reason is not None:
            context.refuse(Refusal(info(node).module or node.name, reason))
            continue
        _replace(module.graph, node, match, weight, dim)
    erase_dead_nodes(module.graph)


def _is_with_cache(node: fx.Node, weight: fx.Node, context: Context) -> bool:
    """Whether an activation is multiplied with what the call is given (a Linear with a given weight says so)."""
    return node.target in _MATMUL and weight.op == "placeholder" and weight.name not in context.weights


def made_of_weights(nodes: Iterable[fx.Node], weights: Container[str]) -> set[fx.Node]:
    """Parameters and buffers of the model, and what is computed from nothing else."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.name in weights or (node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def match_linear(node: fx.Node) -> LinearMatch | None:
    """``node`` as a Linear, None if it is none. Nothing is said of where its weight comes from."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _LINEAR:
        return _as_linear(node)
    if node.target in _ADDMM:
        return _as_addmm(node)
    if node.target in _MATMUL and len(node.args) == 2 and not node.kwargs:
        x, weight = node.args
        return _operands(x, weight, None, weight_is_in_out=True)
    return None


def _as_linear(node: fx.Node) -> LinearMatch | None:
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return _operands(given.get("input"), given.get("weight"), given.get("bias"), weight_is_in_out=False)


def _as_addmm(node: fx.Node) -> LinearMatch | None:
    if len(node.args) != 3:
        return None
    bias, x, weight = node.args
    match = _operands(x, weight, bias, weight_is_in_out=True)
    scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    return match and replace(match, is_scaled=scaled)


def _operands(x: Any, weight: Any, bias: Any, *, weight_is_in_out: bool) -> LinearMatch | None:
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not (is_tensor(x) and is_tensor(weight)):
        return None
    if bias is not None and not (isinstance(bias, fx.Node) and is_tensor(bias)):
        return None
    return LinearMatch(x, weight, bias, weight_is_in_out)


def untransposed(weight: fx.Node) -> tuple[fx.Node, bool]:
    """The node behind transposes of a matrix, and whether their number is odd."""
    flipped = False
    while (inner := _transposed(weight)) is not None:
        weight, flipped = inner, not flipped
    return weight, flipped


def _transposed(node: fx.Node) -> fx.Node | None:
    """The matrix that ``node`` is the transpose of, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_tensor(node):
        return None
    attribute = node.target is getattr and node.args[1] in ("T", "mT")
    if not attribute and node.target not in _TRANSPOSES:
        return None
    before, after = info(source).value, info(node).value
    swaps = before.dim() == 2 and after.dim() == 2 and tuple(after.stride()) == tuple(reversed(before.stride()))
    return source if swaps and tuple(after.shape) == tuple(reversed(before.shape)) else None


def _stored_weight(match: LinearMatch) -> tuple[fx.Node, int]:
    """The parameter itself and the dimension kind: 0 for stored [out, in], 1 for stored [in, out]."""
    root, flipped = untransposed(match.weight)
    return root, int(match.weight_is_in_out != flipped)


def _why_not(match: LinearMatch, weight: fx.Node, written: frozenset[int], context: Context) -> str | None:
    """Why this Linear cannot be split, or None."""
    value, x = info(weight).value, info(match.x).value
    name = source_name(weight) or weight.name
    if match.is_scaled:
        return "its alpha or beta is not 1"
    if weight.op not in INPUT_OPS:
        return f"its weight is computed from parameters ({name}), not a whole parameter"
    if weight.op != "placeholder" or weight.name not in context.weights:
        return f"{name} is not a parameter or buffer of the model"
    if value.dim() != 2:
        return f"{name} has {value.dim()} dimensions; a Linear's weight has two"
    if value.numel() == 0:
        return f"{name} is empty"
    if not value.is_contiguous():
        return f"{name} is not contiguous (strides {tuple(value.stride())})"
    if not value.dtype.is_floating_point:
        return f"{name} is {value.dtype}"
    if info(weight).storages & written:
        return f"{name} is written by the graph itself"
    if x.dtype != value.dtype and not torch.is_autocast_enabled("cpu"):
        return f"its input is {x.dtype} and {name} is {value.dtype}"
    return _why_not_bias(match, written)


def _why_not_bias(match: LinearMatch, written: frozenset[int]) -> str | None:
    if match.bias is None:
        return None
    bias: Tensor = info(match.bias).value
    if match.bias.op != "placeholder":
        return "its bias is computed, not stored"
    if info(match.bias).storages & written:
        return f"{source_name(match.bias) or match.bias.name} is written by the graph itself"
    return None if bias.dim() == 1 and bias.is_contiguous() else f"its bias has shape {tuple(bias.shape)}"


def _replace(graph: fx.Graph, node: fx.Node, match: LinearMatch, weight: fx.Node, dim: int) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(LINEAR, (match.x, weight, match.bias, dim))
    owner = source_name(weight).rpartition(".")[0]
    annotate(new, info(node), module=info(node).module or owner)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
