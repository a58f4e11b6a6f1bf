"""What each node costs on each resource.

Why: every decision after this one compares seconds. FLOPs and bytes are the sympy expressions that capture
left on the nodes; here they become numbers for one bucket of tokens and seconds on one machine.
"""

from __future__ import annotations

from functools import cache

import sympy
import torch
from torch import Tensor, fx

from hetegen_compile import geometry
from hetegen_compile.cost_model import (
    HardwareProfile,
    accelerator_linear_s,
    accelerator_op_s,
    host_linear_s,
    host_op_s,
    link_lost_s,
    upload_s,
)
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.operands import weight_of, x_of
from hetegen_compile.passes.append_tokens import append_tokens, lies_by_token
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.findings import Costs, NodeCost
from hetegen_compile.passes.grouped_products import grouped_on_host_s, grouped_product, left_to_torch
from hetegen_compile.passes.tensors import tensor_bytes, tensors_in, to_expr


def annotate_costs(module: fx.GraphModule, context: Context) -> Costs:
    """Work and seconds of every node that computes, at the context's sizes."""
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    return {
        info(node).position: linear_cost(node, context) if node.target == LINEAR else _other(node, context)
        for node in nodes
    }


def linear_cost(node: fx.Node, context: Context, tokens: int | None = None) -> NodeCost:
    """A Linear's cost; ``tokens`` replaces the number of activation rows of the bucket (1: a decode step)."""
    x, weight = info(x_of(node)).value, info(weight_of(node)).value
    own = max(1, round(context.number(to_expr(x.numel())) / max(1, int(x.shape[-1]))))
    flops = context.number(info(node).flops) * ((tokens or own) / own)
    nbytes = int(weight.numel()) * weight.element_size()
    return _linear_seconds(context.profile, dtype_name(weight), tokens or own, nbytes, flops)


def _linear_seconds(profile: HardwareProfile, dtype: str, tokens: int, nbytes: int, flops: float) -> NodeCost:
    return NodeCost(
        flops=flops,
        traffic_bytes=float(nbytes),
        weight_bytes=nbytes,
        tokens=tokens,
        host_s=host_linear_s(profile, dtype, tokens, nbytes, flops),
        accelerator_s=accelerator_linear_s(profile, dtype, tokens, nbytes, flops),
        link_s=upload_s(profile, nbytes),
        host_alone_s=host_linear_s(profile, dtype, tokens, nbytes, flops, contended=False),
        link_lost_s=link_lost_s(profile, dtype, nbytes),
    )


def _other(node: fx.Node, context: Context) -> NodeCost:
    flops = context.number(info(node).flops)
    traffic = context.number(info(node).traffic_bytes)
    dtype = dtype_name(info(node).value)
    return NodeCost(
        flops=flops,
        traffic_bytes=traffic,
        weight_bytes=0,
        tokens=0,
        host_s=host_operation_s(node, host_traffic_bytes(node, traffic, context), context),
        accelerator_s=accelerator_op_s(context.profile, dtype, flops, traffic),
        link_s=0.0,
    )


def host_operation_s(node: fx.Node, traffic_bytes: float, context: Context) -> float:
    """Seconds of a node that is no Linear on the host, where it moves ``traffic_bytes``."""
    flops, dtype = context.number(info(node).flops), dtype_name(info(node).value)
    product = grouped_product(node)
    if product is not None and left_to_torch(node, product) is None:
        return grouped_on_host_s(product, dtype, flops, context)
    return host_op_s(context.profile, dtype, flops, traffic_bytes)


def host_traffic_bytes(node: fx.Node, traffic: float, context: Context) -> float:
    """Bytes of ``traffic`` that the host has: of a cache that lies token by token those of what is new, twice."""
    if node.target is not append_tokens:
        return traffic
    past, new = node.all_input_nodes  # two: a cache is not appended to itself
    needs_no_copy = info(past).value.dim() == 1 or lies_by_token(info(past).value)
    return 2.0 * value_bytes(new, context) if needs_no_copy else traffic


_name = cache(geometry.dtype_name)


def dtype_name(value: object) -> str:
    """The profile's name for a value's dtype; float32 for what holds no floating-point tensor."""
    dtypes = (tensor.dtype for tensor in tensors_in(value))
    return _name(next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32))


def value_size(node: fx.Node) -> sympy.Expr:
    """Bytes of all tensors in the node's result, an expression over the graph's sizes."""
    return sympy.Add(*(tensor_bytes(tensor) for tensor in tensors_in(info(node).value)))


def value_bytes(node: fx.Node, context: Context) -> int:
    """Bytes of all tensors in the node's result at the context's sizes."""
    return int(sum(_bytes(tensor, context) for tensor in tensors_in(info(node).value)))


def _bytes(tensor: Tensor, context: Context) -> float:
    elements = tensor.numel()  # a number already in nearly all graphs: no algebra
    return elements * tensor.element_size() if type(elements) is int else context.number(tensor_bytes(tensor))
