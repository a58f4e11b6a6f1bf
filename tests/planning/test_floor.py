"""The floor: no simulated step is below it, and a good one is close to it."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hetegen_compile.cost_model import RateCurve, RateTable, download_s
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.choose_splits import (
    block_splits,
    choose_splits,
    linears_of,
    pairable_blocks,
    with_host_rows,
)
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.plans import LinearPlan, Splits
from hetegen_compile.passes.schedule import PINNED_WINDOW
from hetegen_compile.planning.floor import Floor, floor, floor_s, offloaded_together_s
from hetegen_compile.planning.planned import BucketPlan
from hetegen_compile.planning.trials import Trials
from tests.passes.graphs import PROFILE, halves, planned, resident, streamed
from tests.planning.floors import LAYERS, bounds, not_pairable, plan, with_residency

shares = st.lists(st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0, 1.0]), min_size=9, max_size=9)
kept = st.lists(st.sampled_from([0.0, 0.0, 0.4, 0.9, 1.0]), min_size=7, max_size=7) | st.just([0.0] * 7)


hardware = st.sampled_from(
    [
        "a10-xeon",
        "cpu-emulated",
        "h100-server",
        "h200-server, issuing is dear",
        "a10-xeon, the host slows the link",
        "a10-xeon, with gates",
    ]  # fmt: skip
)


cut = st.lists(st.sampled_from([None, 0.2, 0.6, 1.0]), min_size=3, max_size=3)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.sampled_from(["llama", "opt", "gptj", "phi"]), hardware, shares, kept, cut, st.sampled_from([0.2, 0.5, 1.0]))
def test_no_simulated_step_is_below_it(
    model_type: str, hardware: str, pattern: list[float], rows: list[float], blocks: list[float | None],
    ring_share: float,
) -> None:  # fmt: skip
    base = with_residency(plan(model_type, hardware), rows, ring_share)
    found: Splits = {}
    for i, node in enumerate(base.module.graph.find_nodes(op="call_function", target=LINEAR)):
        whole = with_host_rows(node, 0, base.context)
        host = int(pattern[i % len(pattern)] * (whole.rows - whole.resident_rows)) // 64 * 64
        found = {**found, info(node).position: with_host_rows(node, host, base.context)}
    linears = linears_of(base.module)
    for i, block in enumerate(pairable_blocks(linears, base.context)):
        share = blocks[i % len(blocks)]
        if share is not None:
            found = {**found, **block_splits(block, linears, int(share * block.columns) // 64 * 64, base.context)}
    bound = floor(base.module, replace(base.context, splits=found))
    assert bound == floor(base.module, base.context)  # of the residency, not of the shares
    assert 0 < bound.seconds <= Trials(base.module).step_s(base.context, found) * (1 + 1e-9)


# ---- the bounds one by one ---------------------------------------------------------------------------------------


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


@pytest.mark.parametrize("view_s", [PROFILE.link.view_s, 1e-6])
def test_rows_in_two_places_cost_a_join_at_least_and_reading_what_the_host_made_or_the_rows(view_s: float) -> None:
    x = torch.zeros(1, 1024)
    found = planned(not_pairable, x, plan=lambda rows: LinearPlan(rows, rows // 2, (), (rows // 2, rows)))
    whole = planned(not_pairable, x, plan=resident)
    context = replace(found.context, profile=replace(PROFILE, link=replace(PROFILE.link, view_s=view_s)))
    half_s, whole_s = floor(found.module, context).accelerator_s, bounds(not_pairable, whole).accelerator_s
    costs = require(found.context.costs, "annotate_costs")
    products_s = sum(costs[info(node).position].accelerator_s for node in found.nodes(LINEAR)) / 2
    launch_s = PROFILE.accelerator.launch_s
    read_s = min(view_s, launch_s + products_s / len(LAYERS))
    assert (read_s == view_s) == (view_s == 1e-6)
    assert half_s == pytest.approx(whole_s - products_s + len(LAYERS) * (launch_s + read_s))


def test_what_a_short_ring_does_not_hold_comes_behind_the_rest_of_the_path() -> None:
    """The last Linear is streamed, the others are resident: the link idles while they run, but for one ring."""
    table = nn.Linear(1024, 65536, bias=False)

    def function(x: Tensor) -> Any:
        for layer in LAYERS:
            x = layer(x).softmax(-1)
        return table(x).softmax(-1)

    def last(rows: int) -> LinearPlan:
        return streamed(rows) if rows == 65536 else resident(rows)

    x, sizes = torch.zeros(1, 1024), (2**20, 2**24, 2**28)
    found = [planned(function, x, plan=last, ring_bytes=nbytes) for nbytes in sizes]
    short, longer, whole = (bounds(function, one) for one in found)
    assert short.path_s - longer.path_s <= 1.01 * 15 * 2**20 / PROFILE.link.up.pinned.points[-1][1]
    assert short.path_s > longer.path_s >= whole.path_s
    assert short.bytes_s == whole.bytes_s


def test_what_comes_before_the_first_trip_is_on_the_path_beside_a_short_ring() -> None:
    table = nn.Linear(1024, 65536, bias=False)

    def found(function: Any) -> Floor:
        return bounds(function, planned(function, torch.zeros(1, 1024), plan=streamed, ring_bytes=2**20))

    def begun(x: Tensor) -> Any:
        for _ in range(4):
            y = x.T * x
            x = torch.matmul(y, y)[:1].softmax(-1)
        return table(x)

    longer, shorter = found(begun), found(lambda x: table(x))
    ring_s = 2**20 / PROFILE.link.up.pinned.points[-1][1]
    work_s = longer.accelerator_s - shorter.accelerator_s
    assert work_s > 5 * ring_s
    assert longer.path_s - shorter.path_s > work_s - 1.1 * ring_s


def test_what_is_pinned_ahead_may_lie_in_the_pinned_ring_as_well() -> None:
    """Its slots are no longer than the staging ring."""
    table = nn.Linear(1024, 65536, bias=False)

    def function(x: Tensor) -> Any:
        for layer in LAYERS:
            x = layer(x).softmax(-1)
        return table(x).softmax(-1)

    def path_s(ring_bytes: int, staged: dict[str, str]) -> float:
        found = planned(
            function, torch.zeros(1, 1024), ring_bytes=ring_bytes,
            plan=lambda rows: streamed(rows) if rows == 65536 else resident(rows),
        )  # fmt: skip
        profile = replace(PROFILE, pin_bytes_per_s=1e15)
        return floor(found.module, replace(found.context, staged=staged, profile=profile)).path_s

    staged = {"the table": "through the pinned ring"}
    assert path_s(2**20, staged) == pytest.approx(path_s((1 + PINNED_WINDOW) * 2**20, {}))
    assert path_s(2**20, staged) < path_s(2**20, {})


def beside(x: Tensor) -> Any:
    first, *others = (layer(x) for layer in LAYERS)
    return sum(others, first)


def test_bytes_are_shared_by_link_and_host() -> None:
    found = planned(chain, torch.zeros(1, 1024), plan=halves)
    costs = [found.context.costs[info(node).position] for node in found.nodes(LINEAR)]  # type: ignore[index]
    host_s, link_s = sum(c.host_s for c in costs), sum(c.link_s for c in costs)
    assert bounds(chain, found).bytes_s == pytest.approx(host_s * link_s / (host_s + link_s))
    assert offloaded_together_s(found.module, found.context) == pytest.approx(host_s * link_s / (host_s + link_s))


def test_resident_weights_leave_the_accelerators_own_work() -> None:
    found = planned(chain, torch.zeros(1, 1024), plan=resident)
    bound = bounds(chain, found)
    assert bound.bytes_s == 0.0
    down_s = PROFILE.link.down.latency_s + PROFILE.synchronise_s
    assert bound.seconds == bound.path_s == pytest.approx(bound.accelerator_s + down_s)


def test_linears_one_after_the_other_take_longer_than_beside_each_other() -> None:
    assert bounds(not_pairable).bytes_s == bounds(beside).bytes_s
    assert bounds(not_pairable).path_s > bounds(beside).path_s


def attention_beside_mlp(x: Tensor) -> Any:
    """Two ways from one activation to the next: the second Linear is not needed by the first or the third."""
    first, second, third, last = LAYERS
    return last((second(x).softmax(-1) + third(first(x).softmax(-1))).softmax(-1))


def test_what_the_accelerator_does_beside_the_path_counts() -> None:
    """Of two ways the path takes the longer one; the accelerator works on both."""
    found = planned(attention_beside_mlp, torch.zeros(1, 1024), plan=resident)
    bound = bounds(attention_beside_mlp, found)
    assert bound.path_s == pytest.approx(bound.accelerator_s)


def two_ways(x: Tensor) -> Any:
    """From one activation to the next one Linear, or two with an operation between them."""
    first, second, third, last = LAYERS
    x = x.softmax(-1)
    return last((second(x) + third(first(x).softmax(-1))).softmax(-1)).softmax(-1)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_host_has_the_parts_of_both_ways_one_after_the_other(*, ahead: bool) -> None:
    """Four parts and two trips with a link so slow that the host has all rows, and the result comes down.

    A worker sends up without a launch.
    """
    found = planned(two_ways, torch.zeros(1, 1024), plan=streamed, issue_ahead=ahead)
    points = tuple((size, rate * 1e-6) for size, rate in PROFILE.link.up.pinned.points)
    slow = replace(PROFILE.link, up=replace(PROFILE.link.up, pinned=RateCurve(points)))
    profile = replace(PROFILE, link=slow, synchronise_s=0.0, fixed_s_per_split=0.0)
    context = replace(found.context, profile=profile)
    segments = found.module.graph.find_nodes(op="call_module")
    begin, _, both, end = (node_work(segment, context).seconds for segment in segments)
    ways_s = 3 * download_s(profile, 4096) + 2 * (profile.accelerator.launch_s * (not ahead) + slow.view_s)
    bound = floor(found.module, context)
    assert bound.path_s == pytest.approx(bound.bytes_s + ways_s + begin + both + end)


def test_what_the_host_has_made_before_is_there() -> None:
    """A look-up goes up while the accelerator is busy, though it is read behind the host's parts."""
    table, (first, second, third, _) = nn.Embedding(4096, 1024), LAYERS
    busy, end = (nn.Linear(1024, 1024, bias=False) for _ in range(2))

    def function(x: Tensor, ids: Tensor) -> Any:
        looked_up, x = table(ids), busy(x.softmax(-1)).softmax(-1)
        for _ in range(40):
            square = x.T * x
            x = (square @ square)[:1].softmax(-1)
        y = second(x) + third(first(x).softmax(-1))
        return end((y + looked_up).softmax(-1).sum(0, keepdim=True).softmax(-1)).softmax(-1)

    inputs = torch.zeros(1, 1024), torch.zeros(1024, dtype=torch.int64)
    found = planned(function, *inputs, plan=streamed, issue_ahead=False, ring_bytes=1 << 22)
    linears = linears_of(found.module)
    before, *_, behind = linears.values()
    weights = {str(node.args[1]): 0 for node in (before, behind)}
    residency = replace(require(found.context.residency, "choose_residency"), weights=weights, chunk_bytes=1 << 21)
    context = replace(found.context, residency=residency)
    splits = {position: with_host_rows(node, 0, context) for position, node in linears.items()}
    _, _, beside, *_ = splits
    splits[beside] = with_host_rows(linears[beside], splits[beside].rows, context)
    assert floor_s(found.module, replace(context, splits=splits)) <= Trials(found.module).step_s(context, splits)


def test_a_step_begins_with_a_look_up_and_its_way_up() -> None:
    table = nn.Embedding(64, 1024)

    def looked_up(ids: Tensor) -> Any:
        return LAYERS[0](table(ids).softmax(-1))

    found = planned(looked_up, torch.zeros(1, dtype=torch.int64), plan=resident)
    bound = floor(found.module, found.context)
    assert bound.path_s >= bound.accelerator_s + PROFILE.host.launch_s + PROFILE.link.view_s


def test_small_parts_that_are_read_faster_lower_it() -> None:
    found = planned(chain, torch.zeros(1, 1024), plan=streamed)
    slow = PROFILE.host.linear_bytes_per_s["float32"].at(1, 1e9)
    curves = ((1e5, RateCurve.constant(2 * slow)), (1e9, RateCurve.constant(slow)))
    tables = {**PROFILE.host.linear_bytes_per_s, "float32": RateTable(curves)}
    profile = replace(PROFILE, host=replace(PROFILE.host, linear_bytes_per_s=tables))
    cached = replace(found.context, profile=profile)
    assert floor_s(found.module, cached) < floor_s(found.module, found.context)


@pytest.mark.parametrize("hardware", ["a10-xeon", "h200-server", "h200-server, issuing is dear"])
def test_a_link_that_the_host_hardly_slows_has_hardly_another_floor(hardware: str) -> None:
    base = plan("llama", hardware)
    link = replace(base.context.profile.link, contention=0.999)
    for share in (0.0, 0.9, 1.0):
        found = with_residency(base, [share], 0.5)
        slowed = replace(found.context, profile=replace(found.context.profile, link=link))
        expected = floor(found.module, found.context)
        assert astuple(floor(found.module, slowed)) == pytest.approx(astuple(expected), rel=0.01)


def test_a_link_that_the_host_slows_is_slow_while_the_host_computes() -> None:
    """In proportion: a few rows on the host cost little, and a machine whose host can do nothing has the whole link."""
    slowed, free = (plan("llama", name) for name in ("a10-xeon, the host slows the link", "a10-xeon"))
    longer = [
        step_s / alone_s
        for step_s, alone_s in (
            [
                Trials(base.module).step_s(base.context, choose_splits(base.module, context_with(base, split)))
                for base in (slowed, free)
            ]
            for split in (0.0, 0.02, 0.3)
        )
    ]
    assert longer[0] == pytest.approx(1.0, rel=0.01)
    assert longer[0] <= longer[1] < 1.03
    assert longer[2] > 1.1
    together_s = offloaded_together_s(slowed.module, slowed.context)
    assert together_s > 1.1 * offloaded_together_s(free.module, free.context)
    assert floor(slowed.module, slowed.context).bytes_s == pytest.approx(together_s, rel=0.01)
    nothing = replace(slowed.context.profile.host, contention=1e-3)
    idle, alone = (replace(one.context, profile=replace(one.context.profile, host=nothing)) for one in (slowed, free))
    assert floor(slowed.module, idle).seconds == pytest.approx(floor(free.module, alone).seconds, rel=0.01)


@pytest.mark.parametrize("flops_per_s", [1e12, 2e12, 4e12])
def test_what_the_host_reads_may_cost_the_link_time_long_before(flops_per_s: float) -> None:
    """The simulation makes all prefetches longer by the same: those of layers, too, behind which a table is read."""
    width, rows = 1024, 32768
    layers = [nn.Linear(width, width, bias=False) for _ in range(8)]
    head = nn.Linear(width, rows, bias=False)

    def function(x: Tensor) -> Tensor:
        for layer in layers:
            y = layer(x)
            y = y.T * y
            x = torch.matmul(y, y)[:1].softmax(-1)
        result: Tensor = head(x).softmax(-1)
        return result

    accelerator = replace(PROFILE.accelerator, flops_per_s=dict.fromkeys(PROFILE.accelerator.flops_per_s, flops_per_s))
    profile = replace(PROFILE, link=replace(PROFILE.link, contention=0.5), accelerator=accelerator)
    found = planned(function, torch.zeros(1, width), plan=streamed, ring_bytes=1 << 25, profile=profile)
    residency = replace(require(found.context.residency, "choose_residency"), chunk_bytes=1 << 22)
    context = replace(found.context, residency=residency)
    linears = linears_of(found.module)
    (last,) = (position for position, node in linears.items() if with_host_rows(node, 0, context).rows == rows)
    steps = []
    for sixteenths in range(7, 11):
        splits = {position: with_host_rows(node, 0, context) for position, node in linears.items()}
        splits[last] = with_host_rows(linears[last], rows * sixteenths // 16, context)
        steps.append(Trials(found.module).step_s(context, splits))
    bound = floor(found.module, context)
    assert bound.seconds <= min(steps) <= 1.1 * bound.seconds
    assert bound.bound == "path"


def context_with(base: BucketPlan, split: float) -> Context:
    return replace(base.context, options=replace(base.context.options, split=split), splits=None)
