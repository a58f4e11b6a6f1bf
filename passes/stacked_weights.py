"""Weights that are stacked (the experts of a mixture in one parameter) and what is computed with them on the host.

Why: a stack is read by ``grouped_mm``, ``bmm`` or an index and not by Linears, so it cannot be split by rows and
streamed; mirrored whole, a model whose experts exceed the budget would not run at all. And a token reads few of
the experts: the host computes with those where they lie, while a transfer would move all of them. So residency gives
stacks what Linears leave of the budget (``choose_residency``); the others stay, and their readers run on the host,
with everything between the two projections of an expert:

    up   = grouped_mm(x, experts.gate_up_proj)      host: up = grouped_mm(download(x), ...)
    h    = silu(up)                                 host, since it lies between the two
    down = grouped_mm(h, experts.down_proj)         host, then one upload
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, fx

from hetegen_compile.ir import INPUT_OPS, LINEAR, info, written_storages
from hetegen_compile.options import format_bytes
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.context import Context, Refusal, require
from hetegen_compile.passes.sources import source_name

_LEAST = 8
"""Rows and columns of a stack's matrices: kernels of convolutions and windows have fewer."""


def stacked_weights(module: fx.GraphModule, context: Context) -> list[fx.Node]:
    """Placeholders of the model's stacks of matrices that nothing writes, in the graph's order."""
    return [
        node
        for node in module.graph.find_nodes(op="placeholder")
        if node.name in context.weights and _is_stack(info(node).value) and not info(node).writes and node.users
        and not any("convolution" in name for user in node.users for name in info(user).aten)
    ]  # fmt: skip


def computed_on_host(nodes: Sequence[fx.Node], names: Collection[str]) -> set[fx.Node]:
    """Nodes that read the stacks ``names``, and those that lie between two of them."""
    readers, moved = set[fx.Node](), {node for node in nodes if node.op == "placeholder" and node.name in names}
    for node in nodes:
        if node.op in INPUT_OPS or moved.isdisjoint(node.all_input_nodes):
            continue
        readers.add(node)
        if moved.issuperset(_floating(node.all_input_nodes)):  # a view, a cast or a choice of matrices
            moved.add(node)
    found = readers | _between(nodes, readers)
    written = written_storages(found)
    return found | {node for node in nodes if node.op not in (*INPUT_OPS, "output") and _touches(node, written)}


def _touches(node: fx.Node, storages: frozenset[int]) -> bool:
    """Whether it is at one of these storages, which are written on the host and so are right only there."""
    return node.target != LINEAR and not storages.isdisjoint(info(node).storages | info(node).reads)


def stacks_on_host(module: fx.GraphModule, context: Context) -> tuple[Refusal, ...]:
    """What ``explain()`` says of the stacks that stay on the host."""
    names = require(context.residency, "choose_residency").host_weights
    stacks = [node for node in module.graph.find_nodes(op="placeholder") if node.name in names]
    if not stacks:
        return ()
    first, more = source_name(stacks[0]) or stacks[0].name, len(stacks) - 1
    nbytes = format_bytes(sum(value_bytes(node, context) for node in stacks))
    reason = f"{nbytes} of stacked weights do not fit and cannot be split: computed on the host, where they lie"
    return (Refusal(f"{first} and {more} more" if more else first, reason),)


def _between(nodes: Sequence[fx.Node], readers: set[fx.Node]) -> set[fx.Node]:
    """What is made of the readers' results and of inputs alone, and read by a reader again."""
    made = set(readers)
    for node in nodes:
        floating = _floating(node.all_input_nodes)
        known = node.op not in (*INPUT_OPS, "output") and node.target != LINEAR and floating
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


def _floating(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those that are not integers, flags or sizes."""
    return [node for node in nodes if not isinstance(info(node).value, Tensor | int | bool) or _is_floating(node)]


def _is_floating(node: fx.Node) -> bool:
    value = info(node).value
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _is_stack(value: object) -> bool:
    if not isinstance(value, Tensor) or value.dim() < 3 or not value.dtype.is_floating_point:
        return False
    return int(value.shape[0]) > 1 and min(int(size) for size in value.shape[-2:]) >= _LEAST


__all__ = ["computed_on_host", "stacked_weights", "stacks_on_host"]
