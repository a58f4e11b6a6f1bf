"""Which weights stay on the accelerator, and how its memory is shared out.

Why: the budget is hard, so what must be there (mirrors of what the accelerator reads, activations, the
staging ring) is counted first and weights fill what is left, in the order of the paper's
g = T_cpu / M_gpu: seconds of a decode step saved per byte held. It is judged at one token whatever the
graph, since prefill is compiled first and decode is what runs often. If everything fits, nothing is
offloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from hetegen_compile.cost_model import row_granularity
from hetegen_compile.errors import BudgetError
from hetegen_compile.ir import LINEAR, info, is_tensor
from hetegen_compile.options import format_bytes
from hetegen_compile.passes.annotate_costs import linear_cost, value_bytes
from hetegen_compile.passes.capture import tensor_bytes, tensors_in, to_expr
from hetegen_compile.passes.choose_splits import best_split, forced_host_rows, forced_split, table_only
from hetegen_compile.passes.context import GROWTH, Context, Residency
from hetegen_compile.passes.liveness import activation_peak_bytes

SLOT_ALIGNMENT = 256
_WINDOW = 2  # slots the ring holds at least: one being read while the next one is being filled
_CHUNKS = 8  # slots of the largest size that the ring holds, where weights allow: the link then rarely waits


def choose_residency(module: fx.GraphModule, context: Context) -> Residency:
    """Share out the budget.

    Raises:
        BudgetError: the budget cannot hold mirrors, activations and two of the smallest slots.
    """
    linears = [node for node in module.graph.nodes if node.target == LINEAR]
    weights = {node.args[1]: node for node in linears}
    fixed = _fixed_items(module, weights, context)
    free = context.budget_bytes - sum(fixed.values())
    sizes = {weight: _resident_bytes(weight, context) for weight in weights}
    elsewhere = _held_elsewhere(sizes, context)
    smallest = _WINDOW * max((_smallest_chunk(weight) for weight in weights), default=0)
    smallest = max(smallest, context.ring_bytes)
    if free < smallest:
        raise _budget_error(fixed, smallest, context)
    evicts = free - elsewhere < smallest
    free -= 0 if evicts else elsewhere
    if sum(sizes.values()) <= free and not forced_split(context):
        budget = {**fixed, "resident weights": sum(sizes.values())}
        return Residency(_first_rows(weights, context), 0, 0, budget, whole_graph=True, evicts=evicts)
    ring = _ring_bytes(weights, smallest, free, context)
    chosen = _fill(weights, sizes, free - ring, context)
    budget = {**fixed, "staging ring": ring, "resident weights": sum(sizes[weight] for weight in chosen)}
    chunk = max(smallest // _WINDOW, ring // _CHUNKS)
    return Residency(_first_rows(chosen, context), ring, chunk, budget, evicts=evicts)


def _first_rows(weights: Iterable[fx.Node], context: Context) -> dict[str, int]:
    """First resident row of each chosen weight: the rows before it are the forced host share."""
    return {weight.name: forced_host_rows(int(info(weight).value.shape[0]), context) for weight in weights}


def _held_elsewhere(sizes: Mapping[fx.Node, int], context: Context) -> int:
    """Bytes of resident weights of other graphs that this graph does not use."""
    shared = sum(size for weight, size in sizes.items() if _already(weight, context))
    return max(0, context.resident.held_bytes() - shared)


def _fixed_items(module: fx.GraphModule, weights: Iterable[fx.Node], context: Context) -> dict[str, int]:
    """Bytes on the accelerator that do not depend on which weights are resident."""
    skipped = set(weights)
    mirrored = [
        node for node in module.graph.nodes
        if node.op in ("placeholder", "get_attr") and is_tensor(node) and node not in skipped
        and not table_only(node, context)
    ]
    growing = [
        tensor
        for node in module.graph.nodes
        if node.op in ("placeholder", "output") and node not in skipped
        for tensor in tensors_in(info(node).value)
        if any(to_expr(size).free_symbols for size in tensor.shape)
    ]
    linear_io = [value_bytes(node, context) + value_bytes(node.args[0], context) for node in module.graph.nodes
                 if node.target == LINEAR]
    return {
        "mirrors of inputs, buffers and caches": sum(_mirror_bytes(node, mirrored, context) for node in mirrored),
        GROWTH: _growth(sum(int(context.number(tensor_bytes(t))) for t in growing), context),
        "activations": max(
            activation_peak_bytes(module, context) + max(linear_io, default=0), context.activation_bytes
        ),
    }


def _mirror_bytes(node: fx.Node, mirrored: Sequence[fx.Node], context: Context) -> int:
    """Bytes of an input's mirror; inputs that lie in one storage share a mirror of all of it."""
    sharing = [other for other in mirrored if info(other).storages & info(node).storages]
    if len(sharing) == 1:
        return value_bytes(node, context)
    return int(info(node).value.untyped_storage().nbytes()) if sharing[0] is node else 0


def _growth(nbytes: int, context: Context) -> int:
    """Bytes kept free for inputs and outputs of varying size that now have ``nbytes``.

    Up to the stated context (as long again without one), for ``max_batch`` sequences. A forward that outgrows this
    is planned anew.
    """
    longest = max((int(size) for size in context.sizes.values()), default=1)
    times = 2.0 if context.options.context is None else context.options.context / max(1, longest)
    return max(0, round(nbytes * (times * context.options.max_batch - 1)))


def _resident_bytes(weight: fx.Node, context: Context) -> int:
    """Bytes of the weight's rows that residency would hold (a forced host share stays on the host)."""
    value = info(weight).value
    rows = int(value.shape[0])
    row_bytes = int(value.shape[1]) * int(value.element_size())
    return (rows - forced_host_rows(rows, context)) * row_bytes


def _already(weight: fx.Node, context: Context) -> bool:
    return context.resident.is_resident(context.weights[weight.name])


def _ring_bytes(weights: Mapping[fx.Node, fx.Node], smallest: int, free: int, context: Context) -> int:
    """Bytes of the staging ring: two of the largest weight, at most a quarter of what is free.

    The ring is shared by all graphs, so it is never shorter than it is already.
    """
    largest = _WINDOW * max((_aligned(value_bytes(weight, context)) for weight in weights), default=0)
    return max(smallest, context.ring_bytes, min(largest, free // 4 // SLOT_ALIGNMENT * SLOT_ALIGNMENT))


def _smallest_chunk(weight: fx.Node) -> int:
    value = info(weight).value
    rows = row_granularity(int(value.shape[0]))
    return _aligned(rows * int(value.shape[1]) * int(value.element_size()))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def _budget_error(fixed: Mapping[str, int], smallest: int, context: Context) -> BudgetError:
    items = "; ".join(f"{name}: {format_bytes(nbytes)}" for name, nbytes in fixed.items())
    need = sum(fixed.values()) + smallest
    return BudgetError(
        f"gpu_memory={format_bytes(context.budget_bytes)} cannot hold what a step needs on the accelerator: "
        f"{items}; staging ring (two of the smallest slots at least): {format_bytes(smallest)}. "
        f"The smallest budget that works is {need} bytes ({format_bytes(need)}): "
        f"set options={{'gpu_memory': {need}}} or use a smaller batch or context"
    )


def _fill(
    weights: Mapping[fx.Node, fx.Node], sizes: Mapping[fx.Node, int], free: int, context: Context
) -> list[fx.Node]:
    """Weights in falling order of gain per byte, as many as fit; those already there come first."""
    order = sorted(weights, key=lambda weight: (not _already(weight, context), -_gain(weights[weight], context)))
    chosen = []
    for weight in order:
        if 0 < sizes[weight] <= free:
            chosen.append(weight)
            free -= sizes[weight]
    return chosen


def _gain(linear: fx.Node, context: Context) -> float:
    """Seconds of a decode step that keeping this Linear's weight resident saves, per byte."""
    cost = linear_cost(linear, context, tokens=1)
    weight: fx.Node = linear.args[1]  # type: ignore[assignment]
    rows = int(info(weight).value.shape[0])
    return (best_split(rows, cost, context).makespan_s - cost.accelerator_s) / max(1, cost.weight_bytes)
