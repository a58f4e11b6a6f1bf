"""Which weights stay on the accelerator, and how its memory is shared out.

Why: the budget is hard, so what must be there (mirrors of what the accelerator reads, activations, the
staging ring) is counted first and weights fill what is left, in the order of the paper's
g = T_cpu / M_gpu: seconds of a decode step saved per byte held. It is judged at one token whatever the
graph, since prefill is compiled first and decode is what runs often. The rest is shared with the other graphs
on the accelerator (``residency_shares``). If everything fits, nothing is offloaded. Weights that cannot be split come
before the Linears, which can be streamed; stacked ones (experts) get what Linears leave: of those that stay on the
host a token reads a few. Where a bucket's tokens make streaming experts worth it (``stream_experts``) the ring holds
some of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from torch import fx

from hetegen_compile.cost_model import HardwareProfile, row_granularity, upload_s
from hetegen_compile.errors import BudgetError
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.operands import weight_of, x_of
from hetegen_compile.options import format_bytes
from hetegen_compile.passes.annotate_costs import linear_cost, value_bytes
from hetegen_compile.passes.beside_caches import size_beside
from hetegen_compile.passes.caches import caches_grow
from hetegen_compile.passes.choose_splits import best_split, forced_host_rows, forced_split, table_only
from hetegen_compile.passes.claims import Claim, Way, keeping, way_of
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.plans import (
    BATCHES,
    BESIDE,
    GROWTH,
    MIRRORED,
    OTHERS,
    RESIDENT,
    RING,
    STAGED_CHUNK_BYTES,
    Residency,
    step_bytes,
)
from hetegen_compile.passes.residency_estimate import LinearWork
from hetegen_compile.passes.residency_orders import ordered_claims
from hetegen_compile.passes.residency_shares import residency_shares, share_bytes
from hetegen_compile.passes.step_memory import foresees_steps, mirrored_size, step_memory
from hetegen_compile.passes.stream_experts import chunk_bytes, expert_bytes, worth_streaming
from hetegen_compile.passes.unsplit_weights import other_weights, seconds_saved, stacked_weights, without_use

BEFORE_LINEARS = -1
"""Rank of the claims of weights that cannot be split, stacks aside."""
SLOT_ALIGNMENT = 256
_WINDOW = 2  # slots the ring holds at least: one being read while the next one is being filled
_CHUNK_BYTES = 8 << 20  # of a chunk where a third of the ring allows: smaller ones cost rate and issue
_CHUNKS = 4  # slots of the largest size that the ring holds: each costs its issue, and the link seldom waits for one
_ISSUE = 0.05  # of a chunk's transfer: where its prefetch and its product take longer to issue, chunks are longer
_STAGED = 4096  # staged chunks that a step has at most: each is five operations, and four lie in the pinned ring


def choose_residency(module: fx.GraphModule, context: Context) -> Residency:
    """Share out the budget.

    Raises:
        BudgetError: the budget cannot hold mirrors, activations and two of the smallest slots.
    """
    linears = [node for node in module.graph.nodes if node.target == LINEAR]
    weights = {weight_of(node): node for node in linears}
    return _Sharing(module, weights, context).decide()


class _Sharing:
    def __init__(self, module: fx.GraphModule, weights: Mapping[fx.Node, fx.Node], context: Context) -> None:
        self._module = module
        self._weights = weights
        self._context = context
        self._stacks = stacked_weights(module, context)
        self._others = other_weights(module, context)
        self._unsplit = [*self._others, *self._stacks]
        self._streamable = worth_streaming(self._stacks, list(module.graph.nodes), context)
        self._mirrored = mirrored_size(module, weights, context, self._unsplit)
        self._beside = size_beside(module, context)
        self._fixed = {**step_memory(module, weights, context, self._mirrored, self._unsplit), **context.overhead_bytes}
        self._smallest = _WINDOW * max((_smallest_chunk(weight) for weight in weights), default=0)
        tables = [node for node in module.graph.find_nodes(op="placeholder") if table_only(node, context)]
        self._tables = {node.name: 0 if node in weights else value_bytes(node, context) for node in tables}
        claimed = [*weights, *self._unsplit]
        self._keys = {weight: context.resident.identify(context.weights[weight.name]) for weight in claimed}

    @property
    def _pairs(self) -> bool:
        """Whether the options have every block cut, which the host takes part in."""
        return self._context.options.pair_mlp is True and bool(self._context.blocks)

    def decide(self) -> Residency:
        own = sum(self._fixed.values())
        others = self._context.resident.claims()
        if self._context.lean:
            budget = {**self._fixed, RING: self._smallest, RESIDENT: 0}
            rest = residency_shares(others, self._context.budget_bytes - own - self._smallest)
            return self._residency((), rest, self._smallest, budget)
        if self._context.budget_bytes < own + self._smallest:
            raise _budget_error(self._fixed, self._smallest, self._module, self._context)
        beyond = max(0, self._context.resident.reserved_bytes() - step_bytes(self._fixed))
        if self._context.budget_bytes < own + beyond + self._smallest:
            beyond = 0  # both cannot stay at once, whatever is resident
        return self._share(self._context.budget_bytes - own, beyond, others)

    def _share(self, free: int, beyond: int, others: Sequence[Sequence[Claim]]) -> Residency:
        """Share out ``free`` bytes, of which steps of other graphs need ``beyond`` more than this one."""
        claims = self._claims()
        wanted = {claim.key: claim.nbytes for graph in (*others, claims) for claim in graph}
        shared_ring = self._context.resident.ring_within(free - beyond)
        left = free - shared_ring - sum(wanted.values()) - beyond
        fixed = {**self._fixed, **({OTHERS: beyond} if beyond else {})}
        if left >= 0 and not (forced_split(self._context) or self._pairs):
            budget = {**fixed, **({RING: shared_ring} if shared_ring else {}), RESIDENT: _nbytes(claims)}
            first_rows = residency_shares([*others, claims], free - beyond)
            found = self._residency(claims, first_rows, shared_ring, budget, whole=True)
            return self._with_tables(found, left)
        ring = self._ring_bytes(self._left_for_linears(free - beyond))
        claims, ways = self._ordered(claims, share_bytes(claims, others, free - ring - beyond), ring)
        first_rows = residency_shares([*others, claims], free - ring - beyond)
        while idle := self._without_use(first_rows, ring):
            claims = tuple(claim for claim in claims if claim.key not in idle)
            first_rows = residency_shares([*others, claims], free - ring - beyond)
        held = sum((c.rows - first_rows.get(c.key, c.rows)) * c.row_bytes for c in claims)
        found = self._residency(claims, first_rows, ring, {**fixed, RING: ring, RESIDENT: held})
        return replace(found, ways=ways)

    def _without_use(self, first_rows: Mapping[Hashable, int], ring: int) -> set[Hashable]:
        """Weights that would be resident and are read on the host only, together with one that is not."""
        names = {node.name: self._keys[node] for node in self._unsplit}
        there = {name for name, key in names.items() if key in first_rows}
        on_host = names.keys() - there - {stack.name for stack in self._through(ring)}
        found = without_use(self._module, self._context, there, on_host)
        return {names[name] for name in found}

    def _through(self, ring: int) -> list[fx.Node]:
        """The stacks that are streamed where they are not resident: none if the ring does not hold two experts."""
        stacks = [*self._streamable]
        least = _WINDOW * max((aligned(expert_bytes(stack)) for stack in stacks), default=0)
        return stacks if least <= ring else []

    def _left_for_linears(self, free: int) -> int:
        """What the weights that come before the Linears leave of ``free`` bytes, all if they do not fit."""
        left = free - sum(value_bytes(node, self._context) for node in self._others)
        return left if left >= self._smallest else free

    def _ordered(self, claims: tuple[Claim, ...], free: int, ring: int) -> tuple[tuple[Claim, ...], tuple[Way, ...]]:
        """The claims, some rows of Linears before others' where the step is shorter with them, and other ways.

        ``free`` bytes are this graph's model's own. Where a way has been chosen: with that, and no others.
        """
        before = tuple(claim for claim in claims if claim.rank == BEFORE_LINEARS)
        rest = tuple(claim for claim in claims if claim.rank != BEFORE_LINEARS)
        if self._context.residency_way is not None:
            return (*before, *keeping(rest, self._context.residency_way)), ()
        work = [self._linear_work(node) for node in self._module.graph.nodes if node.target == LINEAR]
        typical = _typical([aligned(value_bytes(weight, self._context)) for weight in self._weights])
        ahead = ring - self._chunk_bytes(ring)
        free -= _nbytes(before)
        estimated, *others = ordered_claims(rest, work, free, ahead, typical, self._context.profile)
        return (*before, *estimated), tuple(map(way_of, others))

    def _linear_work(self, linear: fx.Node) -> LinearWork:
        weight = weight_of(linear)
        rows = int(info(weight).value.shape[0])
        return LinearWork(x_of(linear), self._keys[weight], rows, linear_cost(linear, self._context, tokens=1))

    def _with_tables(self, whole: Residency, left: int) -> Residency:
        """Embedding tables on the accelerator as well, if ``left`` bytes hold them: the host then looks nothing up."""
        nbytes = sum(self._tables.values())
        if nbytes > left:
            return whole
        budget = {**whole.budget, MIRRORED: whole.budget[MIRRORED] + nbytes}
        return replace(whole, budget=budget, mirrored=whole.mirrored + nbytes, tables=frozenset(self._tables))

    def _residency(
        self, claims: Sequence[Claim], first_rows: Mapping[Hashable, int], ring: int, budget: Mapping[str, int],
        *, whole: bool = False,
    ) -> Residency:  # fmt: skip
        own = {claim.key for claim in claims}
        weights = {w.name: first_rows[key] for w, key in self._keys.items() if key in own and key in first_rows}
        chunk = 0 if whole else self._chunk_bytes(ring)
        through = frozenset(stack.name for stack in self._through(ring) if stack.name not in weights)
        on_host = frozenset(node.name for node in self._unsplit if node.name not in weights) - through
        unsplit_bytes = sum(value_bytes(node, self._context) for node in self._unsplit if node.name in weights)
        staged = max(STAGED_CHUNK_BYTES, sum(value_bytes(weight, self._context) for weight in self._weights) // _STAGED)
        return Residency(
            weights, ring, chunk, budget, whole, tuple(claims), first_rows, self._mirrored, self._beside,
            host_weights=on_host, unsplit_bytes=unsplit_bytes, staged_chunk_bytes=staged,
            streamed_stacks=through, stack_chunk_bytes=ring // _WINDOW // SLOT_ALIGNMENT * SLOT_ALIGNMENT,
        )  # fmt: skip

    def _claims(self) -> tuple[Claim, ...]:
        """What each different weight asks for; the rows of a forced host share stay on the host.

        What cannot be split is all or nothing. Stacks come after the Linears, in the graph's order: those of a layer
        stay together.
        """
        found: dict[Hashable, Claim] = {}
        blocks = self._context.blocks if self._pairs else ()
        paired = {position for block in blocks for position in block.linears}
        for weight, linear in self._weights.items():
            if info(linear).position in paired:
                continue
            value = info(weight).value
            rows, row_bytes = int(value.shape[0]), int(value.shape[1]) * int(value.element_size())
            first = forced_host_rows(rows, self._context)
            claim = Claim(self._keys[weight], rows, first, row_bytes, _gain(linear, self._context))
            found.setdefault(claim.key, claim)
        for other, readers in self._others.items():
            nbytes = value_bytes(other, self._context)
            gain = seconds_saved(readers, self._context) / nbytes
            found.setdefault(self._keys[other], Claim(self._keys[other], 1, 0, nbytes, gain, BEFORE_LINEARS))
        for rank, stack in enumerate(self._stacks, 1):
            claim = Claim(self._keys[stack], 1, 0, value_bytes(stack, self._context), 0.0, rank)
            found.setdefault(claim.key, claim)
        return tuple(claim for claim in found.values() if claim.nbytes)

    def _chunk_bytes(self, ring: int) -> int:
        return max(self._smallest // _WINDOW, _chunk_bytes(ring, self._context.profile))

    def _ring_bytes(self, free: int) -> int:
        """All graphs share the ring, so it is as long as others made it: the longest that takes half at most."""
        sizes = [value_bytes(weight, self._context) for weight in self._weights]
        ring = max(staging_ring_bytes(sizes, free, self._smallest), self._for_stacks(free))
        return max(ring, self._context.resident.ring_within(free // 2))

    def _for_stacks(self, free: int) -> int:
        """Bytes of a ring for parts of the streamed stacks: of at most half of what is free, 0 if it is none."""
        expert = max((aligned(expert_bytes(stack)) for stack in self._streamable), default=0)
        part = max((aligned(chunk_bytes(stack)) for stack in self._streamable), default=0)
        ring = max(_WINDOW * expert, min(_WINDOW * part, free // 4 // SLOT_ALIGNMENT * SLOT_ALIGNMENT))
        return ring if ring <= free // 2 else 0


def staging_ring_bytes(weight_bytes: Sequence[int], free: int, smallest: int = 0) -> int:
    """Bytes of the staging ring: two of the weights that most bytes lie in, at most a quarter of what is free.

    Weights larger than that (an output layer) go through it in chunks.
    """
    typical = _WINDOW * _typical([aligned(nbytes) for nbytes in weight_bytes])
    return max(smallest, min(typical, free // 4 // SLOT_ALIGNMENT * SLOT_ALIGNMENT))


def _chunk_bytes(ring: int, profile: HardwareProfile) -> int:
    """Most bytes of a chunk: half of the ring where issuing shorter ones takes the host's thread too long."""
    chunk = max(ring // _CHUNKS, min(ring // 3, _CHUNK_BYTES))
    issue_s = profile.accelerator.launch_s + profile.accelerator.issuing_s(segment=False)
    longest = ring // _WINDOW // SLOT_ALIGNMENT * SLOT_ALIGNMENT
    return longest if issue_s > _ISSUE * upload_s(profile, chunk) else chunk


def _typical(sizes: Sequence[int]) -> int:
    """The median of the sizes that occur more than once (in every layer), each counted as often as it has bytes.

    An output layer may have more than half of all bytes; it is no measure for what passes the ring in each layer.
    """
    counts = Counter(sizes)
    ordered = sorted([size for size in sizes if counts[size] > 1] or sizes)
    before = accumulate(ordered)
    half = sum(ordered) / 2
    return next((size for size, total in zip(ordered, before, strict=True) if total >= half), 0)


def _nbytes(claims: Sequence[Claim]) -> int:
    return sum(claim.nbytes for claim in claims)


def _smallest_chunk(weight: fx.Node) -> int:
    value = info(weight).value
    rows = row_granularity(int(value.shape[0]))
    return aligned(rows * int(value.shape[1]) * int(value.element_size()))


def aligned(nbytes: int) -> int:
    """Bytes rounded up to where a slot may begin."""
    return -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def _budget_error(fixed: Mapping[str, int], smallest: int, module: fx.GraphModule, context: Context) -> BudgetError:
    items = "; ".join(f"{name}: {format_bytes(nbytes)}" for name, nbytes in fixed.items() if nbytes)
    need, budget = sum(fixed.values()) + smallest, context.budget_bytes
    given = format_bytes(budget) if format_bytes(budget) != format_bytes(need) else f"{budget} bytes"
    unstated = context.options.context is None and caches_grow(module, context)
    growth = ". A cache that grows beyond this forward needs more: options={'context': tokens} counts it"
    foreseen = fixed[BATCHES] or ((fixed[GROWTH] or fixed.get(BESIDE)) and foresees_steps(module, context))
    bound = ", with a bound for forwards that there is no graph of yet" if foreseen else ""
    return BudgetError(
        f"gpu_memory={given} cannot hold what a step needs on the accelerator: "
        f"{items}; {RING} (two of the smallest slots at least): {format_bytes(smallest)}. "
        f"The smallest budget that works is {need} bytes ({format_bytes(need)}){bound}",
        f"set options={{'gpu_memory': {need}}} or use a smaller batch or context"
        f"{_beyond_what_is_stated(context)}{growth if unstated else ''}",
    )


def _beyond_what_is_stated(context: Context) -> str:
    """Which sizes of this forward no budget was named for, "" if none."""
    stated, found = context.options, []
    cached = [int(context.sizes[symbol]) for symbol in context.lengths]
    tokens = max([context.tokens_per_sequence, *cached])
    if stated.context is not None and tokens > stated.context:
        found.append(f"{tokens} tokens, context={stated.context}")
    if context.tokens_per_sequence and context.sequences > stated.max_batch:
        found.append(f"{context.sequences} sequences, max_batch={stated.max_batch}")
    return f". This forward is larger than the options say: {'; '.join(found)}" if found else ""


def _gain(linear: fx.Node, context: Context) -> float:
    """Seconds of a decode step that keeping this Linear's weight resident saves, per byte."""
    cost = linear_cost(linear, context, tokens=1)
    weight = weight_of(linear)
    rows = int(info(weight).value.shape[0])
    return (best_split(rows, cost, context).makespan_s - cost.accelerator_s) / max(1, cost.weight_bytes)
