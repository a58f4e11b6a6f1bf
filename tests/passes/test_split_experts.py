"""Products with streamed experts: a host part, a part for each chunk, what is put together, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor, fx, nn

from hetegen_compile import ir
from hetegen_compile.cost_model import accelerator_linear_s
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import info
from hetegen_compile.operands import grouped_part
from hetegen_compile.passes.carry_prefetches import carry_prefetches
from hetegen_compile.passes.check_parts import check_parts
from hetegen_compile.passes.closed_gates import launches_of
from hetegen_compile.passes.grouped_products import grouped_on_host_s, grouped_product, products_with
from hetegen_compile.passes.issue_ahead import issue_ahead
from hetegen_compile.passes.measure_memory import measure_memory
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.split_experts import split_experts
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import Case, case, halves, planned, scheduled
from tests.passes.worker import gated

EXPERTS, WIDTH, INNER, TOKENS = 8, 64, 128, 24
EXPERT_BYTES = 4 * WIDTH * INNER
ENDS = torch.tensor([0, 4, 4, 9, 10, 18, 20, TOKENS], dtype=torch.int32)


class Mixture(nn.Module):
    """A Linear, two products with experts and an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 8)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 8)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [tokens, width], the ends of each expert's tokens -> [tokens, width]; one stack lies [out, in]."""
        h = self.before(x)
        grouped = torch.ops.transformers.grouped_mm_fallback
        made: Tensor = grouped(h, self.up.transpose(-2, -1), offs=ends).relu()
        found: Tensor = grouped(made, self.down, offs=ends)
        return x + found


torch.manual_seed(0)
MIXTURE = Mixture().eval()
X = torch.randn(TOKENS, WIDTH)


def in_chunks(host: int, size: int) -> Callable[[int], LinearPlan]:
    """The first experts on the host, the others streamed so many at a time."""

    def plan(groups: int) -> LinearPlan:
        chunks = tuple((lo, min(lo + size, groups)) for lo in range(host, groups, size))
        return LinearPlan(groups, host, chunks, None)

    return plan


def mixture(host: int, size: int, **changes: Any) -> Case:
    return scheduled(MIXTURE, X, ENDS, experts=in_chunks(host, size), ring_bytes=8 * EXPERT_BYTES, **changes)


@pytest.mark.parametrize(("host", "size"), [(0, 8), (0, 3), (2, 3), (5, 1), (8, 1)])
def test_it_is_the_product(host: int, size: int) -> None:
    found = mixture(host, size)
    with torch.no_grad():
        expected = MIXTURE(X, ENDS)
    (actual,) = found.outputs()
    torch.testing.assert_close(actual, expected)
    streamed = [node for node in found.nodes(ir.PREFETCH) if info(node).value.dim() == 3]
    assert len(streamed) == 2 * -(-(EXPERTS - host) // size)
    assert sum(int(info(node).value.shape[0]) for node in streamed) == 2 * (EXPERTS - host)
    assert len(found.nodes(ir.HOST_GROUPED)) == (2 if host else 0)
    assert not any("grouped_mm" in str(node.target) for node in found.module.graph.nodes)


def test_the_parts_of_one_product() -> None:
    found = planned(MIXTURE, X, ENDS, experts=in_chunks(2, 3), ring_bytes=8 * EXPERT_BYTES)
    lines = found.text.splitlines()
    assert lines[3:7] == [
        "t4 = grouped(t3, up, t2, 0, grouped_mm_fallback)",
        "t5 = segment_2(t4)",
        "t6 = t5[0]",
        "t7 = grouped(t6, down, t2, 1, grouped_mm_fallback)",
    ]
    found.apply(split_experts)
    assert found.text.splitlines()[3:14] == [
        "t4 = prefetch(up, [2, 5], 0, -1, [])",
        "t5 = wait(t4)",
        "t6 = partial_grouped(t3, t5, t2, None, 2, 0)",
        "t7 = release(t4)",
        "t8 = prefetch(up, [5, 8], 0, -1, [])",
        "t9 = wait(t8)",
        "t10 = partial_grouped(t3, t9, t2, t6, 5, 0)",
        "t11 = release(t8)",
        "t12 = host_grouped(t3, up, t2, 2, 0, grouped_mm_fallback)",
        "t13 = join([t12, t10], 1)",
        "t14 = segment_2(t13)",
    ]


def test_where_groups_end_may_be_known_later_than_what_they_are_of() -> None:
    """Ends that a Linear decides on, of activations that are given; and ends that are written in place."""
    model = MIXTURE

    def late(x: Tensor, ends: Tensor) -> Tensor:
        decided = ends + 0 * model.before(x).sum().to(torch.int32)
        decided.add_(0)
        found: Tensor = torch.ops.transformers.grouped_mm_fallback(x, model.up.transpose(-2, -1), offs=decided)
        return found

    found = scheduled(late, X, ENDS, experts=in_chunks(2, 3), ring_bytes=8 * EXPERT_BYTES)
    with torch.no_grad():
        torch.testing.assert_close(found.outputs()[0], late(X, ENDS))
    check_parts(found.module.graph)


def routed(x: Tensor, ends: Tensor) -> Tensor:
    """The accelerator decides where groups end."""
    decided = ends + 0 * MIXTURE.before(x).sum().to(torch.int32)
    found: Tensor = torch.ops.transformers.grouped_mm_fallback(x * 2, MIXTURE.up.transpose(-2, -1), offs=decided)
    return found


@pytest.mark.parametrize("host", [0, 2])
def test_the_host_reads_where_groups_end_before_it_issues_their_parts(host: int) -> None:
    found = scheduled(routed, X, ENDS, experts=in_chunks(host, 3), ring_bytes=8 * EXPERT_BYTES)
    order = {node: place for place, node in enumerate(found.module.graph.nodes)}
    parts = found.nodes(ir.PARTIAL_GROUPED)
    (ends,) = {grouped_part(part).ends for part in parts}
    wait = ends.args[0]
    assert wait.target == ir.WAIT_HOST
    (brought,) = wait.args[0].args[0]
    assert info(brought).value.dtype == torch.int32, "nothing that takes longer comes with it"
    assert order[wait] < min(order[part] for part in parts)
    assert all(order[part] < order[node] for node in found.nodes(ir.HOST_GROUPED) for part in parts)
    with torch.no_grad():
        torch.testing.assert_close(found.outputs()[0], routed(X, ENDS))
    found.apply(measure_memory)
    found.apply(verify)
    parts[0].update_arg(2, brought)
    with pytest.raises(ScheduleError, match=r"partial_grouped.* on the host"):
        found.apply(verify)


def test_a_stack_that_is_not_pinned_is_staged() -> None:
    base = case(MIXTURE, X, ENDS)
    names = {node.name: "a reason" for node in base.module.graph.find_nodes(op="placeholder") if products_with(node)}
    found = mixture(2, 3, staged=names)
    stages = found.nodes(ir.STAGE)
    assert [info(node).value.shape[0] for node in stages] == [3, 3, 3, 3]
    assert all(list(node.users) for node in stages)
    assert all(
        node.args[1] == [0, info(node).value.shape[0]] for node in found.nodes(ir.PREFETCH) if node.args[0] in stages
    )
    torch.testing.assert_close(found.outputs()[0], MIXTURE(X, ENDS).detach())


def test_work_and_memory_of_parts() -> None:
    found = mixture(2, 3)
    prediction, memory = found.apply(predict_step), found.apply(measure_memory)
    (first, second, *_) = found.nodes(ir.PARTIAL_GROUPED)
    assert prediction.work[first].resource == "accelerator"
    assert first.args[3] is None
    assert second.args[3] is first
    assert memory.workspace.keys().isdisjoint((first, second)), "each expert's rows are written where they belong"
    made = 4 * TOKENS * INNER
    places = {node: place for place, node in enumerate(found.module.graph.nodes)}
    both = [life for life in memory.lives if life[2] == made and places[first] in range(life[0], life[1] + 1)]
    assert len(both) == 1, "the second part is written into the first one's result"
    each_s = accelerator_linear_s(
        found.context.profile, "float32", TOKENS / EXPERTS, EXPERT_BYTES, 2.0 * TOKENS / EXPERTS * WIDTH * INNER
    )
    assert prediction.work[first].seconds == pytest.approx(3 * each_s)
    issuing_s = found.context.profile.accelerator.issuing_s(segment=False)
    assert prediction.work[first].issue_s == pytest.approx((1 + 3) * issuing_s), "zeros, and a product an expert"
    flops = [found.context.number(info(node).flops) for node in (first, second, *found.nodes(ir.HOST_GROUPED))]
    assert flops == pytest.approx([2.0 * TOKENS * WIDTH * INNER * share for share in (3 / 8, 3 / 8, 2 / 8, 2 / 8)])
    base = case(MIXTURE, X, ENDS)
    node, _ = (node for node in base.module.graph.nodes if grouped_product(node) is not None)
    product = grouped_product(node)
    assert product is not None
    whole_s, part_s = (
        grouped_on_host_s(product, "float32", count * flops[2] * 4, found.context, count, contended=True)
        for count in (1.0, 0.25)
    )
    launch_s = found.context.profile.host.launch_s
    assert part_s - launch_s == pytest.approx((whole_s - launch_s) / 4)
    host = found.nodes(ir.HOST_GROUPED)[0]
    assert prediction.work[host].resource == "host"
    assert prediction.work[host].seconds >= part_s


def test_the_verifier_takes_it() -> None:
    for host in (0, 3, 8):
        found = mixture(host, 2)
        for stage in (carry_prefetches, measure_memory):
            found.apply(stage)
        found.context = replace(found.context, residency=None)
        check_parts(found.module.graph)
        assert found.context.effects is not None
        verify(found.module, replace(found.context, residency=mixture(host, 2).context.residency))


def test_ends_that_are_given_are_read_where_they_lie() -> None:
    """And no mirror of them is brought up to date in each step."""
    found = mixture(2, 3)
    (ends,) = {grouped_part(part).ends for part in found.nodes(ir.PARTIAL_GROUPED)}
    assert ends.op == "placeholder"
    assert ends not in {node.args[0] for node in found.nodes(ir.MIRROR)}


def test_a_part_issues_a_launch_for_each_expert() -> None:
    found = mixture(2, 3)
    counted = [launches_of(part, found.module) for part in found.nodes(ir.PARTIAL_GROUPED)]
    assert counted == [1 + 3] * 4, "and zeros that they are written over"


def test_parts_are_issued_when_all_gates_are_open() -> None:
    """How many tokens an expert has differs from step to step, so what is issued is new."""

    def behind_a_trip(x: Tensor, ends: Tensor) -> Any:
        h = MIXTURE.before(MIXTURE.before(x).relu())
        found: Tensor = torch.ops.transformers.grouped_mm_fallback(h, MIXTURE.up.transpose(-2, -1), offs=ends)
        return found

    experts = in_chunks(0, 4)
    found = scheduled(behind_a_trip, X, ENDS, plan=halves, experts=experts, ring_bytes=2**18, profile=gated())
    found.apply(issue_ahead)
    nodes = list(found.module.graph.nodes)
    first = min(map(nodes.index, found.nodes(ir.PARTIAL_GROUPED)))
    sent = [node for node in nodes if node.target == ir.TO_ACCELERATOR and info(node).ahead]
    caught = [nodes.index(node) for node in found.nodes(ir.CAUGHT_UP) if node.args[0] is sent[-1]]
    (waited,) = (nodes.index(user) for user in sent[-1].users if user.target == ir.WAIT_ACCELERATOR)
    assert [waited < place < first for place in caught] == [True]


# ---- changed schedules -----------------------------------------------------------------------------------------


def last(found: Case, target: Any) -> fx.Node:
    node: fx.Node = found.nodes(target)[-1]
    return node


def fewer_on_the_host(found: Case) -> None:
    last(found, ir.HOST_GROUPED).update_arg(3, 1)


def more_on_the_host(found: Case) -> None:
    last(found, ir.HOST_GROUPED).update_arg(3, 3)


def other_experts(found: Case) -> None:
    last(found, ir.PREFETCH).update_arg(1, [4, 7])


def other_start(found: Case) -> None:
    last(found, ir.PARTIAL_GROUPED).update_arg(4, 4)


def what_came_before_is_dropped(found: Case) -> None:
    last(found, ir.PARTIAL_GROUPED).update_arg(3, None)


def another_products_part(found: Case) -> None:
    last(found, ir.PARTIAL_GROUPED).update_arg(3, found.nodes(ir.PARTIAL_GROUPED)[0])


def joins_the_first_part(found: Case) -> None:
    first, last_part = found.nodes(ir.PARTIAL_GROUPED)[-2:]
    join = found.nodes(ir.JOIN)[-1]
    join.update_arg(0, [first if one is last_part else one for one in join.args[0]])


def joins_without_the_host(found: Case) -> None:
    join = found.nodes(ir.JOIN)[-1]
    join.update_arg(0, join.args[0][1:])


def joins_side_by_side(found: Case) -> None:
    found.nodes(ir.JOIN)[-1].update_arg(1, 0)


def host_reads_the_other_stack(found: Case) -> None:
    first, second = found.nodes(ir.HOST_GROUPED)
    second.update_arg(1, first.args[1])


def stored_otherwise(found: Case) -> None:
    last(found, ir.PARTIAL_GROUPED).update_arg(5, 0)


def read_by_something_else(found: Case) -> None:
    first, join = found.nodes(ir.PARTIAL_GROUPED)[0], found.nodes(ir.JOIN)[-1]
    join.update_arg(0, [*join.args[0], first])


def of_other_activations(found: Case) -> None:
    last(found, ir.PARTIAL_GROUPED).update_arg(0, found.nodes(ir.PARTIAL_GROUPED)[0].args[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (joins_the_first_part, r"is not what is put together in join"),
        (joins_without_the_host, r"is not what is put together in join"),
        (joins_side_by_side, r"is not what is put together in join"),
        (
            host_reads_the_other_stack,
            r"uses elements of .* that .* uses as well|are parts of one product, but of other",
        ),
        (stored_otherwise, r"are parts of one product, but of other operands"),
        (of_other_activations, r"are parts of one product, but of other operands"),
        (fewer_on_the_host, r"8192 elements of .* are used by no part"),
        (more_on_the_host, r"uses elements of .* that .* uses as well"),
        (other_experts, r"is the part from 5 on, but reads 4:7 of .*missing edge: a prefetch from 5 on"),
        (other_start, r"is the part from 4 on, but reads 5:8 of "),
        (what_came_before_is_dropped, r"adds to None, so that what .* makes is lost"),
        (another_products_part, r"so that what .* makes is lost|which .* writes over"),
        (read_by_something_else, r"join.* reads partial_grouped.*, which partial_grouped.* writes over"),
    ],
)
def test_changed_parts(change: Callable[[Case], None], message: str) -> None:
    found = mixture(2, 3)
    check_parts(found.module.graph)
    change(found)
    with pytest.raises(ScheduleError, match=message):
        check_parts(found.module.graph)
