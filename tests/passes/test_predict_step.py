"""The simulated step: what each node occupies, and how the seconds add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile import ir
from hetegen_compile.cost_model import (
    RateCurve,
    accelerator_linear_s,
    download_s,
    host_linear_s,
    link_lost_s,
    read_up_s,
    upload_s,
)
from hetegen_compile.ir import info
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.predict_step import predict_step
from tests.passes.graphs import PROFILE, Case, halves, least_s, on_host, quarters, resident, scheduled, streamed

LAYERS = nn.ModuleList([nn.Linear(256, 256, bias=False) for _ in range(4)])
X = torch.randn(1, 256)


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


def predicted(plan: Callable[[int], LinearPlan], **changes: Any) -> tuple[Case, Prediction]:
    found = scheduled(chain, X, plan=plan, **changes)
    return found, predict_step(found.module, found.context)


@pytest.mark.parametrize("plan", [halves, on_host, streamed, resident, quarters])
def test_a_step_is_between_its_bounds(plan: Callable[[int], LinearPlan]) -> None:
    found, prediction = predicted(plan)
    work = prediction.work.values()
    assert least_s(prediction) <= prediction.step_s * (1 + 1e-12)
    assert prediction.step_s == max(prediction.end_s.values())
    for resource, busy_s in prediction.busy_s.items():
        assert busy_s <= prediction.step_s * (1 + 1e-12)
        if resource != "host":  # the host also issues
            assert busy_s == pytest.approx(sum(w.seconds for w in work if w.resource == resource))
    computing = [n for n in found.module.graph.nodes if n.op not in ("placeholder", "output")]
    assert set(prediction.work) == set(prediction.start_s) == set(prediction.end_s) == set(computing)


def test_a_node_starts_after_what_it_reads() -> None:
    _, prediction = predicted(quarters)
    for node, start_s in prediction.start_s.items():
        for operand in node.all_input_nodes:
            if operand in prediction.end_s:
                assert prediction.end_s[operand] <= start_s + 1e-12


def test_each_operation_occupies_its_resource_for_the_cost_models_time() -> None:
    found, prediction = predicted(quarters)
    quarter = 64 * 256 * 4
    flops = 2.0 * 64 * 256
    for node, work in prediction.work.items():
        if node.target == ir.PREFETCH:
            assert (work.resource, work.seconds) == ("up", upload_s(PROFILE, quarter))
        elif node.target == ir.PARTIAL_LINEAR:
            seconds = accelerator_linear_s(PROFILE, "float32", 1, quarter, flops)
            assert (work.resource, work.seconds) == ("accelerator", seconds)
        elif node.target == ir.HOST_LINEAR:
            assert work.resource == "host"
            assert work.seconds >= host_linear_s(PROFILE, "float32", 1, quarter, flops)
        elif node.target == ir.TO_HOST:
            assert (work.resource, work.seconds) == ("down", download_s(PROFILE, value_bytes(node, found.context)))
        elif node.target == ir.WAIT_HOST:
            assert (work.resource, work.seconds) == ("host", PROFILE.synchronise_s)
        elif node.target in (ir.WAIT, ir.RELEASE, ir.RESIDENT, ir.MIRROR):
            assert work.seconds == 0.0


def test_a_split_costs_its_measured_fixed_time_in_all() -> None:
    found, prediction = predicted(on_host)
    host, trip = 0.0, 0.0
    for node, work in prediction.work.items():
        if node.target == ir.HOST_LINEAR:
            host = work.seconds
        elif node.target == ir.TO_ACCELERATOR:
            trip = work.seconds
    bare = host_linear_s(PROFILE, "float32", 1, 256 * 256 * 4, 2.0 * 256 * 256)
    trip += PROFILE.link.down.latency_s + PROFILE.synchronise_s
    bytes_s = read_up_s(PROFILE, 256 * 4) - PROFILE.link.view_s
    assert host - bare + trip == pytest.approx(PROFILE.fixed_s_per_split + bytes_s)
    assert len(found.nodes(ir.HOST_LINEAR)) == len(LAYERS)


@pytest.mark.parametrize(("rows", "resource"), [(1, "accelerator"), (ir.SMALL_UPLOAD_BYTES // 1024 + 1, "up")])
def test_small_results_are_read_in_place_and_large_ones_are_copied(rows: int, resource: str) -> None:
    found = scheduled(lambda x: LAYERS[0](x), torch.randn(rows, 256), plan=on_host)
    (up,) = found.nodes(ir.TO_ACCELERATOR)
    work = node_work(up, found.context)
    assert work.resource == resource
    expected = read_up_s(PROFILE, rows * 1024) if resource == "accelerator" else upload_s(PROFILE, rows * 1024)
    assert work.seconds == expected


def test_a_join_of_one_part_is_free() -> None:
    found, prediction = predicted(streamed)
    assert all(prediction.work[join].seconds == 0.0 for join in found.nodes(ir.JOIN))
    found, prediction = predicted(halves)
    assert all(prediction.work[join].seconds > 0.0 for join in found.nodes(ir.JOIN))


def test_what_streams_everything_takes_as_long_as_the_link() -> None:
    _, prediction = predicted(streamed)
    link = len(LAYERS) * upload_s(PROFILE, 256 * 256 * 4)
    assert prediction.busy_s["up"] == pytest.approx(link)
    assert link <= prediction.step_s


def test_a_slower_link_delays_only_plans_that_use_it() -> None:
    slow_up = replace(PROFILE.link.up, pinned=RateCurve.constant(1e6))
    slow = replace(PROFILE, link=replace(PROFILE.link, up=slow_up))
    for plan, delayed in ((streamed, True), (halves, True), (resident, False)):
        before, after = (predicted(plan, profile=profile)[1].step_s for profile in (PROFILE, slow))
        assert (after > 2 * before) is delayed


def test_beside_a_link_that_works_all_the_time_a_step_takes_what_it_does_without() -> None:
    slow, at_once = (
        replace(PROFILE, link=replace(PROFILE.link, up=replace(PROFILE.link.up, pinned=RateCurve.constant(rate))))
        for rate in (1e7, 1e18)
    )
    for plan in (streamed, halves):
        _, prediction = predicted(plan, profile=slow)
        assert predicted(plan, profile=at_once)[1].step_s <= prediction.beside_link_s < 0.5 * prediction.step_s
    for plan in (resident, on_host):
        _, prediction = predicted(plan)
        assert prediction.beside_link_s == prediction.step_s


@pytest.mark.parametrize(("rate", "all_beside"), [(1e7, [False, False, False]), (1e12, [False, True, True])])
def test_the_link_loses_time_to_a_host_that_reads(rate: float, all_beside: list[bool]) -> None:
    """What that costs is in proportion to the rows on the host, up to all of the link's time beside it."""
    up = replace(PROFILE.link.up, pinned=RateCurve.constant(rate), latency_s=0.0)
    link = replace(PROFILE.link, up=up)
    shared = replace(PROFILE, link=replace(link, contention=0.5))
    found = []
    for plan, host_share in ((streamed, 0.0), (quarters, 0.25), (halves, 0.5)):
        alone_s = predicted(plan, profile=replace(PROFILE, link=link))[1].busy_s["up"]
        lost_s = link_lost_s(shared, "float32", len(LAYERS) * host_share * 256 * 256 * 4)
        prediction = predicted(plan, profile=shared)[1]
        assert prediction.busy_s["up"] == pytest.approx(min(2 * alone_s, alone_s + lost_s))
        found.append(2 * alone_s < alone_s + lost_s)
    assert found == all_beside


def test_resident_weights_are_the_fastest_plan() -> None:
    steps = {plan.__name__: predicted(plan)[1].step_s for plan in (resident, streamed, halves, on_host)}
    assert min(steps, key=steps.__getitem__) == "resident"


def test_a_ring_of_one_slot_is_not_faster_than_one_of_many() -> None:
    chunk = 256 * 256 * 4
    one, many = (predicted(streamed, ring_bytes=count * chunk)[1].step_s for count in (1, 4))
    assert many < one


def test_nodes_know_their_work_by_themselves() -> None:
    found, prediction = predicted(quarters)
    assert all(node_work(node, found.context) == work for node, work in prediction.work.items())
    assert {work.resource for work in prediction.work.values()} == {"host", "accelerator", "up", "down"}
    assert all(info(node).side for node in prediction.work if node.op == "call_module")
