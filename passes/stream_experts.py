"""Products with the stacks of experts that are streamed become one node kind, of which parts are computed.

Why: at one token the host computes with the few experts that it needs while a transfer would move all of them; of a
prompt's tokens, or of many sequences', most experts get some, and then host and link share them. Which it is, the costs
of a bucket say (``worth_streaming``). A stack goes through the staging ring by whole experts, as the rows of a Linear
do; the first experts are the host's.

Before:

    w = stack.transpose(-2, -1); y = grouped_mm(x, w, offs=ends)

After:

    y = hetegen.grouped(x, stack, ends, 0, "_grouped_mm")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx

from hetegen_compile.cost_model import download_s, link_lost_s, upload_s
from hetegen_compile.ir import GROUPED, annotate, call, erase_dead_nodes, info, written_storages
from hetegen_compile.operands import weight_of
from hetegen_compile.passes.annotate_costs import dtype_name, value_bytes
from hetegen_compile.passes.autocast import autocast_regions
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import NodeCost
from hetegen_compile.passes.grouped_products import (
    GroupedProduct,
    expected_groups,
    grouped_on_accelerator_s,
    grouped_on_host_s,
    grouped_product,
    issuing_groups_s,
    products_with,
)
from hetegen_compile.passes.node_work import trip_s
from hetegen_compile.passes.plans import LinearPlan, Residency

_PARTS = 16
"""A stack is streamed in so many parts at most: each is a transfer that is waited for."""
_PART_BYTES = 16 << 20
"""Parts are no shorter than this where the ring has room: the link's rate has levelled off."""
_WORTH = 0.9
"""Of the host's seconds: which experts have tokens is not known ahead, so less of a gain is left alone."""

Stacks = Mapping[fx.Node, Mapping[fx.Node, GroupedProduct]]
"""Placeholders of stacks with the products that read them."""


def stream_experts(module: fx.GraphModule, context: Context) -> None:
    """Replace the products with stacks that residency has streamed."""
    names = require(context.residency, "choose_residency").streamed_stacks
    for stack in module.graph.find_nodes(op="placeholder"):
        for node, product in (products_with(stack) or {}).items() if stack.name in names else ():
            with module.graph.inserting_before(node):
                arguments = (product.x, stack, product.ends, product.dim, *info(node).aten)
                new = annotate(call(module.graph, GROUPED, arguments), info(node), side="accelerator")
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
    if names:
        erase_dead_nodes(module.graph)


def grouped_nodes(module: fx.GraphModule) -> dict[int, fx.Node]:
    """The products with streamed experts by their place in program order."""
    return {info(node).position: node for node in module.graph.find_nodes(op="call_function", target=GROUPED)}


def streamed_stacks(module: fx.GraphModule) -> list[fx.Node]:
    """The placeholders of the stacks that a graph streams, each once."""
    return list(dict.fromkeys(map(weight_of, grouped_nodes(module).values())))


# ---- whether ---------------------------------------------------------------------------------------------------


def worth_streaming(stacks: Sequence[fx.Node], nodes: Sequence[fx.Node], context: Context) -> Stacks:
    """Those of ``stacks`` that can be streamed by experts; none where that gains nothing.

    Or where the options put all rows on the host.
    """
    if context.lean or context.options.split == 1.0:
        return {}
    fixed, written = {node for region in autocast_regions(list(nodes)) for node in region}, written_storages(nodes)
    found: dict[fx.Node, Mapping[fx.Node, GroupedProduct]] = {}
    for stack in stacks:
        as_it_is = info(stack).value.is_contiguous() and info(stack).storages.isdisjoint(written)
        products = products_with(stack, fixed) if as_it_is else None
        if products is not None:
            found[stack] = products
    if not _gains(found, context):
        return {}
    if context.host_memory is not None:  # asking begins with what pinning needs, so it is only asked for what gains
        staged = context.host_memory.staged([stack.name for stack in found], context.weights)
        return found if _gains(found, replace(context, staged=staged)) else {}
    return found


def _gains(stacks: Stacks, context: Context) -> bool:
    """Whether host and link together, or the link alone, take less time than the host with what it reads."""
    costs = require(context.costs, "annotate_costs")
    pairs = [pair for products in stacks.values() for pair in products.items()]
    host_s = sum(costs[info(node).position].host_s for node, _ in pairs)
    return sum(_shared_s(*pair, context) for pair in pairs) < _WORTH * host_s


def _shared_s(node: fx.Node, product: GroupedProduct, context: Context) -> float:
    """Seconds of a product with streamed experts, the host having none of them or as many as are best."""
    cost = experts_cost(node, product, context)
    assert product.ends is not None
    return min(_others_s(cost) + _ends_s(product.ends, context), _together_s(cost) + trip_s(node, context))


def _ends_s(ends: fx.Node, context: Context) -> float:
    """Seconds until the host knows how many tokens each expert has."""
    return download_s(context.profile, value_bytes(ends, context)) + context.profile.synchronise_s


def _others_s(cost: NodeCost) -> float:
    """The link bringing all experts while the accelerator computes with those that are there."""
    return max(cost.link_s, cost.accelerator_s)


def _together_s(cost: NodeCost) -> float:
    """The same beside the host, each with as many experts as are best."""
    return cost.host_s * _others_s(cost) / (cost.host_s + _others_s(cost))


def experts_cost(node: fx.Node, product: GroupedProduct, context: Context) -> NodeCost:
    """What a product costs if it is computed in parts: by the host beside the link, or all of it streamed."""
    profile, stack = context.profile, product.matrices
    flops, dtype, nbytes = context.number(info(node).flops), dtype_name(info(stack).value), value_bytes(stack, context)
    groups, parts = expected_groups(product, context), -(-nbytes // _part_bytes(stack, context.residency))
    accelerator_s, staged = grouped_on_accelerator_s(groups, dtype, flops, context), stack.name in context.staged
    return NodeCost(
        flops=flops,
        traffic_bytes=float(nbytes),
        weight_bytes=nbytes,
        tokens=round(groups.read * groups.tokens),
        host_s=grouped_on_host_s(product, dtype, flops, context, contended=True),
        accelerator_s=max(accelerator_s, issuing_groups_s(groups, context)),
        link_s=max(parts * upload_s(profile, nbytes / parts), nbytes / profile.pin_bytes_per_s if staged else 0.0),
        host_alone_s=grouped_on_host_s(product, dtype, flops, context),
        link_lost_s=link_lost_s(profile, dtype, groups.read * groups.nbytes),
    )


def cost_of(node: fx.Node, context: Context) -> NodeCost:
    """The cost of a Linear, or of a product with streamed experts, of a graph whose nodes are one or the other."""
    if node.target != GROUPED:
        return require(context.costs, "annotate_costs")[info(node).position]
    product = grouped_product(node)
    assert product is not None
    return experts_cost(node, product, context)


# ---- how -------------------------------------------------------------------------------------------------------


def expert_bytes(stack: fx.Node) -> int:
    """Bytes of one matrix of a stack."""
    value: Tensor = info(stack).value
    return int(value.numel()) // int(value.shape[0]) * int(value.element_size())


def chunk_bytes(stack: fx.Node) -> int:
    """Bytes of a part of a stack where the ring has room: of whole experts."""
    groups, nbytes = int(info(stack).value.shape[0]), expert_bytes(stack)
    return min(groups, max(-(-groups // _PARTS), _PART_BYTES // nbytes)) * nbytes


def _part_bytes(stack: fx.Node, residency: Residency | None) -> int:
    """Bytes of a part, of whole experts: where the ring has room unless it is known how much it has."""
    room = residency.stack_chunk_bytes if residency is not None and residency.stack_chunk_bytes else chunk_bytes(stack)
    return max(1, min(room, chunk_bytes(stack)) // expert_bytes(stack)) * expert_bytes(stack)


def with_host_experts(stack: fx.Node, host: int, residency: Residency) -> LinearPlan:
    """A plan, as of a Linear's rows, with the first experts on the host; all others are streamed."""
    groups = int(info(stack).value.shape[0])
    most = _part_bytes(stack, residency) // expert_bytes(stack)
    parts = -(-(groups - host) // most)
    size = -(-(groups - host) // max(1, parts))
    streamed = tuple((lo, min(lo + size, groups)) for lo in range(host, groups, max(1, size)))
    return LinearPlan(groups, host, streamed, None)


def experts_plan(node: fx.Node, context: Context) -> LinearPlan:
    """The plan of one product by itself: host and link finish together, if that pays for the trip."""
    stack = weight_of(node)
    ends: fx.Node = node.args[2]  # type: ignore[assignment]
    residency, groups = require(context.residency, "choose_residency"), int(info(stack).value.shape[0])
    if context.options.split != "auto":
        return with_host_experts(stack, round(context.options.split * groups), residency)
    cost = cost_of(node, context)
    others_s = _others_s(cost)
    if _together_s(cost) + trip_s(node, context) >= others_s + _ends_s(ends, context):
        return with_host_experts(stack, 0, residency)
    return with_host_experts(stack, round(groups * others_s / (others_s + cost.host_s)), residency)


__all__ = [
    "Stacks",
    "chunk_bytes",
    "cost_of",
    "expert_bytes",
    "experts_cost",
    "experts_plan",
    "grouped_nodes",
    "stream_experts",
    "streamed_stacks",
    "with_host_experts",
    "worth_streaming",
]
