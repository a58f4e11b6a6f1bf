"""Weights that cannot be split, and what is computed with them on the host where they do not fit.

Why: only a Linear's whole, contiguous weight is split by rows and streamed. A convolution's kernel, a range
of a matrix's columns, the parts that a weight is computed from (``weight_norm``, dequantisation) and stacks of experts
are read by other operations. Mirrored whole, a model in which these exceed the budget would not run at all. So they
are claims on the budget as well, each all or nothing; those that do not fit stay where they lie, and their readers run
on the host:

    w = g * v / v.norm()           host: w, from parameters alone
    y = linear(x, w)               host: y = linear(download(x), w), then an upload

Stacks (the experts of a mixture in one parameter) come after the Linears: a token reads few of the experts, so the
host computes with those, while a transfer would move all of them (where most are read they may be streamed after all:
``stream_experts``). What lies between the two projections of an expert runs on the host, too. All others come before
the Linears, which can be streamed, and those first that save most.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence

from torch import Tensor, fx

from hetegen_compile.ir import IN_PARTS, INPUT_OPS, LINEAR, info, written_storages
from hetegen_compile.options import format_bytes
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.autocast import autocast_regions
from hetegen_compile.passes.choose_splits import table_only
from hetegen_compile.passes.context import Context, Refusal, require
from hetegen_compile.passes.normalise_linears import made_of_weights
from hetegen_compile.passes.sources import source_name

_LEAST = 8
"""Rows and columns of a stack's matrices: kernels of convolutions and windows have fewer."""

_LEAST_BYTES, _LEAST_VECTOR_BYTES = 16 << 10, 1 << 20
"""Of other weights that may stay on the host: computing with those there takes a trip each, so smaller ones (norms,
biases) are mirrored. Of what is made of them, too: less is sent up instead of computing with it on the host."""


def stacked_weights(module: fx.GraphModule, context: Context) -> list[fx.Node]:
    """Placeholders of the model's stacks of matrices that nothing writes, in the graph's order."""
    return [
        node
        for node in module.graph.find_nodes(op="placeholder")
        if node.name in context.weights and _is_stack(info(node).value) and not info(node).writes and node.users
        and not any("convolution" in name for user in node.users for name in info(user).aten)
    ]  # fmt: skip


def other_weights(module: fx.GraphModule, context: Context) -> dict[fx.Node, set[fx.Node]]:
    """Placeholders of the model's other weights that no Linear reads and the host may compute with, in order.

    With each what is computed with it, and with what is made of weights alone on the way.
    """
    candidates = [
        node for node in module.graph.find_nodes(op="placeholder")
        if node.name in context.weights and node.users and value_bytes(node, context) >= _least_bytes(node)
        and not any(user.target == LINEAR for user in node.users) and not table_only(node, context)
    ]  # fmt: skip
    if not candidates:
        return {}
    stacks = {*stacked_weights(module, context)}
    written = written_storages(module.graph.nodes)
    fixed = {node for region in autocast_regions(list(module.graph.nodes)) for node in region}
    of_weights = made_of_weights(module.graph.nodes, context.weights)
    readers = {
        node: _readers(node, of_weights)
        for node in candidates
        if node not in stacks and not info(node).storages & written
    }
    return {node: found for node, found in readers.items() if fixed.isdisjoint(found)}


def _least_bytes(node: fx.Node) -> int:
    value = info(node).value
    return _LEAST_BYTES if isinstance(value, Tensor) and value.dim() > 1 else _LEAST_VECTOR_BYTES


def without_use(module: fx.GraphModule, context: Context, names: Collection[str], on_host: Collection[str]) -> set[str]:
    """Those weights of ``names`` of which every reader is computed on the host anyway, because of ``on_host``."""
    if not names or not on_host:
        return set()
    there = computed_on_host(list(module.graph.nodes), on_host, context.weights)
    placeholders = module.graph.find_nodes(op="placeholder")
    return {node.name for node in placeholders if node.name in names and there.issuperset(node.users)}


def seconds_saved(readers: Iterable[fx.Node], context: Context) -> float:
    """Seconds by which the accelerator is faster at what is computed with a weight."""
    costs = [require(context.costs, "annotate_costs")[info(node).position] for node in readers]
    return sum(cost.host_s - cost.accelerator_s for cost in costs)


def computed_on_host(nodes: Sequence[fx.Node], names: Collection[str], weights: Collection[str] = ()) -> set[fx.Node]:
    """Nodes that read the weights ``names``, and those that lie between two stacks of them.

    ``weights`` are the names of all that the model has: what is made of a weight and of such is a weight as well.
    """
    readers, between = set[fx.Node](), set[fx.Node]()
    moved = {node for node in nodes if node.op == "placeholder" and node.name in names}
    stacks = {node for node in moved if _is_stack(info(node).value)}
    of_weights = made_of_weights(nodes, {*weights, *names})
    for node in nodes:
        if node.op in (*INPUT_OPS, "output") or moved.isdisjoint(node.all_input_nodes):
            continue
        readers.add(node)
        if not stacks.isdisjoint(node.all_input_nodes):
            between.add(node)
            if moved.issuperset(_floating(node.all_input_nodes)):  # a view, a cast or a choice of matrices
                moved.add(node)
                stacks.add(node)
        elif node in of_weights and _is_large(node):
            moved.add(node)
    found = readers | _between(nodes, between) | _operands_of_weights(moved, of_weights)
    written = written_storages(found)
    return found | {node for node in nodes if node.op not in (*INPUT_OPS, "output") and _touches(node, written)}


def unsplit_on_host(module: fx.GraphModule, context: Context) -> list[fx.Node]:
    """Placeholders of the weights that cannot be split and stay on the host, in the graph's order."""
    names = require(context.residency, "choose_residency").host_weights
    return [node for node in module.graph.find_nodes(op="placeholder") if node.name in names]


def weights_on_host(module: fx.GraphModule, context: Context) -> tuple[Refusal, ...]:
    """What ``explain()`` says of the weights that stay on the host whole."""
    kept = unsplit_on_host(module, context)
    stacks = [node for node in kept if _is_stack(info(node).value)]
    others = [node for node in kept if node not in stacks]
    found = []
    reasons = (
        (others, "weights", "cannot be split"),
        (stacks, "stacked weights", "streaming them gains nothing or is not possible"),
    )
    for nodes, what, why in reasons:
        if nodes:
            first, more = source_name(nodes[0]) or nodes[0].name, len(nodes) - 1
            nbytes = format_bytes(sum(value_bytes(node, context) for node in nodes))
            reason = f"{nbytes} of {what} do not fit and {why}: computed on the host, where they lie"
            found.append(Refusal(f"{first} and {more} more" if more else first, reason))
    return tuple(found)


def _operands_of_weights(moved: Iterable[fx.Node], of_weights: Container[fx.Node]) -> set[fx.Node]:
    """What is computed of weights alone for a weight that is computed on the host (``b @ a`` of ``w + b @ a``)."""
    found, pending = set[fx.Node](), [*moved]
    while pending:
        more = [
            one for one in pending.pop().all_input_nodes
            if one.op not in INPUT_OPS and one in of_weights and one not in found
        ]  # fmt: skip
        found.update(more)
        pending += more
    return found


def _readers(weight: fx.Node, of_weights: Container[fx.Node]) -> set[fx.Node]:
    found, pending = set[fx.Node](), [weight]
    while pending:
        for user in pending.pop().users:
            if user.op != "output" and user not in found:
                found.add(user)
                pending += [user] if user in of_weights else []
    return found


def _is_large(node: fx.Node) -> bool:
    """Whether a value of fixed size is so large that it is not sent up in each step."""
    value = info(node).value
    sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
    fixed = isinstance(value, Tensor) and all(type(size) is int for size in sizes)
    return not isinstance(value, Tensor) or (fixed and int(value.numel()) * value.element_size() >= _LEAST_BYTES)


def _touches(node: fx.Node, storages: frozenset[int]) -> bool:
    """Whether it is at one of these storages, which are written on the host and so are right only there."""
    return node.target not in IN_PARTS and not storages.isdisjoint(info(node).storages | info(node).reads)


def _between(nodes: Sequence[fx.Node], readers: set[fx.Node]) -> set[fx.Node]:
    """What is made of the readers' results and of inputs alone, and read by a reader again."""
    made = set(readers)
    for node in nodes:
        floating = _floating(node.all_input_nodes)
        known = node.op not in (*INPUT_OPS, "output") and node.target not in IN_PARTS and floating
        if known and all(one in made or one.op in INPUT_OPS for one in floating):
            made.add(node)
    found, pending = set[fx.Node](), [*readers]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [one for one in node.all_input_nodes if one in made]
            pending += [user for user in node.users if user in made and _writes_operand(user, node)]
    return found


def _writes_operand(user: fx.Node, node: fx.Node) -> bool:
    return bool(info(user).writes & info(node).storages)


def _floating(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Those that are not integers, flags or sizes."""
    return [node for node in nodes if not isinstance(info(node).value, Tensor | int | bool) or _is_floating(node)]


def _is_floating(node: fx.Node) -> bool:
    value = info(node).value
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _is_stack(value: object) -> bool:
    if not isinstance(value, Tensor) or value.dim() < 3 or not value.dtype.is_floating_point:
        return False
    return int(value.shape[0]) > 1 and min(int(size) for size in value.shape[-2:]) >= _LEAST


__all__ = [
    "computed_on_host",
    "other_weights",
    "seconds_saved",
    "stacked_weights",
    "unsplit_on_host",
    "weights_on_host",
    "without_use",
]
