"""Which weights are streamed through the pinned ring, because their memory can be neither pinned nor adopted.

Why: a copy to the accelerator is asynchronous only from pinned memory. Pinning in place and adopting into an
arena cost nothing a step; the ring costs a copy on the pin thread, so splits have to know of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from hetegen_compile.ir import LINEAR, info
from hetegen_compile.operands import weight_of
from hetegen_compile.passes.choose_splits import forced_host_rows
from hetegen_compile.passes.context import Context, Refusal, require
from hetegen_compile.passes.grouped_products import products_with


def choose_staging(module: fx.GraphModule, context: Context) -> Mapping[str, str]:
    """Placeholders of the weights that are staged, with the reason.

    Weights of which every row is resident are not asked for. Those that are resident beside a forced host share are,
    for another split may stream from them, but nothing is refused for now.
    """
    residency = require(context.residency, "choose_residency")
    if context.host_memory is None or residency.whole_graph:
        return {}
    readers: dict[str, fx.Node] = {}
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        weight = weight_of(node)
        if weight.name in context.weights and residency.weights.get(weight.name) != 0:
            readers[weight.name] = node
    for stack in module.graph.find_nodes(op="placeholder"):
        if stack.name in residency.streamed_stacks:
            readers[stack.name] = next(iter(products_with(stack) or ()))
    staged = context.host_memory.staged(readers, context.weights)
    for reason in dict.fromkeys(staged.values()):
        same = [name for name in staged if staged[name] == reason and _may_be_streamed(readers[name], context)]
        if not same:
            continue
        first = info(readers[same[0]]).module or same[0]
        where = f"{first} and {len(same) - 1} more" if len(same) > 1 else first
        context.refuse(Refusal(where, f"not pinned but streamed through the pinned ring: {reason}"))
    return staged


def _may_be_streamed(linear: fx.Node, context: Context) -> bool:
    """Whether some rows of a Linear's weight are neither resident nor put on the host by the options.

    Those of a product with streamed experts are not.
    """
    if linear.target != LINEAR:
        return True
    weight = weight_of(linear)
    rows = int(info(weight).value.shape[0])
    first = require(context.residency, "choose_residency").weights.get(weight.name, rows)
    return first > forced_host_rows(rows, context)
