"""The budget is hard: what is shared out never exceeds it, and the smallest budget that is named works."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hetegen_compile.cost_model import row_granularity
from hetegen_compile.errors import BudgetError
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.choose_residency import choose_residency
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.claims import Claim, NothingResident
from hetegen_compile.passes.plans import ACTIVATIONS, OTHERS, RESIDENT, UNFORESEEN, Residency
from tests.passes.graphs import GIB, Case, again, case, property_test

SIZES = ((64, 512), (512, 512), (512, 128), (128, 1000))
TOTAL = sum(columns * rows * 4 for columns, rows in SIZES)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(columns, rows, bias=False) for columns, rows in SIZES])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.fixture(scope="module")
def chain() -> Case:
    return case(Chain(), torch.randn(1, 64)).run(annotate_costs)


class Beside(NothingResident):
    """Other graphs on the accelerator, with what they claim and need."""

    def __init__(self, *graphs: Sequence[Claim], step_bytes: int = 0, ring_bytes: int = 0) -> None:
        super().__init__(ring_bytes)
        self._graphs = graphs
        self._step_bytes = step_bytes

    def claims(self) -> Sequence[Sequence[Claim]]:
        return self._graphs

    def reserved_bytes(self) -> int:
        return self._step_bytes


def stranger(nbytes: int) -> Claim:
    """A weight of another model."""
    return Claim("stranger", nbytes // 256, 0, 256, gain_s_per_byte=1.0)


def decide(base: Case, budget_bytes: int, **changes: Any) -> Residency:
    found = again(base, budget_bytes=budget_bytes, **changes)
    decided = choose_residency(found.module, found.context)
    assert found.text == base.text  # a decision changes nothing
    return decided


def named_budget(base: Case, budget_bytes: int = 1, **changes: Any) -> int:
    """The budget that the error for too small a one recommends."""
    with pytest.raises(BudgetError) as error:
        decide(base, budget_bytes, **changes)
    match = re.search(r"'gpu_memory': (\d+)", str(error.value))
    assert match is not None
    return int(match[1])


def weight_nodes(base: Case) -> list[str]:
    return [str(node.args[1]) for node in base.nodes(LINEAR)]


def resident_bytes(base: Case, decided: Residency, split: Any) -> int:
    """Bytes of the rows that the splits of a decision keep on the accelerator, each weight once."""
    found = again(base, split=split, residency=decided)
    plans = choose_splits(found.module, found.context)
    rows = {node.args[1]: (node, plans[info(node).position].resident_rows) for node in found.nodes(LINEAR)}
    return sum(count * int(node.args[1].meta["hetegen"].value.shape[1]) * 4 for node, count in rows.values())


@property_test
@given(st.integers(1, 2 * TOTAL), st.just("auto") | st.floats(0, 1))
def test_the_budget_is_never_exceeded(chain: Case, budget_bytes: int, split: Any) -> None:
    smallest = named_budget(chain, split=split)
    decided = decide(chain, smallest + budget_bytes, split=split)
    assert sum(decided.budget.values()) <= smallest + budget_bytes
    assert resident_bytes(chain, decided, split) == decided.budget["resident weights"]
    assert decided.chunk_bytes <= decided.ring_bytes == decided.budget.get("staging ring", 0)


@property_test
@given(st.integers(1, TOTAL))
def test_every_chunk_has_room_for_another_one_beside_it(chain: Case, more_bytes: int) -> None:
    decided = decide(chain, named_budget(chain) + more_bytes, split=0.0)
    found = again(chain, split=0.0, residency=decided)
    plans = choose_splits(found.module, found.context)
    for node in found.nodes(LINEAR):
        row_bytes = int(node.args[1].meta["hetegen"].value.shape[1]) * 4
        for lo, hi in plans[info(node).position].streamed:
            assert 2 * -(-(hi - lo) * row_bytes // 256) * 256 <= decided.ring_bytes


def test_chunks_are_longer_where_issuing_them_takes_long(chain: Case) -> None:
    budget = named_budget(chain) + TOTAL // 2
    profile = chain.context.profile
    free = replace(profile, accelerator=replace(profile.accelerator, launch_s=0.0, issue_s=0.0))
    dear = replace(profile, accelerator=replace(profile.accelerator, issue_s=1.0))
    short, long = (decide(chain, budget, split=0.0, profile=one) for one in (free, dear))
    assert short.ring_bytes == long.ring_bytes
    assert short.chunk_bytes < long.chunk_bytes == long.ring_bytes // 2 // 256 * 256


def test_orders_are_compared_beside_a_link_that_is_ahead_by_the_ring_less_the_slot_being_filled(chain: Case) -> None:
    with mock.patch(
        f"{choose_residency.__module__}.ordered_claims", side_effect=lambda claims, *_: [claims]
    ) as compared:
        decided = decide(chain, named_budget(chain) + 3 * 4096)
    ahead_bytes = compared.call_args.args[3]
    assert ahead_bytes == decided.ring_bytes - decided.chunk_bytes > 0


def test_everything_fits() -> None:
    found = case(Chain(), torch.randn(1, 64)).run(annotate_costs)
    decided = decide(found, GIB)
    assert decided.whole_graph
    assert decided.weights == dict.fromkeys(weight_nodes(found), 0)
    assert (decided.ring_bytes, decided.chunk_bytes) == (0, 0)
    assert decided.budget["resident weights"] == TOTAL


def test_everything_fits_to_the_byte_and_not_one_less(chain: Case) -> None:
    exact = sum(decide(chain, GIB).budget.values())
    assert decide(chain, exact).whole_graph
    assert not decide(chain, exact - 1).whole_graph


def test_a_forced_share_offloads_what_would_fit(chain: Case) -> None:
    decided = decide(chain, GIB, split=0.5)
    assert not decided.whole_graph
    assert decided.weights == dict(zip(weight_nodes(chain), (256, 256, 64, 512), strict=True))
    assert decided.budget["resident weights"] == TOTAL // 2 - 12 * 128 * 4  # 500 rows round to 512
    assert decide(chain, GIB, split=0.0).whole_graph


class Lookup(nn.Module):
    """A table that only lookups read, and one that is a Linear's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.words = nn.Embedding(100, 64), nn.Embedding(200, 64)

    def forward(self, ids: Tensor) -> Any:
        return F.linear(self.words(ids) + self.places(ids), self.words.weight)


def test_where_everything_fits_tables_are_mirrored_too_to_the_byte() -> None:
    found = case(Lookup(), torch.tensor([[1, 2]])).run(annotate_costs)
    decided = decide(found, GIB)
    places = 100 * 64 * 4
    names = {node.name for node in found.module.graph.find_nodes(op="placeholder") if "weight" in node.name}
    assert decided.whole_graph
    assert decided.tables == names
    assert len(names) == 2
    exact = sum(decided.budget.values())
    less = decide(found, exact - 1)
    assert less.whole_graph
    assert less.tables == frozenset()
    assert (
        decided.budget["mirrors of inputs, buffers and caches"]
        == places + less.budget["mirrors of inputs, buffers and caches"]
    ), "the table that is a weight costs nothing more"
    assert decided.mirrored == less.mirrored + places


def test_nothing_is_resident_when_the_host_has_every_row(chain: Case) -> None:
    assert decide(chain, GIB, split=1.0).weights == {}


@pytest.mark.parametrize("split", ["auto", 0.0, 0.5, 1.0])
def test_too_small_a_budget_names_one_that_works(chain: Case, split: Any) -> None:
    needed = named_budget(chain, split=split)
    assert sum(decide(chain, needed, split=split).budget.values()) <= needed
    with pytest.raises(BudgetError, match="mirrors of inputs.*activations.*staging"):
        decide(chain, needed - 1, split=split)


@pytest.mark.parametrize("tokens", [32, 64])  # fewer rows than the table has, and as many
def test_the_named_budget_works_with_an_embedding_table(tokens: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 64)
            self.up = nn.Linear(64, 8192)

        def forward(self, ids: Tensor) -> Any:
            return self.up(self.table(ids))

    found = case(Model(), torch.arange(tokens)).run(annotate_costs)
    needed = named_budget(found)
    assert sum(decide(found, needed).budget.values()) <= needed
    with pytest.raises(BudgetError):
        decide(found, needed - 1)


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Any:
            return self.b(self.a(x))

    found = case(Tied(), torch.randn(1, 64)).run(annotate_costs)
    decided = decide(found, GIB)
    assert decided.budget["resident weights"] == 64 * 64 * 4
    assert len(decided.weights) == 1


def test_what_saves_most_per_byte_is_resident_first(chain: Case) -> None:
    """With the host's time the same for every byte, a trip's fixed cost favours the smallest weight."""
    profile = replace(chain.context.profile, fixed_s_per_split=10.0, synchronise_s=0.0)
    needed = named_budget(chain, profile=profile)
    smallest = min(rows * columns * 4 for columns, rows in SIZES)
    decided = [decide(chain, needed + extra, profile=profile) for extra in range(0, 2 * smallest, smallest // 16)]
    first = next(decision for decision in decided if decision.weights)
    assert list(first.weights) == [weight_nodes(chain)[0]]


def test_more_budget_never_keeps_fewer_bytes(chain: Case) -> None:
    needed = named_budget(chain)
    held = [decide(chain, needed + extra).budget["resident weights"] for extra in range(0, TOTAL, TOTAL // 7)]
    assert held[-1] > held[0]


def test_biases_caches_and_inputs_count_as_mirrors_and_tables_on_the_host_do_not() -> None:
    """A table of which all rows are looked up is a weight that stays resident, if it fits."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, 64)
            self.up = nn.Linear(64, 128)

        def forward(self, ids: Tensor, cache: Tensor) -> Any:
            return self.up(self.table(ids)) + cache.sum()

    for tokens, table_bytes in ((2, 0), (1000, 1000 * 64 * 4)):
        ids, cache = torch.arange(tokens), torch.zeros(10, 20)
        found = case(Model(), ids, cache).run(annotate_costs)
        budget = decide(found, GIB, split=0.5).budget
        assert budget["mirrors of inputs, buffers and caches"] == 128 * 4 + ids.nbytes + cache.nbytes
        assert budget["resident weights"] == 64 * 64 * 4 + table_bytes, "half of the Linear's rows"


# ---- weights that are there already --------------------------------------------------------------------------


def test_the_next_graph_of_a_model_decides_the_same(chain: Case) -> None:
    """Prefill and decode: whoever comes second, with smaller steps, finds every weight where the first left it."""
    needed = named_budget(chain)
    for extra in range(0, TOTAL, TOTAL // 5):
        first = decide(chain, needed + extra)
        beside = Beside(first.claims, step_bytes=first.step_bytes, ring_bytes=first.ring_bytes)
        second = decide(chain, needed + extra, resident=beside, activation_bytes=0)
        assert second.first_rows == first.first_rows
        assert second.weights == first.weights
        assert sum(second.budget.values()) == sum(first.budget.values())


def test_a_graph_with_larger_steps_shrinks_what_is_resident_from_the_end(chain: Case) -> None:
    first = decide(chain, named_budget(chain) + TOTAL // 2)
    beside = Beside(first.claims, step_bytes=first.step_bytes)
    larger = first.budget[ACTIVATIONS] + TOTAL // 4
    second = decide(chain, named_budget(chain) + TOTAL // 2, resident=beside, activation_bytes=larger)
    rows = {claim.key: claim.rows for claim in second.claims}
    assert second.first_rows != first.first_rows
    assert all(first.first_rows.get(key, rows[key]) <= row for key, row in second.first_rows.items())


def test_two_models_share_in_proportion_and_neither_starves(chain: Case) -> None:
    budget = named_budget(chain) + TOTAL
    for others in (TOTAL // 2, TOTAL, 4 * TOTAL):
        found = decide(chain, budget, resident=Beside([stranger(others)]))
        own = found.budget[RESIDENT]
        theirs = others - found.first_rows.get("stranger", others // 256) * 256
        free = budget - sum(found.budget.values()) + own
        assert own > 0
        assert theirs > 0
        assert own + theirs <= free
        assert abs(own / (own + theirs) - TOTAL / (TOTAL + others)) < 0.1


def test_weights_of_other_graphs_keep_a_graph_from_fitting_whole(chain: Case) -> None:
    exact = sum(decide(chain, GIB).budget.values())
    assert decide(chain, exact).whole_graph
    assert not decide(chain, exact, resident=Beside([stranger(256)])).whole_graph
    assert decide(chain, exact + 256, resident=Beside([stranger(256)])).whole_graph


@pytest.mark.parametrize("overhead", [{}, {"workspace": 1 << 20}])
def test_steps_of_other_graphs_keep_their_room(chain: Case, overhead: dict[str, int]) -> None:
    """What libraries take is no room that a step could use."""
    needed = named_budget(chain, overhead_bytes=overhead)
    own = decide(chain, needed, overhead_bytes=overhead).step_bytes
    decided = decide(chain, needed + TOTAL, overhead_bytes=overhead, resident=Beside(step_bytes=own + 5000))
    assert decided.budget[OTHERS] == 5000
    assert sum(decided.budget.values()) <= needed + TOTAL


@pytest.mark.parametrize(("item", "beyond"), [("workspace of a library", 5000), (UNFORESEEN, 2000)])
def test_what_libraries_take_leaves_no_room_for_steps_of_other_graphs(chain: Case, item: str, beyond: int) -> None:
    """They take it beside whichever step; what this graph's own steps were found to need is taken by turns."""
    needed = named_budget(chain)
    own = decide(chain, needed).step_bytes
    budget = needed + TOTAL + 3000
    decided = decide(chain, budget, resident=Beside(step_bytes=own + 5000), overhead_bytes={item: 3000})
    assert decided.budget[OTHERS] == beyond
    assert decided.step_bytes + decided.budget[OTHERS] == own + 5000
    assert sum(decided.budget.values()) <= budget


def test_a_step_that_does_not_fit_beside_others_goes_before_them(chain: Case) -> None:
    needed = named_budget(chain)
    decided = decide(chain, needed, resident=Beside([stranger(TOTAL)], step_bytes=needed))
    assert OTHERS not in decided.budget
    assert decided.first_rows == {}


@pytest.mark.parametrize("split", ["auto", 0.5])
def test_a_weight_that_fits_in_part_is_resident_in_part(chain: Case, split: Any) -> None:
    partial = set()
    for extra in range(0, TOTAL, TOTAL // 17):
        decided = decide(chain, named_budget(chain, split=split) + extra, split=split)
        rows = {claim.key: claim for claim in decided.claims}
        inside = [key for key, first in decided.first_rows.items() if first > rows[key].first]
        assert len(inside) <= 1
        partial |= {(key, decided.first_rows[key]) for key in inside}
        assert all(decided.first_rows[key] % row_granularity(rows[key].rows) == 0 for key in inside)
    assert len(partial) > 3


def test_the_leanest_residency_keeps_nothing(chain: Case) -> None:
    decided = decide(chain, 1, lean=True, activation_bytes=0)
    assert decided.weights == {}
    assert decided.ring_bytes == 2 * max(row_granularity(rows) * columns * 4 for columns, rows in SIZES)


@pytest.mark.parametrize("override", ["auto", 0.0, 0.25, 0.5, 1.0])
def test_another_split_later_stays_inside_the_budget(chain: Case, override: Any) -> None:
    decided = decide(chain, GIB, split=0.5)
    assert resident_bytes(chain, decided, override) <= decided.budget["resident weights"]


def test_the_smallest_slot_is_a_granule_of_the_widest_weight(chain: Case) -> None:
    decided = decide(chain, named_budget(chain))
    widest = max(row_granularity(rows) * columns * 4 for columns, rows in SIZES)
    assert decided.ring_bytes == 2 * widest
    assert decided.chunk_bytes == widest


@property_test
@given(st.integers(1, 2 * TOTAL), st.integers(0, TOTAL // 256))
def test_the_ring_is_as_long_as_others_made_it_where_that_leaves_half(
    chain: Case, budget_bytes: int, ring_units: int
) -> None:
    ring_bytes = ring_units * 256
    budget_bytes += named_budget(chain, split=0.25)
    decided = decide(chain, budget_bytes, split=0.25, resident=Beside(ring_bytes=ring_bytes))
    assert sum(decided.budget.values()) <= budget_bytes
    free = budget_bytes - decided.step_bytes
    assert decided.ring_bytes >= ring_bytes or ring_bytes > free // 2
