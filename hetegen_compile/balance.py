"""The split of all Linears together: shares from the chain of the step, judged by the simulated step.

Balance is global over a step: the link works while the accelerator attends, so it gets more rows than a Linear by
itself would give it, and only those Linears are split that are worth their trip (``cost_model.chain``). The real
passes then schedule the shares and the timeline simulates the step; what the simulation takes longer than the
chain (issue, slots, granularity) is fed back. All-streamed and the closed form of each Linear by itself are among the
candidates: a plan is never worse than those in the simulation.

Blocks (``find_blocks``) that are cut as one make one trip instead of two. Both ways are balanced where the chain says
that blocks may win, and the shorter simulated step decides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import fx

from hetegen_compile.cost_model import Chain, Trip, balance_along, relax, row_granularity
from hetegen_compile.ir import info
from hetegen_compile.passes.choose_splits import (
    block_splits,
    choose_splits,
    feed_s,
    linears_of,
    lines_s,
    nearest_rows,
    pairable_blocks,
    with_host_rows,
)
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import Block
from hetegen_compile.passes.fit_ring import fit_ring
from hetegen_compile.passes.plans import LinearPlan, Splits
from hetegen_compile.passes.predict_step import node_work, trip_s
from hetegen_compile.trials import Trials

_ROUNDS = 2
_CLOSE = 0.01


@dataclass(frozen=True)
class Group:
    """Linears that share a trip: those that read one activation, or those of a block that is cut as one."""

    linears: tuple[fx.Node, ...]
    block: Block | None = None


Trips = list[Group]


@dataclass(frozen=True)
class _Candidate:
    """Rows of every Linear, the simulated step, and what the chain alone says (0: not asked)."""

    splits: Splits
    step_s: float
    chain_s: float = 0.0


def balanced_splits(module: fx.GraphModule, context: Context, trials: Trials) -> Splits:
    """The rows of every Linear; with ``split="auto"`` those of the shortest simulated step (one of ``trials``)."""
    splits = choose_splits(module, context)
    trips = trips_of(module)
    chain = step_chain(module, trips, context)
    if context.options.split != "auto" or not any(trip.link_s for trip in chain.trips):
        return splits
    nothing = _with_shares(trips, [0.0] * len(trips), context)
    candidates = [_Candidate(nothing, trials.step_s(context, nothing, keep=True))]
    paired = _promising(module, context, chain)
    if paired is None or context.options.pair_mlp is not True:
        if any(plan.host for plan in splits.values()):
            candidates.append(_Candidate(splits, trials.step_s(context, splits)))
        candidates += _balanced(trials, context, trips, chain)
    if paired is not None:
        candidates += _balanced(trials, context, *paired)
    return min(candidates, key=lambda candidate: candidate.step_s).splits


def _promising(module: fx.GraphModule, context: Context, chain: Chain) -> tuple[Trips, Chain] | None:
    """Trips and chain with blocks cut as one, if the chain says that they may win or the options that they must."""
    blocks = pairable_blocks(linears_of(module), context)
    if not blocks:
        return None
    paired = trips_of(module, blocks)
    shorter = step_chain(module, paired, context)
    wins = context.options.pair_mlp is True or relax(shorter).bound_s < relax(chain).bound_s
    return (paired, shorter) if wins else None


def promising_blocks(module: fx.GraphModule, context: Context) -> Splits | None:
    """Splits with blocks cut as one, as the chain balances them; None where no block may win. Nothing is simulated."""
    found = _promising(module, context, step_chain(module, trips_of(module), context))
    if found is None or context.options.split != "auto":
        return None
    paired, chain = found
    return _with_shares(paired, balance_along(chain, relax(chain).opened), context)


def _balanced(trials: Trials, context: Context, trips: Trips, chain: Chain) -> list[_Candidate]:
    """The trips that are worth it, or all, balanced along the chain; the better of the two also refined."""
    every = frozenset(range(len(trips)))
    first = {chosen: _tried(trials, context, trips, chain, chosen) for chosen in {relax(chain).opened, every} if chosen}
    chosen = min(first, key=lambda one: first[one].step_s)
    return [*first.values(), *_refined(trials, context, trips, chain, chosen, first[chosen])]


def _tried(
    trials: Trials, context: Context, trips: Trips, chain: Chain, opened: Collection[int]
) -> _Candidate:
    shares = balance_along(chain, opened)
    splits = fit_ring(trials.module, _with_shares(trips, shares, context), context)
    return _Candidate(splits, trials.step_s(context, splits), chain.step_s(shares))


def _refined(
    trials: Trials, context: Context, trips: Trips, chain: Chain, opened: Collection[int], last: _Candidate
) -> list[_Candidate]:
    """Shares for the opened trips, chosen again with what the simulation took longer than the chain."""
    found: list[_Candidate] = []
    while len(found) < _ROUNDS and abs(last.step_s - last.chain_s) > _CLOSE * last.step_s:
        chain = replace(chain, serial_s=max(0.0, chain.serial_s + last.step_s - last.chain_s))
        previous, last = last, _tried(trials, context, trips, chain, opened)
        found.append(last)
        if last.step_s > previous.step_s:
            break
    return found


def trips_of(module: fx.GraphModule, blocks: Sequence[Block] = ()) -> Trips:
    """Linears that read the same activation, in program order; those of ``blocks`` at the place of their first one."""
    linears = linears_of(module)
    block_of = {position: block for block in blocks for position in block.linears}
    groups: dict[object, Group] = {}
    for position, node in linears.items():
        block = block_of.get(position)
        key = block or node.args[0]
        others = groups[key].linears if key in groups else ()
        groups[key] = Group((*others, node), block)
    return list(groups.values())


def step_chain(module: fx.GraphModule, trips: Trips, context: Context) -> Chain:
    """A grouped graph as a chain of trips and the accelerator's segments between them."""
    serial_s = sum(node_work(node, context).seconds for node in module.graph.find_nodes(op="call_module"))
    return Chain(tuple(_trip(group, context) for group in trips), serial_s)


def _trip(group: Group, context: Context) -> Trip:
    costs = require(context.costs, "annotate_costs")
    host_s = link_s = accelerator_s = saved_s = 0.0
    for node in group.linears:
        cost = costs[info(node).position]
        plan = with_host_rows(node, 0, context)
        offloaded = 1.0 - plan.resident_rows / plan.rows
        host_s += offloaded * cost.host_s
        link_s += offloaded * feed_s(node, cost, context)
        accelerator_s += cost.accelerator_s
        saved_s += offloaded * cost.accelerator_s
    fixed_s = trip_s(group.linears[0], context)
    if group.block is not None:
        link_s += lines_s(group.block, {info(node).position: node for node in group.linears}, context)
        fixed_s += sum(costs[position].host_s for position in group.block.region)
    return Trip(host_s, link_s, accelerator_s, saved_s, fixed_s=fixed_s)


def _with_shares(trips: Trips, shares: Sequence[float], context: Context) -> Splits:
    splits: dict[int, LinearPlan] = {}
    for group, share in zip(trips, shares, strict=True):
        linears = {info(node).position: node for node in group.linears}
        if group.block is not None:
            columns = nearest_rows(share, group.block.columns, row_granularity(group.block.columns))
            splits |= block_splits(group.block, linears, columns, context)
        else:
            rows = {position: _host_rows(node, share, context) for position, node in linears.items()}
            splits |= {position: with_host_rows(linears[position], host, context) for position, host in rows.items()}
    return splits


def _host_rows(node: fx.Node, share: float, context: Context) -> int:
    plan = with_host_rows(node, 0, context)
    movable = plan.rows - plan.resident_rows
    return nearest_rows(share, movable, row_granularity(plan.rows))
