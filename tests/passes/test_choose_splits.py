"""Rows by where they are consumed: they tile, chunks fit their slots, shares are the options' or the balance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hetegen_compile.cost_model import SplitProblem, row_granularity, solve_split
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.choose_splits import (
    best_split,
    choose_splits,
    forced_host_rows,
    linears_of,
    lost_feed_s,
    table_only,
)
from hetegen_compile.passes.findings import NodeCost
from hetegen_compile.passes.plans import GROWTH, LinearPlan, Residency, Splits
from tests.passes.graphs import PROFILE, Case, again, case, planned, property_test

ROWS = (1, 7, 100, 256, 1000)
COLUMNS = 32


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(COLUMNS, rows) for rows in ROWS])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


@pytest.fixture(scope="module")
def wide() -> Case:
    return case(Wide(), torch.randn(1, COLUMNS)).run(annotate_costs)


def residency(chunk_bytes: int, weights: Mapping[str, int] | None = None) -> Residency:
    """``weights``: the first resident row of each weight that is on the accelerator."""
    return Residency(weights or {}, 2 * chunk_bytes, chunk_bytes, {"activations": 0, GROWTH: 0})


def splits_of(base: Case, split: Any, decided: Residency) -> Splits:
    found = again(base, split=split, residency=decided)
    result = choose_splits(found.module, found.context)
    assert found.text == base.text  # a decision changes nothing
    return result


def check_tiling(plan: LinearPlan) -> None:
    """Host, streamed and resident rows follow each other and leave nothing out."""
    ranges = [(0, plan.host), *plan.streamed, *([plan.resident] if plan.resident else [])]
    assert ranges[-1][1] == plan.rows
    assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:], strict=False))
    assert all(lo < hi for lo, hi in ranges[1:])
    assert plan.host + plan.streamed_rows + plan.resident_rows == plan.rows


shares = st.just("auto") | st.floats(0, 1)


@property_test
@given(shares, st.integers(0, 40_000), st.dictionaries(st.sampled_from(range(len(ROWS))), st.floats(0, 1)))
def test_rows_are_tiled_and_chunks_fit(wide: Case, split: Any, more_bytes: int, kept: dict[int, float]) -> None:
    weights = [str(node.args[1]) for node in wide.nodes(LINEAR)]
    smallest = max(row_granularity(rows) for rows in ROWS) * COLUMNS * 4
    first = {i: round(share * ROWS[i]) for i, share in kept.items()}
    decided = residency(smallest + more_bytes, {weights[i]: row for i, row in first.items()})
    plans = splits_of(wide, split, decided)
    for i, (rows, plan) in enumerate(zip(ROWS, plans.values(), strict=True)):
        check_tiling(plan)
        assert plan.rows == rows
        assert plan.host % row_granularity(rows) == 0 or plan.host == rows
        assert all((hi - lo) * COLUMNS * 4 <= decided.chunk_bytes for lo, hi in plan.streamed)
        begin = max(plan.host, first.get(i, rows))
        assert plan.resident == ((begin, rows) if begin < rows else None)


@property_test
@given(st.floats(0, 1))
def test_a_forced_share_is_kept_to_half_a_granule(wide: Case, share: float) -> None:
    for rows, plan in zip(ROWS, splits_of(wide, share, residency(40_000)).values(), strict=True):
        assert abs(plan.host - share * rows) <= row_granularity(rows) / 2 + 1e-9
        assert plan.host == forced_host_rows(rows, again(wide, split=share).context)


@pytest.mark.parametrize(("share", "host"), [(0.0, [0] * 5), (1.0, list(ROWS))])
def test_the_ends_leave_nothing_on_the_other_side(wide: Case, share: float, host: list[int]) -> None:
    assert [plan.host for plan in splits_of(wide, share, residency(40_000)).values()] == host


@pytest.mark.parametrize("resident", [0.0, 0.4])
def test_auto_is_the_cost_models_balance(wide: Case, resident: float) -> None:
    assert wide.context.costs is not None
    slow_trip = replace(PROFILE, fixed_s_per_split=1e-7)
    base = again(wide, profile=slow_trip)
    names = [str(node.args[1]) for node in wide.nodes(LINEAR)]
    weights = {name: round((1 - resident) * rows) for name, rows in zip(names, ROWS, strict=True)} if resident else {}
    plans = splits_of(base, "auto", residency(40_000, weights))
    for position, plan in plans.items():
        cost = wide.context.costs[position]
        problem = SplitProblem(
            rows=plan.rows,
            host_fixed_s=1e-7,
            host_s_per_row=cost.host_s / plan.rows,
            link_s_per_row=cost.link_s / plan.rows,
            accelerator_s_per_row=cost.accelerator_s / plan.rows,
            resident_rows=plan.resident_rows,
        )
        assert plan.host == solve_split(problem, row_granularity(plan.rows)).host_rows
    assert any(0 < plan.host < plan.rows - plan.resident_rows for plan in plans.values())  # or this proves nothing


def test_a_trip_that_costs_more_than_it_saves_is_not_made(wide: Case) -> None:
    base = again(wide, profile=replace(PROFILE, fixed_s_per_split=1.0))
    assert all(plan.host == 0 for plan in splits_of(base, "auto", residency(40_000)).values())


def test_the_rest_is_cut_into_equal_chunks(wide: Case) -> None:
    chunk = 256 * COLUMNS * 4
    *_, plan = splits_of(wide, 0.0, residency(chunk)).values()
    assert plan.streamed == ((0, 256), (256, 512), (512, 768), (768, 1000))


def test_a_resident_weight_keeps_only_a_forced_share_on_the_host(wide: Case) -> None:
    weights = {str(node.args[1]): 0 for node in wide.nodes(LINEAR)}
    auto = splits_of(wide, "auto", residency(40_000, weights)).values()
    assert [plan.resident for plan in auto] == [(0, rows) for rows in ROWS]
    half = splits_of(wide, 0.5, residency(40_000, weights)).values()
    assert [plan.streamed for plan in half] == [()] * len(ROWS)
    assert [plan.resident for plan in half] == [(plan.host, plan.rows) for plan in half]


def test_rows_before_the_first_resident_one_are_streamed_if_the_host_does_not_take_them(wide: Case) -> None:
    weights = {str(node.args[1]): 512 for node in wide.nodes(LINEAR)}
    decided = residency(256 * COLUMNS * 4, weights)
    for split, host, streamed in ((0.0, 0, ((0, 256), (256, 512))), (0.256, 256, ((256, 512),)), (0.512, 512, ())):
        *_, plan = splits_of(wide, split, decided).values()
        assert plan == LinearPlan(1000, host, streamed, (512, 1000))
    *_, plan = splits_of(wide, 0.768, decided).values()
    assert plan == LinearPlan(1000, 768, (), (768, 1000))


def test_the_balance_of_more_tokens_streams_more() -> None:
    found = case(lambda x: LARGE(x), torch.randn(1, 1024)).run(annotate_costs)
    (linear,) = found.nodes(LINEAR)
    assert found.context.costs is not None
    one = found.context.costs[info(linear).position]
    assert one.host_alone_s is not None
    many = replace(one, host_s=one.host_s * 50, host_alone_s=one.host_alone_s * 50)
    context = replace(found.context, profile=replace(PROFILE, fixed_s_per_split=1e-5))
    assert 0 < best_split(4096, many, context).host_rows < best_split(4096, one, context).host_rows < 4096


LARGE = nn.Linear(1024, 4096)


@pytest.mark.parametrize(("host_s", "contention"), [(3.0, 1.0), (3.0, 0.9), (20.0, 0.5)])
def test_best_split_is_never_worse_than_streaming_everything(host_s: float, contention: float) -> None:
    """With the whole link, which has it to itself where nothing is on the host."""
    cost = NodeCost(0, 0, 4096, 1, host_s=host_s, accelerator_s=0.1, link_s=2.0)
    found = case(lambda x: x + 1, torch.zeros(1))
    link = replace(found.context.profile.link, contention=contention)
    solution = best_split(1024, cost, replace(found.context, profile=replace(found.context.profile, link=link)))
    assert solution.makespan_s <= 2.1 * (1 + 1e-9)
    assert solution.host_rows + solution.streamed_rows == 1024
    assert (solution.host_rows > 0) == (host_s == 3.0)


@pytest.mark.parametrize(
    ("staged", "pin_bytes_per_s", "expected"), [(False, 1e3, 0.5), (True, 4096 / 2.25, 0.25), (True, 1e3, 0.0)]
)
def test_a_pin_thread_that_is_slower_hides_what_the_link_loses(
    staged: bool, pin_bytes_per_s: float, expected: float
) -> None:
    cost = NodeCost(0, 0, 4096, 1, host_s=3.0, accelerator_s=0.1, link_s=2.0, link_lost_s=0.5)
    linear = nn.Linear(32, 32, bias=False)
    found = planned(lambda x: linear(x), torch.zeros(1, 32))
    (node,) = linears_of(found.module).values()
    weight = node.all_input_nodes[1].name
    profile = replace(found.context.profile, pin_bytes_per_s=pin_bytes_per_s)
    context = replace(found.context, profile=profile, staged={weight: "no pages"} if staged else {})
    assert lost_feed_s(node, cost, context) == pytest.approx(expected)


# ---- embedding tables ---------------------------------------------------------------------------------------


class Lookup(nn.Module):
    def __init__(self, *, tied: bool = False, scaled: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.scaled = scaled
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids)
        return self.head(x) + (self.table.weight.sum() if self.scaled else 0)


TABLE_BYTES = 64 * 16 * 4


@pytest.mark.parametrize(
    ("module", "tokens", "on_host"),
    [
        (Lookup(), 1, True),
        (Lookup(), 63, True),
        (Lookup(), 64, False),  # as many rows as the table has: a mirror costs no more than one step's rows
        (Lookup(tied=True), 64, True),
        (Lookup(scaled=True), 1, False),
    ],
)
@pytest.mark.parametrize("budget_bytes", [TABLE_BYTES, 1000 * TABLE_BYTES])
def test_tables_larger_than_what_is_looked_up_stay_on_the_host(
    module: Lookup, tokens: int, on_host: bool, budget_bytes: int
) -> None:
    found = case(module, torch.arange(tokens), budget_bytes=budget_bytes).run(annotate_costs)
    (table,) = {arg for n in found.module.graph.nodes if "embedding" in info(n).aten
                for arg in n.all_input_nodes if arg.name in found.context.weights}  # fmt: skip
    assert table_only(table, found.context) is on_host


def test_a_table_that_is_given_with_the_call_is_no_table_of_the_model() -> None:
    found = case(lambda ids, w: nn.functional.embedding(ids, w), torch.tensor([1]), torch.randn(64, 16),
                 budget_bytes=1000)  # fmt: skip
    placeholders = found.module.graph.find_nodes(op="placeholder")
    assert not any(table_only(node, found.context) for node in placeholders)
