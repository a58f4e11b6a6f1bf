"""Weights that cannot be split: which are, how residency treats them, and what is computed on the host."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.errors import BudgetError
from hetegen_compile.ir import info
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.choose_residency import choose_residency
from hetegen_compile.passes.group_segments import group_segments
from hetegen_compile.passes.place_nodes import place_nodes
from hetegen_compile.passes.plans import MIRRORED, RESIDENT
from hetegen_compile.passes.sources import source_name
from hetegen_compile.passes.unsplit_weights import (
    computed_on_host,
    other_weights,
    stacked_weights,
    weights_on_host,
    without_use,
)
from tests.passes.graphs import Case, case

STACK_BYTES = 4 * 16 * 32 * 4
"""Of each of the two stacks of ``Experts``."""


class Experts(nn.Module):
    """Two projections stacked by expert and an in-place activation between them, a Linear before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up = nn.Parameter(torch.randn(4, 16, 32))
        self.down = nn.Parameter(torch.randn(4, 16, 32))
        self.window = nn.Parameter(torch.randn(16, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x) + self.window.mean()
        h = torch.relu_(torch.bmm(x.expand(4, *x.shape), self.up))
        y = torch.bmm(h, self.down.transpose(1, 2))
        return self.after(torch.sigmoid(y.sum(0)))  # type: ignore[no-any-return]


def decided(budget_bytes: int) -> Case:
    found = case(Experts(), torch.randn(3, 16)).run(annotate_costs)
    found.context = replace(found.context, budget_bytes=budget_bytes)
    found.context = replace(found.context, residency=choose_residency(found.module, found.context))
    return found


def leanest(decide: Callable[[int], Case] = decided) -> int:
    with pytest.raises(BudgetError) as error:
        decide(1)
    return int(str(error.value).split("'gpu_memory': ")[1].split("}")[0])


def test_stacks_are_parameters_of_several_matrices() -> None:
    found = case(Experts(), torch.randn(3, 16))
    assert [info(node).value.shape for node in stacked_weights(found.module, found.context)] == [(4, 16, 32)] * 2


def test_a_budget_below_the_stacks_leaves_them_on_the_host() -> None:
    residency = decided(leanest()).context.residency
    assert residency is not None
    assert len(residency.host_weights) == 2
    assert not residency.whole_graph
    assert leanest() < STACK_BYTES


def test_a_stack_takes_what_linears_leave() -> None:
    lean = decided(leanest()).context.residency
    found = decided(leanest() + STACK_BYTES + 8192).context.residency
    assert lean is not None
    assert found is not None
    assert len(found.host_weights) == 1
    assert found.budget[MIRRORED] == lean.budget[MIRRORED]
    assert found.unsplit_bytes == STACK_BYTES
    assert found.budget[RESIDENT] == 2 * 16 * 16 * 4 + STACK_BYTES, "all rows of both Linears, and the stack"


def test_a_budget_for_all_offloads_nothing() -> None:
    residency = decided(1 << 20).context.residency
    assert residency is not None
    assert residency.whole_graph
    assert not residency.host_weights


def test_what_lies_between_two_stacks_is_computed_on_the_host() -> None:
    found = decided(leanest())
    residency = found.context.residency
    assert residency is not None
    nodes = list(found.module.graph.nodes)
    on_host = {str(name) for node in computed_on_host(nodes, residency.host_weights) for name in info(node).aten}
    assert on_host == {"bmm", "relu_", "transpose"}
    (refusal,) = weights_on_host(found.module, found.context)
    assert "16.00 KiB of stacked weights" in refusal.reason
    assert "up" in refusal.where
    assert "1 more" in refusal.where


def test_the_graph_with_stacks_on_the_host_computes_what_eager_does() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(3, 16)
    found = case(model, x).run(annotate_costs)
    found.context = replace(found.context, budget_bytes=leanest())
    found.apply(choose_residency)
    found.apply(place_nodes)
    assert found.context.placement is not None
    assert sum("bmm" in info(node).aten for node in found.context.placement.host) == 2
    assert not any("bmm" in info(node).aten for node in found.context.placement.accelerator)
    found.apply(group_segments)
    with torch.no_grad():
        torch.testing.assert_close(found.outputs()[0], model(x))


# ---- other weights -------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A Linear, one whose weight is corrected in each forward, a column-major one, a table, a norm and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(64, 64)
        self.base = nn.Parameter(torch.randn(64, 64))
        self.up, self.down = nn.Parameter(torch.randn(64, 2)), nn.Parameter(torch.randn(2, 64))
        self.columns = nn.Parameter(torch.randn(64, 64).t())
        self.table = nn.Parameter(torch.randn(256, 64))
        self.norm = nn.LayerNorm(64)
        self.vector = nn.Parameter(torch.randn(8192))

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.norm(x + self.table[: x.shape[0]]))
        x = torch.nn.functional.linear(x, self.base + self.up @ self.down)
        return torch.nn.functional.linear(x, self.columns) + self.vector[:64]


def odd(budget_bytes: int) -> Case:
    found = case(Odd(), torch.randn(3, 64)).run(annotate_costs)
    found.context = replace(found.context, budget_bytes=budget_bytes)
    found.context = replace(found.context, residency=choose_residency(found.module, found.context))
    return found


def sources(found: Case, names: Collection[str]) -> set[str]:
    placeholders = found.module.graph.find_nodes(op="placeholder")
    return {(source_name(node) or node.name).rpartition(".")[2] for node in placeholders if node.name in names}


def test_large_weights_that_no_linear_reads_may_stay_on_the_host() -> None:
    found = odd(1 << 20)
    assert sources(found, [node.name for node in other_weights(found.module, found.context)]) == {
        "base", "columns", "table",
    }  # fmt: skip


def test_a_weight_behind_more_operations_than_python_recurses() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.columns = nn.Parameter(torch.randn(64, 64).t())

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(sys.getrecursionlimit()):
                x = -x
            return torch.nn.functional.linear(x, self.columns)

    found = case(Deep(), torch.randn(3, 64)).run(annotate_costs)
    ((weight, readers),) = other_weights(found.module, found.context).items()
    assert source_name(weight).endswith("columns")
    assert [name for node in readers for name in info(node).aten] == ["t", "mm"]


def test_those_that_save_most_stay_and_come_before_linears() -> None:
    def resident(budget_bytes: int) -> set[str]:
        found = odd(budget_bytes)
        assert found.context.residency is not None
        return sources(found, found.context.residency.weights)

    lean = leanest(odd)
    kept = [resident(lean + (more << 10)) for more in (0, 16, 40, 96, 104)]
    assert kept[0] == set()
    assert kept[1] == {"base"}, "before the Linear of as many bytes"
    assert kept[2] == {"base", "columns", "weight"}, "what is left holds rows of the Linear, but not the table"
    assert kept[3] == {"base", "columns", "table"}, "three rows of the table are read, so it comes after the matrices"
    assert kept[4] == {"base", "columns", "table", "weight"}


def test_what_is_made_of_weights_alone_is_computed_where_it_is_read() -> None:
    found = odd(1 << 20)
    nodes = list(found.module.graph.nodes)
    base = next(node.name for node in nodes if source_name(node).endswith("base"))
    on_host = computed_on_host(nodes, {base}, found.context.weights)
    assert sorted(str(name) for node in on_host for name in info(node).aten) == ["add", "mm", "mm", "t"]


def test_a_few_rows_of_a_table_are_sent_up() -> None:
    found = odd(1 << 20)
    nodes = list(found.module.graph.nodes)
    table = next(node.name for node in nodes if source_name(node).endswith("table"))
    on_host = computed_on_host(nodes, {table}, found.context.weights)
    assert {str(name) for node in on_host for name in info(node).aten} == {"slice"}


def test_a_weight_that_is_read_with_one_on_the_host_is_not_kept() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(64, 64).t()), nn.Parameter(torch.randn(64, 256).t())

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,ij,kj->bk", x, self.left, self.right)

    found = case(Bilinear(), torch.randn(3, 64)).run(annotate_costs)
    names = [node.name for node in other_weights(found.module, found.context)]
    assert len(names) == 2
    left, right = names
    assert without_use(found.module, found.context, {left}, {right}) == {left}
    assert without_use(found.module, found.context, {left}, set()) == set()
