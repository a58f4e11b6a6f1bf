"""Which stacks of experts are streamed: of which products, for how many tokens, through how long a ring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor, nn

from hetegen_compile.cost_model import HardwareProfile, accelerator_linear_s, load_profile, upload_s
from hetegen_compile.ir import info
from hetegen_compile.options import parse_options
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.choose_residency import choose_residency
from hetegen_compile.passes.context import require
from hetegen_compile.passes.grouped_products import products_with
from hetegen_compile.passes.plans import RESIDENT, RING, Residency
from hetegen_compile.passes.stream_experts import (
    chunk_bytes,
    expert_bytes,
    experts_cost,
    with_host_experts,
    worth_streaming,
)
from tests.passes.graphs import Case, case

EXPERTS, WIDTH, OUT = 8, 1024, 4096
STACK = nn.Parameter(torch.zeros(EXPERTS, OUT, WIDTH, dtype=torch.bfloat16))
PROFILE: HardwareProfile = load_profile("rtx4090-desktop")
MANY, FEW = 1024, 2


def product(x: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, STACK.transpose(1, 2), offs=ends)


def traced(function: Callable[..., Any], tokens: int = MANY, **changes: Any) -> Case:
    x, ends = torch.zeros(tokens, WIDTH, dtype=torch.bfloat16), torch.full((EXPERTS,), tokens, dtype=torch.int32)
    return case(function, x, ends, profile=PROFILE, **changes).run(annotate_costs)


def stacks_of(found: Case) -> list[Any]:
    return [node for node in found.module.graph.find_nodes(op="placeholder") if info(node).value.dim() == 3]


def is_worth(found: Case, **changes: Any) -> bool:
    context = replace(found.context, **changes)
    return bool(worth_streaming(stacks_of(found), list(found.module.graph.nodes), context))


def test_many_tokens_are_worth_it_and_few_are_not() -> None:
    assert is_worth(traced(product))
    assert not is_worth(traced(product, FEW)), "the host reads two experts, the link would bring eight"


def test_seconds() -> None:
    found = traced(product)
    (stack,) = stacks_of(found)
    ((node, grouped),) = (products_with(stack) or {}).items()
    assert (grouped.matrices, grouped.dim) == (stack, 0)
    cost = experts_cost(node, grouped, found.context)
    parts = STACK.nbytes // chunk_bytes(stack)
    assert cost.weight_bytes == STACK.nbytes
    assert cost.link_s == pytest.approx(parts * upload_s(PROFILE, chunk_bytes(stack)))
    flops, nbytes = 2.0 * MANY * WIDTH * OUT / EXPERTS, STACK.nbytes / EXPERTS
    each_s = accelerator_linear_s(PROFILE, "bfloat16", MANY / EXPERTS, nbytes, flops)
    assert cost.accelerator_s == pytest.approx(EXPERTS * each_s)
    alone_s = require(found.context.costs, "annotate_costs")[info(node).position].host_s
    assert cost.host_alone_s == alone_s
    assert cost.host_s >= alone_s, "beside a working link"
    staged = replace(found.context, staged={stack.name: "a reason"})
    slow = STACK.nbytes / PROFILE.pin_bytes_per_s
    assert experts_cost(node, grouped, staged).link_s == pytest.approx(max(cost.link_s, slow))


def test_the_accelerator_has_a_linear_for_each_expert_and_no_less_than_issuing_takes() -> None:
    found = traced(product)
    (stack,) = stacks_of(found)
    ((node, grouped),) = (products_with(stack) or {}).items()
    device = replace(PROFILE.accelerator, issue_s=1e-3)
    dear = replace(found.context, profile=replace(PROFILE, accelerator=device))
    assert experts_cost(node, grouped, dear).accelerator_s == pytest.approx((1 + EXPERTS) * 1e-3)


def test_an_accelerator_that_is_slower_than_the_host_gets_none() -> None:
    found = traced(product)
    device = PROFILE.accelerator
    rates = {dtype: rate / 1e6 for dtype, rate in device.flops_per_s.items()}
    assert not is_worth(found, profile=replace(PROFILE, accelerator=replace(device, flops_per_s=rates)))


def test_nothing_is_streamed_where_the_options_or_the_budget_say_so() -> None:
    found = traced(product)
    on_host = parse_options({"accelerator": "emulated", "hardware": "cpu-emulated", "split": 1.0})
    assert not is_worth(found, options=on_host)
    assert not is_worth(found, lean=True), "the leanest schedule has the smallest ring"


@dataclass
class Unpinned:
    """Host memory of which nothing can be pinned."""

    asked: int = 0

    def staged(self, names: Collection[str], weights: Mapping[str, Tensor]) -> Mapping[str, str]:
        self.asked += 1
        assert set(names) <= weights.keys()
        return dict.fromkeys(names, "a reason")


def test_a_slow_way_through_the_pinned_ring_counts() -> None:
    fast, memory = traced(product), Unpinned()
    assert is_worth(fast, host_memory=memory)
    slow = replace(PROFILE, pin_bytes_per_s=1e6)
    assert not is_worth(fast, host_memory=memory, profile=slow)
    assert is_worth(fast, profile=slow), "all of it is pinned"
    assert memory.asked == 2
    is_worth(traced(product, FEW), host_memory=memory)
    assert memory.asked == 2, "memory is only made ready for what gains"


# ---- other readers ---------------------------------------------------------------------------------------------


def of_another_dtype(x: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, STACK.transpose(1, 2), offs=ends, out_dtype=torch.bfloat16)


def read_twice(x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return product(x, ends), STACK.sum()


def long_ends(x: Tensor, ends: Tensor) -> Tensor:
    found: Tensor = torch.ops.transformers.grouped_mm_fallback(x, STACK.transpose(1, 2), offs=ends.long())
    return found


def of_some_experts(x: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, STACK[:4].transpose(1, 2), offs=ends[:4])


def with_padded_rows(x: Tensor, ends: Tensor) -> Tensor:
    """Rows of 72 bytes are at multiples of 16 only because they are columns of longer ones."""
    return torch._grouped_mm(x[:, :36], NARROW, offs=ends)


NARROW = nn.Parameter(torch.zeros(EXPERTS, 36, OUT, dtype=torch.bfloat16))


@pytest.mark.parametrize("function", [of_another_dtype, read_twice, long_ends, of_some_experts, with_padded_rows])
def test_what_else_reads_a_stack_keeps_it_where_it_is(function: Callable[..., Any]) -> None:
    found = traced(function)
    assert [products_with(stack) for stack in stacks_of(found)] == [None]
    assert not is_worth(found)


def test_a_stack_that_is_written_through_something_else_is_not_streamed() -> None:
    other = STACK.data.view(-1)[:8]

    def writes(x: Tensor, ends: Tensor) -> Tensor:
        other.mul_(0.5)
        return product(x, ends)

    found = traced(writes)
    assert all(products_with(stack) for stack in stacks_of(found))
    assert not is_worth(found)


def test_a_product_under_autocast_is_left_alone() -> None:
    def under_autocast(x: Tensor, ends: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return product(x, ends)

    assert not is_worth(traced(under_autocast))


def test_a_product_by_position() -> None:
    def by_position(x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, STACK.transpose(1, 2), ends)

    def stored_in_out(x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x[:, :1024], IN_OUT, offs=ends)

    for function, dim in ((by_position, 0), (stored_in_out, 1)):
        found = traced(function)
        (stack,) = stacks_of(found)
        assert [one.dim for one in (products_with(stack) or {}).values()] == [dim]


IN_OUT = nn.Parameter(torch.zeros(EXPERTS, WIDTH, OUT, dtype=torch.bfloat16))


def test_a_stack_with_gaps_is_not_streamed() -> None:
    wide = torch.zeros(EXPERTS, OUT, 2 * WIDTH, dtype=torch.bfloat16)[:, :, :WIDTH]

    def of_columns(x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, wide.transpose(1, 2), offs=ends)

    found = traced(of_columns)
    assert all(products_with(stack) for stack in stacks_of(found)), "it is a product with it"
    assert not is_worth(found)


# ---- parts and the ring ----------------------------------------------------------------------------------------


def residency(found: Case, budget: int) -> Residency:
    context = replace(found.context, budget_bytes=budget)
    chosen: Residency = choose_residency(found.module, context)
    return chosen


def fixed_bytes(found: Case) -> int:
    """What a step needs beside weights and the ring."""
    budget = residency(found, 2**30).budget
    return sum(nbytes for name, nbytes in budget.items() if name not in (RING, RESIDENT))


def test_the_ring_holds_two_parts() -> None:
    found = traced(product)
    (stack,) = stacks_of(found)
    assert expert_bytes(stack) == 2 * WIDTH * OUT
    assert chunk_bytes(stack) == 2 * expert_bytes(stack), "16 MiB"
    chosen = residency(found, fixed_bytes(found) + STACK.nbytes - 1)
    assert chosen.streamed_stacks == {stack.name}
    assert not chosen.host_weights
    assert chosen.ring_bytes == 2 * expert_bytes(stack), "a quarter of what is free holds no more"
    assert chosen.stack_chunk_bytes == expert_bytes(stack)
    plan = with_host_experts(stack, 0, chosen)
    assert plan.streamed == tuple((lo, lo + 1) for lo in range(EXPERTS))


def test_a_ring_that_would_take_more_than_half_is_not_made() -> None:
    found = traced(product)
    (stack,) = stacks_of(found)
    for free, streams in ((4 * expert_bytes(stack), True), (4 * expert_bytes(stack) - 512, False)):
        chosen = residency(found, fixed_bytes(found) + free)
        assert bool(chosen.streamed_stacks) is streams
        assert bool(chosen.host_weights) is not streams


def test_what_fits_is_resident() -> None:
    chosen = residency(traced(product), 2**30)
    assert chosen.whole_graph
    assert not chosen.streamed_stacks


@pytest.mark.parametrize(
    ("host", "most", "sizes"),
    [(0, 2, [2, 2, 2, 2]), (1, 2, [2, 2, 2, 1]), (5, 2, [2, 1]), (0, 1, [1] * 8), (8, 2, []), (0, 9, [2, 2, 2, 2])],
)
def test_parts_are_of_about_the_same_length(host: int, most: int, sizes: list[int]) -> None:
    (stack,) = stacks_of(traced(product))
    plan = with_host_experts(stack, host, Residency({}, 0, 0, {}, stack_chunk_bytes=most * expert_bytes(stack) + 256))
    assert (plan.rows, plan.host, plan.resident) == (EXPERTS, host, None)
    assert [hi - lo for lo, hi in plan.streamed] == sizes
    assert [host, *(hi for _, hi in plan.streamed)] == [*(lo for lo, _ in plan.streamed), EXPERTS]
