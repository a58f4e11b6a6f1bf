"""The split of all Linears together: shares from the chain of the step, judged by the simulated step.

Balance is global over a step: the link works while the accelerator attends, so it gets more rows than a Linear by
itself would give it, and only those Linears are split that are worth their trip (``cost_model.chain``). The real
passes then schedule the shares and the timeline simulates the step; what the simulation takes longer than the
chain (issue, slots, granularity, the rates of short transfers) is fed back. All-streamed and the closed form of each
Linear by itself are among the candidates: a plan is never worse than those in the simulation.

Blocks (``find_blocks``) that are cut as one make one trip instead of two. Both ways are balanced where the chain says
that blocks may win, and the shorter simulated step decides.
"""

from __future__ import annotations

from torch import fx

from hetegen_compile.cost_model import Chain, balance_along, relax
from hetegen_compile.passes.choose_splits import choose_splits, linears_of, pairable_blocks
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.plans import Splits
from hetegen_compile.planning.share_search import Search
from hetegen_compile.planning.trials import Trials
from hetegen_compile.planning.trips import Trips, step_chain, trips_of, with_shares

_VARIED_TOKENS = 16  # a prompt is one step of many: it is not worth as much planning
_NEARLY = 1.03  # a chain with blocks that is not longer than this may still win: what it saves in joins is not in it


def balanced_splits(module: fx.GraphModule, context: Context, trials: Trials) -> list[Splits]:
    """The rows of every Linear, in several ways with ``split="auto"``: that of the shortest simulated step first.

    Among them are all-streamed and the closed form of each Linear by itself, which residency has left room for.
    """
    splits = choose_splits(module, context)
    trips = trips_of(module)
    chain = step_chain(module, trips, context)
    if context.options.split != "auto" or not any(trip.link_s for trip in chain.trips):
        return [splits]
    search = Search(trials, context, with_shares(trips, [0.0] * len(trips), context))
    paired = _promising(module, context, chain)
    if paired is not None:
        search.balance(*paired)
    if paired is None or context.options.pair_mlp is not True:
        if any(plan.host for plan in splits.values()):
            search.simulate(splits)
        search.balance(trips, chain)
    vary = is_varied(context)
    if vary:
        search.vary()
    search.along_ring(vary=vary)
    return search.by_step()


def _promising(module: fx.GraphModule, context: Context, chain: Chain) -> tuple[Trips, Chain] | None:
    """Trips and chain with blocks cut as one, if the chain says that they may win or the options that they must."""
    blocks = pairable_blocks(linears_of(module), context)
    if not blocks:
        return None
    paired = trips_of(module, blocks)
    shorter = step_chain(module, paired, context)
    wins = context.options.pair_mlp is True or relax(shorter).bound_s < _NEARLY * relax(chain).bound_s
    return (paired, shorter) if wins else None


def promising_trips(module: fx.GraphModule, context: Context) -> Splits | None:
    """Of a prompt the splits with the fewest trips that the chain gives the host; None if it gives it none.

    Nothing is simulated. (Of a few tokens no split needs much more room than those of each Linear by itself.)
    """
    trips = trips_of(module)
    chain = step_chain(module, trips, context)
    fewest = relax(chain).fewest
    if context.options.split != "auto" or is_varied(context) or not fewest:
        return None
    return with_shares(trips, balance_along(chain, fewest), context)


def is_varied(context: Context) -> bool:
    """Whether the plan is of decode steps, which are run so often that more planning pays."""
    return context.bucket.high is not None and context.bucket.high <= _VARIED_TOKENS


def promising_blocks(module: fx.GraphModule, context: Context) -> Splits | None:
    """Splits with blocks cut as one, as the chain balances them; None where no block may win. Nothing is simulated."""
    found = _promising(module, context, step_chain(module, trips_of(module), context))
    if found is None or context.options.split != "auto":
        return None
    paired, chain = found
    return with_shares(paired, balance_along(chain, relax(chain).opened), context)
