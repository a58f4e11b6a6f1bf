"""The split of all Linears together: shares from the chain of the step, judged by the simulated step.

Balance is global over a step: the link works while the accelerator attends, so it gets more rows than a Linear by
itself would give it, and only those Linears are split that are worth their trip (``cost_model.chain``). The real
passes then schedule the shares and the timeline simulates the step; what the simulation takes longer than the
chain (issue, slots, granularity) is fed back. All-streamed and the closed form of each Linear by itself are among the
candidates: a plan is never worse than those in the simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import fx

from hetegen_compile.cost_model import Chain, Trip, balance_along, relax, row_granularity
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.choose_splits import choose_splits, feed_s, with_host_rows
from hetegen_compile.passes.context import Context, Splits, require
from hetegen_compile.passes.predict_step import node_work, trip_s
from hetegen_compile.trials import Trials

_ROUNDS = 2
_CLOSE = 0.01

Trips = list[list[fx.Node]]


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
    if any(plan.host for plan in splits.values()):
        candidates.append(_Candidate(splits, trials.step_s(context, splits)))
    every = frozenset(range(len(trips)))
    first = {chosen: _tried(trials, context, trips, chain, chosen) for chosen in {relax(chain).opened, every} if chosen}
    chosen = min(first, key=lambda one: first[one].step_s)
    candidates += [*first.values(), *_refined(trials, context, trips, chain, chosen, first[chosen])]
    return min(candidates, key=lambda candidate: candidate.step_s).splits


def _tried(
    trials: Trials, context: Context, trips: Trips, chain: Chain, opened: Collection[int]
) -> _Candidate:
    shares = balance_along(chain, opened)
    splits = _with_shares(trips, shares, context)
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


def trips_of(module: fx.GraphModule) -> Trips:
    """Linears that read the same activation, in program order."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        groups.setdefault(node.args[0], []).append(node)
    return list(groups.values())


def step_chain(module: fx.GraphModule, trips: Trips, context: Context) -> Chain:
    """A grouped graph as a chain of trips and the accelerator's segments between them."""
    serial_s = sum(node_work(node, context).seconds for node in module.graph.find_nodes(op="call_module"))
    return Chain(tuple(_trip(group, context) for group in trips), serial_s)


def _trip(group: list[fx.Node], context: Context) -> Trip:
    costs = require(context.costs, "annotate_costs")
    host_s = link_s = accelerator_s = saved_s = 0.0
    for node in group:
        cost = costs[info(node).position]
        plan = with_host_rows(node, 0, context)
        offloaded = 1.0 - plan.resident_rows / plan.rows
        host_s += offloaded * cost.host_s
        link_s += offloaded * feed_s(node, cost, context)
        accelerator_s += cost.accelerator_s
        saved_s += offloaded * cost.accelerator_s
    return Trip(host_s, link_s, accelerator_s, saved_s, fixed_s=trip_s(group[0], context))


def _with_shares(trips: Trips, shares: Sequence[float], context: Context) -> Splits:
    return {
        info(node).position: with_host_rows(node, _host_rows(node, share, context), context)
        for group, share in zip(trips, shares, strict=True)
        for node in group
    }


def _host_rows(node: fx.Node, share: float, context: Context) -> int:
    plan = with_host_rows(node, 0, context)
    movable = plan.rows - plan.resident_rows
    step = row_granularity(plan.rows)
    return movable if share >= 1.0 else min(movable, round(share * movable / step) * step)
