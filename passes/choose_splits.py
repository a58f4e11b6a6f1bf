"""How many rows of each Linear the host computes, how many are streamed, how many lie on the accelerator.

Why: the host and the link work at the same time, so each gets the rows that let both finish together. The
balance is the cost model's closed form for the bucket's number of tokens; a float in the options replaces
it. Streamed rows that exceed a slot are cut into chunks, each with a prefetch of its own.
"""

from __future__ import annotations

from torch import fx

from hetegen_compile.cost_model import SplitProblem, SplitSolution, row_granularity, solve_split
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.capture import tensor_bytes, tensors_in
from hetegen_compile.passes.context import Context, Costs, LinearPlan, NodeCost, Residency, Splits, require


def choose_splits(module: fx.GraphModule, context: Context) -> Splits:
    """The rows of every Linear by where they are consumed."""
    costs = require(context.costs, "annotate_costs")
    residency = require(context.residency, "choose_residency")
    linears = [node for node in module.graph.nodes if node.target == LINEAR]
    return {info(node).position: _plan(node, costs, residency, context) for node in linears}


def feed_s(linear: fx.Node, cost: NodeCost, context: Context) -> float:
    """Seconds to bring a Linear's whole weight over the link, by way of the pinned ring if it is staged."""
    weight: fx.Node = linear.args[1]  # type: ignore[assignment]
    if weight.name not in context.staged:
        return cost.link_s
    return max(cost.link_s, cost.weight_bytes / context.profile.pin_bytes_per_s)


def best_split(rows: int, cost: NodeCost, context: Context, *, staged: bool = False) -> SplitSolution:
    """The balance of host and link for one Linear none of whose rows are resident, as if it were alone.

    So it pays for a whole trip; what Linears save that share one is seen by the balance over the step.

    The rows of a ``staged`` weight go through the pinned ring: the slower of pin thread and link feeds them.
    """
    profile = context.profile
    problem = SplitProblem(
        rows=rows,
        host_fixed_s=profile.fixed_s_per_split,
        host_s_per_row=cost.host_s / rows,
        link_s_per_row=cost.link_s / rows,
        accelerator_s_per_row=cost.accelerator_s / rows,
        pin_s_per_row=cost.weight_bytes / rows / profile.pin_bytes_per_s if staged else 0.0,
        contention=cost.contention,
    )
    return solve_split(problem, row_granularity(rows))


def forced_split(context: Context) -> bool:
    """Whether the options put rows on the host that the cost model would not."""
    return context.options.split != "auto" and context.options.split > 0


def forced_host_rows(rows: int, context: Context) -> int:
    """Rows that the options put on the host (0 when the cost model decides)."""
    share = context.options.split
    if share == "auto":
        return 0
    step = row_granularity(rows)
    return rows if share == 1.0 else min(rows, round(rows * share / step) * step)


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
    found = sum(context.number(tensor_bytes(tensor)) for user in lookups for tensor in tensors_in(info(user).value))
    return not others and (is_weight or nbytes > found)


def with_host_rows(node: fx.Node, host: int, context: Context) -> LinearPlan:
    """A Linear's plan with ``host`` rows on the host; of the rest, what residency chose is resident."""
    residency = require(context.residency, "choose_residency")
    weight: fx.Node = node.args[1]  # type: ignore[assignment]
    value = info(weight).value
    rows = int(value.shape[0])
    first = max(host, residency.weights.get(weight.name, rows))
    row_bytes = int(value.shape[1]) * value.element_size()
    most = residency.chunk_bytes
    chunk_bytes = min(most, residency.staged_chunk_bytes) if weight.name in context.staged else most
    streamed = _chunks(host, first, chunk_bytes, row_bytes)
    return LinearPlan(rows, host, streamed, (first, rows) if first < rows else None)


def _plan(node: fx.Node, costs: Costs, residency: Residency, context: Context) -> LinearPlan:
    weight: fx.Node = node.args[1]  # type: ignore[assignment]
    rows = int(info(weight).value.shape[0])
    host = forced_host_rows(rows, context)
    if context.options.split == "auto" and weight.name not in residency.weights:
        staged = weight.name in context.staged
        host = best_split(rows, costs[info(node).position], context, staged=staged).host_rows
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
