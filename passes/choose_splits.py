"""How many rows of each Linear the host computes, how many are streamed, how many lie on the accelerator.

Why: the host and the link work at the same time, so each gets the rows that let both finish together. The
balance is the cost model's closed form for the bucket's number of tokens; a float in the options replaces
it. Streamed rows that exceed a slot are cut into chunks, each with a prefetch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from hetegen_compile.cost_model import SplitProblem, SplitSolution, row_granularity, solve_split, upload_s
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.operands import operands_of, weight_of
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import Block, Costs, NodeCost
from hetegen_compile.passes.plans import LinearPlan, Residency, Splits
from hetegen_compile.passes.stream_experts import experts_plan, grouped_nodes


def choose_splits(module: fx.GraphModule, context: Context) -> Splits:
    """The rows of every Linear, and the experts of every product with streamed ones, by where they are consumed.

    The latter are known once the graph has been cut (``stream_experts``).
    """
    costs = require(context.costs, "annotate_costs")
    residency = require(context.residency, "choose_residency")
    linears = linears_of(module)
    splits = {position: _plan(node, costs, residency, context) for position, node in linears.items()}
    splits |= {position: experts_plan(node, context) for position, node in grouped_nodes(module).items()}
    if context.options.pair_mlp is True and forced_split(context):
        for block in pairable_blocks(linears, context):
            splits |= block_splits(block, linears, forced_host_rows(block.columns, context), context)
    return splits


def linears_of(module: fx.GraphModule) -> dict[int, fx.Node]:
    """The Linears by their place in program order."""
    return {info(node).position: node for node in module.graph.find_nodes(op="call_function", target=LINEAR)}


# ---- blocks ----------------------------------------------------------------------------------------------------


def pairable_blocks(linears: Mapping[int, fx.Node], context: Context) -> list[Block]:
    """The blocks that can be cut as such: nothing of them is resident, and their slices fit the staging ring."""
    residency = require(context.residency, "choose_residency")

    def fits(block: Block) -> bool:
        found = [operands_of(linears[position]) for position in block.linears]
        granule = row_granularity(block.columns)
        slots = [granule * slice_bytes(one.weight, 1) for one in found[:-1] if one.dim == 1]
        names = {one.weight.name for one in found}
        return 2 * max(slots, default=0) <= residency.ring_bytes and residency.weights.keys().isdisjoint(names)

    return [block for block in context.blocks if not residency.whole_graph and fits(block)]


def block_splits(block: Block, linears: Mapping[int, fx.Node], host: int, context: Context) -> dict[int, LinearPlan]:
    """Plans of a block's Linears with ``host`` columns of the intermediate on the host."""
    if not host:
        return {position: with_host_rows(linears[position], 0, context) for position in block.linears}
    ways = dict(zip(block.siblings, block.ways, strict=True))
    plans = {
        position: _sibling_plan(linears[position], block, ways[position], host, context) for position in block.siblings
    }
    return {**plans, block.consumer: _consumer_plan(linears[block.consumer], block, host, context)}


def _sibling_plan(node: fx.Node, block: Block, ways: int, host: int, context: Context) -> LinearPlan:
    """The outputs are cut: rows of a weight [out, in], columns of one [in, out]."""
    _, weight, _, axis = operands_of(node)
    chunks = _chunks(host, block.columns, chunk_bytes(weight, context), slice_bytes(weight, axis))
    starts = [way * block.columns for way in range(ways)]
    streamed = tuple((start + lo, start + hi) for start in starts for lo, hi in chunks)
    return LinearPlan(ways * block.columns, ways * host, streamed, None, axis, block.consumer, ways)


def _consumer_plan(node: fx.Node, block: Block, host: int, context: Context) -> LinearPlan:
    """The inputs are cut: columns of a weight [out, in], which are streamed as rectangles; rows of one [in, out]."""
    _, weight, _, dim = operands_of(node)
    value, most = info(weight).value, chunk_bytes(weight, context)
    if dim == 1:
        streamed = _chunks(host, block.columns, most, slice_bytes(weight, 0))
        return LinearPlan(block.columns, host, streamed, None, 0, block.consumer)
    line_bytes = (block.columns - host) * value.element_size()
    lines = _chunks(0, int(value.shape[0]), most, line_bytes) if line_bytes else ()
    return LinearPlan(block.columns, host, ((host, block.columns),) if lines else (), None, 1, block.consumer, 1, lines)


def slice_bytes(weight: fx.Node, axis: int) -> int:
    """Bytes of a weight for one place along an axis."""
    value = info(weight).value
    return int(value.shape[1 - axis]) * int(value.element_size())


def lines_s(block: Block, linears: Mapping[int, fx.Node], context: Context) -> float:
    """What the link takes longer for a block's weights than for their bytes: parts of rows are streamed."""
    *others, last = (operands_of(linears[position]) for position in block.linears)
    columns = {
        one.weight: max(1, chunk_bytes(one.weight, context) // slice_bytes(one.weight, 1))
        for one in others
        if one.dim == 1
    }
    if last.dim == 0:
        columns[last.weight] = block.columns // 2  # or so: what the host leaves
    # what is staged lies side by side in the pinned ring
    return sum(_lines_s(weight, n, context) for weight, n in columns.items() if weight.name not in context.staged)


def _lines_s(weight: fx.Node, columns: int, context: Context) -> float:
    nbytes, item = value_bytes(weight, context), info(weight).value.element_size()
    return upload_s(context.profile, nbytes, line_bytes=columns * item) - upload_s(context.profile, nbytes)


# ---- single Linears --------------------------------------------------------------------------------------------


def feed_s(linear: fx.Node, cost: NodeCost, context: Context) -> float:
    """Seconds to bring a Linear's whole weight over the link, by way of the pinned ring if it is staged."""
    weight = weight_of(linear)
    if weight.name not in context.staged:
        return cost.link_s
    return max(cost.link_s, cost.weight_bytes / context.profile.pin_bytes_per_s)


def lost_feed_s(linear: fx.Node, cost: NodeCost, context: Context) -> float:
    """What feeding others is longer by while the host reads a Linear's whole weight.

    Where weights are staged the pin thread may be slower than a link that loses time: then nothing, or less.
    """
    return max(0.0, cost.link_s + cost.link_lost_s - feed_s(linear, cost, context))


def best_split(
    rows: int, cost: NodeCost, context: Context, *, resident_rows: int = 0, staged: bool = False
) -> SplitSolution:
    """The balance of host and link for one Linear, as if it were alone.

    So it pays for a whole trip; what Linears save that share one is seen by the balance over the step.

    The rows of a ``staged`` weight go through the pinned ring: the slower of pin thread and link feeds them.
    """
    profile = context.profile
    problem = SplitProblem(
        rows=rows,
        host_fixed_s=profile.fixed_s_per_split,
        host_s_per_row=cost.host_s / rows,
        link_s_per_row=cost.link_s / profile.link.contention / rows,  # beside the host
        accelerator_s_per_row=cost.accelerator_s / rows,
        pin_s_per_row=cost.weight_bytes / rows / profile.pin_bytes_per_s if staged else 0.0,
        resident_rows=resident_rows,
        contention=cost.contention,
    )
    step = row_granularity(rows)
    found = solve_split(problem, step)
    if profile.link.contention < 1.0:
        streamed = solve_split(replace(problem, host_fixed_s=_NEVER_S, link_s_per_row=cost.link_s / rows), step)
        return min(streamed, found, key=lambda one: one.makespan_s)
    return found


_NEVER_S = 1e9  # of fixed costs: nothing is on the host


def forced_split(context: Context) -> bool:
    """Whether the options put rows on the host that the cost model would not."""
    return context.options.split != "auto" and context.options.split > 0


def forced_host_rows(rows: int, context: Context) -> int:
    """Rows that the options put on the host (0 when the cost model decides)."""
    share = context.options.split
    if share == "auto":
        return 0
    return nearest_rows(share, rows, row_granularity(rows))


def nearest_rows(share: float, rows: int, step: int) -> int:
    """The share of the rows, to the nearest granule; all of them for a share of 1."""
    return rows if share >= 1.0 else min(rows, round(share * rows / step) * step)


def table_only(placeholder: fx.Node, context: Context) -> bool:
    """Whether a parameter is only an embedding table that stays on the host.

    It does where the rows that are looked up are fewer bytes than the table, or where it is a Linear's weight too,
    unless everything fits.
    """
    if context.residency is not None and placeholder.name in context.residency.tables:
        return False
    value = info(placeholder).value
    lookups = [user for user in placeholder.users if "embedding" in info(user).aten]
    if not lookups or placeholder.name not in context.weights or info(placeholder).writes:
        return False
    others = [user for user in placeholder.users if user not in lookups and user.target != LINEAR]
    is_weight = any(user.target == LINEAR for user in placeholder.users)
    nbytes = int(value.numel()) * value.element_size()
    found = sum(value_bytes(user, context) for user in lookups)
    return not others and (is_weight or nbytes > found)


def with_host_rows(node: fx.Node, host: int, context: Context) -> LinearPlan:
    """A Linear's plan with ``host`` rows on the host; of the rest, what residency chose is resident."""
    residency = require(context.residency, "choose_residency")
    weight = weight_of(node)
    value = info(weight).value
    rows = int(value.shape[0])
    first = max(host, residency.weights.get(weight.name, rows))
    streamed = _chunks(host, first, chunk_bytes(weight, context), slice_bytes(weight, 0))
    return LinearPlan(rows, host, streamed, (first, rows) if first < rows else None)


def chunk_bytes(weight: fx.Node, context: Context) -> int:
    """Most bytes of one prefetch of a weight."""
    residency = require(context.residency, "choose_residency")
    staged = weight.name in context.staged
    return min(residency.chunk_bytes, residency.staged_chunk_bytes) if staged else residency.chunk_bytes


def _plan(node: fx.Node, costs: Costs, residency: Residency, context: Context) -> LinearPlan:
    weight = weight_of(node)
    rows = int(info(weight).value.shape[0])
    host = forced_host_rows(rows, context)
    if context.options.split == "auto":
        resident, staged = rows - residency.weights.get(weight.name, rows), weight.name in context.staged
        cost = costs[info(node).position]
        host = best_split(rows, cost, context, resident_rows=resident, staged=staged).host_rows
    return with_host_rows(node, host, context)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _chunks(lo: int, hi: int, chunk_bytes: int, row_bytes: int) -> tuple[tuple[int, int], ...]:
    """Rows ``lo:hi`` cut into equal pieces of at most ``chunk_bytes`` (at least one granule of rows each)."""
    if lo >= hi:
        return ()
    step = row_granularity(hi)
    most = max(step, chunk_bytes // max(1, row_bytes) // step * step)
    pieces = -(-(hi - lo) // most)
    size = min(most, _round_up(_round_up(hi - lo, pieces) // pieces, step))
    return tuple((start, min(start + size, hi)) for start in range(lo, hi, size))
