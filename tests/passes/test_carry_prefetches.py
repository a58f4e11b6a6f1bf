"""Prefetches that one step starts for the next: the graph, what is left alone, the simulation, the verifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from hetegen_compile.cost_model import HardwareProfile, RateCurve, load_profile, preset_names, upload_s
from hetegen_compile.errors import HetegenError, MissingWaitError, ScheduleError, SlotInUseError
from hetegen_compile.ir import (
    CARRIED,
    HOST_LINEAR,
    LINEAR,
    PREFETCH,
    PREFETCH_AHEAD,
    RELEASE,
    SMALL_UPLOAD_BYTES,
    STAGE,
    TO_ACCELERATOR,
    info,
)
from hetegen_compile.passes.carry_prefetches import carry_prefetches
from hetegen_compile.passes.context import require
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.passes.insert_transfers import insert_transfers
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.schedule import schedule
from hetegen_compile.passes.sources import source_name
from hetegen_compile.passes.split_linears import split_linears
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import (
    PROFILE,
    Case,
    again,
    halves,
    least_s,
    on_host,
    planned,
    quarters,
    resident,
    scheduled,
    streamed,
)
from tests.passes.test_schedule import looked_up

WIDTH = 64
SLOT = WIDTH * WIDTH * 4
LAYERS = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])
MANY = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(6)])
X = torch.randn(1, WIDTH)


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


def long_chain(x: Tensor) -> Tensor:
    for layer in MANY:
        x = layer(x).relu()
    return x


def variant(base: Case, plan: Callable[[int], LinearPlan], slots: float, profile: HardwareProfile = PROFILE) -> Case:
    """A planned case scheduled with another split, a ring of so many whole weights, and other hardware."""
    residency = replace(require(base.context.residency, ""), ring_bytes=int(slots * SLOT))
    splits = {position: plan(WIDTH) for position in require(base.context.splits, "")}
    found = again(base, residency=residency, splits=splits, profile=profile)
    for stage in (split_linears, insert_transfers, schedule):
        found.apply(stage)
    return found


@pytest.fixture(scope="module")
def base() -> Case:
    """Six Linears before they are split."""
    return planned(long_chain, X)


def carrying(function: Callable[..., Any], *inputs: Tensor, **changes: Any) -> Case:
    found = scheduled(function, *inputs, **changes)
    found.apply(carry_prefetches)
    return found


def order(found: Case) -> dict[fx.Node, int]:
    return {node: position for position, node in enumerate(found.module.graph.nodes)}


# ---- the rewrite ---------------------------------------------------------------------------------------------


def test_the_first_slots_are_filled_again_behind_their_last_readers() -> None:
    found = carrying(chain, X, plan=streamed, ring_bytes=2 * SLOT)
    assert found.text.splitlines() == [
        "t1 = mirror(x)",
        "t2 = carried(LAYERS.0.weight, [0, 64], 0, 0)",
        "t3 = carried(LAYERS.1.weight, [0, 64], 0, 16384)",
        "t4 = wait(t2)",
        "t5 = partial_linear(t1, t4, None, 0, 64, 0)",
        "t6 = release(t2)",
        "t7 = prefetch(LAYERS.2.weight, [0, 64], 0, 0, [t6])",
        "t8 = join([t5], 0)",
        "t9 = segment_1(t8)",
        "t10 = t9[0]",
        "t11 = wait(t3)",
        "t12 = partial_linear(t10, t11, None, 0, 64, 0)",
        "t13 = release(t3)",
        "t14 = join([t12], 0)",
        "t15 = segment_2(t14)",
        "t16 = t15[0]",
        "t17 = wait(t7)",
        "t18 = partial_linear(t16, t17, None, 0, 64, 0)",
        "t19 = release(t7)",
        "t20 = prefetch_ahead(LAYERS.0.weight, [0, 64], 0, 0, [t19])",
        "t21 = prefetch_ahead(LAYERS.1.weight, [0, 64], 0, 16384, [t13])",
        "t22 = join([t18], 0)",
        "t23 = segment_3(t22)",
        "t24 = t23[0]",
        "t25 = to_host([t24])",
        "t26 = wait_host(t25)",
        "t27 = t26[0]",
        "return (t27,)",
    ]
    verify(found.module, found.context)


def test_a_slot_whose_bytes_became_two_waits_for_both() -> None:
    """The first slot is as long as the two that lie in its bytes at the end."""
    wide, narrow = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def function(x: Tensor) -> Tensor:
        y: Tensor = LAYERS[1](LAYERS[0](narrow(wide(x).relu()).relu()).relu())
        return y

    found = carrying(function, X, plan=streamed, ring_bytes=4 * SLOT)
    first = found.nodes(PREFETCH_AHEAD)[0]
    assert first.args[4] == found.nodes(RELEASE)[-2:]
    verify(found.module, found.context)


def test_if_all_slots_fit_the_ring_all_are_carried() -> None:
    found = carrying(long_chain, X, plan=halves)
    assert len(found.nodes(CARRIED)) == len(found.nodes(PREFETCH_AHEAD)) == len(MANY)
    assert not found.nodes(PREFETCH)
    pairs = zip(found.nodes(CARRIED), found.nodes(PREFETCH_AHEAD), strict=True)
    assert all(one.args == other.args[:4] for one, other in pairs)
    verify(found.module, found.context)


def test_prefetches_behind_a_prompt_that_goes_up_first_are_carried_too() -> None:
    found = carrying(looked_up, torch.arange(1100), plan=halves, ring_bytes=1 << 24)
    place = order(found)
    assert place[found.nodes(TO_ACCELERATOR)[0]] < place[found.nodes(CARRIED)[0]]
    assert len(found.nodes(CARRIED)) == len(found.nodes(PREFETCH_AHEAD)) == 4
    verify(found.module, found.context)


@pytest.mark.parametrize(("slower", "carried"), [(1.0, 4), (2.0, 2), (3.0, 1), (20.0, 0)])
def test_no_more_are_carried_than_the_link_has_time_for_before_a_prompt_goes_up(
    slower: float, carried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them would keep it from going up for as long as they take."""
    up = PROFILE.link.up
    slow = replace(up, pinned=RateCurve(tuple((size, rate / slower) for size, rate in up.pinned.points)))
    where = {"plan": streamed, "ring_bytes": 1 << 24, "profile": replace(PROFILE, link=replace(PROFILE.link, up=slow))}
    found = carrying(looked_up, torch.arange(1100), **where)
    assert len(found.nodes(CARRIED)) == len(found.nodes(PREFETCH_AHEAD)) == carried
    verify(found.module, found.context)
    if carried == 4:
        return
    steady = found.apply(predict_step)
    (sent,) = found.nodes(TO_ACCELERATOR)
    made_s = max(steady.end_s[node] for node in sent.all_input_nodes)
    one_s = max(steady.work[node].seconds for node in found.nodes(PREFETCH))
    assert steady.start_s[sent] - made_s <= one_s / 2
    monkeypatch.setattr("hetegen_compile.passes.carry_prefetches.large_uploads", lambda nodes, context: [])
    every = carrying(looked_up, torch.arange(1100), **where)
    assert len(every.nodes(CARRIED)) == 4
    assert steady.step_s < every.apply(predict_step).step_s


@pytest.mark.parametrize("plan", [halves, quarters, streamed])
def test_the_scheduled_graph_computes_what_it_did(plan: Callable[[int], LinearPlan]) -> None:
    found = carrying(long_chain, X, plan=plan, ring_bytes=2 * SLOT)
    assert found.nodes(CARRIED)
    with torch.no_grad():
        torch.testing.assert_close(found.outputs(), (long_chain(X),))


def test_copies_for_the_next_step_are_behind_whatever_this_step_sends_up() -> None:
    """A host part's result that is not small goes through the same queue."""
    rows = SMALL_UPLOAD_BYTES // (WIDTH // 2 * 4) + 1
    x = torch.randn(rows, WIDTH)
    found = carrying(long_chain, x, plan=halves)
    place = order(found)
    uploads, ahead = found.nodes(TO_ACCELERATOR), found.nodes(PREFETCH_AHEAD)
    assert len(found.nodes(HOST_LINEAR)) == len(uploads) == 6
    assert max(place[node] for node in uploads) < min(place[node] for node in ahead)
    small = carrying(long_chain, X, plan=halves)
    place = order(small)
    ahead = small.nodes(PREFETCH_AHEAD)
    assert min(place[node] for node in ahead) < max(place[node] for node in small.nodes(TO_ACCELERATOR))


# ---- left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [on_host, resident])
def test_a_graph_that_streams_nothing_stays_as_it_is(plan: Callable[[int], LinearPlan]) -> None:
    found = scheduled(chain, X, plan=plan)
    before = found.text
    found.apply(carry_prefetches)
    assert found.text == before
    assert found.refusals == []


def test_weights_that_go_through_the_pinned_ring() -> None:
    base = planned(chain, X)
    names = {info(node).position: node.args[1].name for node in base.nodes(LINEAR)}
    found = carrying(chain, X, plan=streamed, staged={min(names.values()): "a test"})
    assert found.nodes(STAGE)
    assert not found.nodes(CARRIED)
    assert len(found.reasons()) == 1
    assert "pinned ring" in found.reasons()[0]


def test_a_weight_that_the_step_writes_is_not_carried() -> None:
    def function(x: Tensor) -> Tensor:
        y = chain(x)
        next(LAYERS[0].parameters()).add_(1.0)
        return y

    with torch.no_grad():
        found = carrying(function, X, plan=streamed)
    assert [str(source_name(node.args[0]))[-8:] for node in found.nodes(CARRIED)] == ["1.weight", "2.weight"]


# ---- the simulated step --------------------------------------------------------------------------------------


def both(found: Case) -> tuple[Prediction, Prediction]:
    """The predictions without and with prefetches for the next step."""
    other = again(found)
    other.apply(carry_prefetches)
    assert other.nodes(CARRIED)
    return predict_step(found.module, found.context), predict_step(other.module, other.context)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("plan", [halves, quarters, streamed])
def test_the_steady_step_is_never_longer(base: Case, plan: Callable[[int], LinearPlan], name: str) -> None:
    for slots in (2, 3, 6):
        without, steady = both(variant(base, plan, slots, load_profile(name)))
        assert steady.step_s <= without.step_s * (1 + 1e-9)
        assert least_s(steady) <= steady.step_s * (1 + 1e-9)


def slow_link(name: str) -> HardwareProfile:
    """A preset whose copies take much longer than everything else of these tiny Linears."""
    profile = load_profile(name)
    up = replace(profile.link.up, latency_s=100 * profile.link.up.latency_s)
    return replace(profile, link=replace(profile.link, up=up))


@pytest.mark.parametrize("name", preset_names())
def test_where_the_link_is_the_bottleneck_the_first_copies_are_saved(base: Case, name: str) -> None:
    """The link works without a pause: a steady step takes what its copies take."""
    found = variant(base, streamed, 3, slow_link(name))
    without, steady = both(found)
    assert steady.step_s == pytest.approx(steady.busy_s["up"])
    assert steady.busy_s["up"] == pytest.approx(6 * upload_s(found.context.profile, SLOT))
    assert steady.step_s < without.step_s


@settings(deadline=None, max_examples=20)
@given(
    rings=st.integers(2, 8),
    share=st.integers(0, 3),
    chunk=st.sampled_from([16, 32, 64]),
    launch_us=st.floats(0.0, 50.0),
    preset=st.sampled_from(preset_names()),
)
def test_any_ring_and_split(base: Case, rings: int, share: int, chunk: int, launch_us: float, preset: str) -> None:
    def plan(rows: int) -> LinearPlan:
        host = share * 16
        edges = [*range(host, rows, chunk), rows]
        return LinearPlan(rows, host, tuple(zip(edges, edges[1:], strict=False)), None)

    profile = load_profile(preset)
    profile = replace(profile, accelerator=replace(profile.accelerator, launch_s=launch_us * 1e-6))
    found = variant(base, plan, rings * chunk / WIDTH, profile)
    without, steady = both(found)
    found.apply(carry_prefetches)
    verify(found.module, found.context)
    assert steady.step_s <= without.step_s * (1 + 1e-9)


def test_intervals_are_those_of_the_second_step(base: Case) -> None:
    found = variant(base, streamed, 3, slow_link("rtx4090-desktop"))
    found.apply(carry_prefetches)
    steady = predict_step(found.module, found.context)
    copy_s = upload_s(found.context.profile, SLOT)
    assert set(steady.start_s) == set(steady.end_s) == set(steady.work)
    assert all(steady.start_s[node] >= 0.0 for node in steady.start_s)
    first, last = found.nodes(CARRIED)[0], found.nodes(PREFETCH_AHEAD)[-1]
    assert steady.end_s[first] - steady.start_s[first] < copy_s  # what falls into the step
    assert steady.end_s[last] > steady.step_s  # nobody waits for it
    for node in steady.start_s:
        for operand in node.all_input_nodes:
            assert steady.end_s.get(operand, 0.0) <= steady.start_s[node] + 1e-12


# ---- the verifier --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good() -> Case:
    return carrying(long_chain, X, plan=halves, ring_bytes=3 * SLOT // 2)


def check(found: Case, error: type[HetegenError], message: str) -> None:
    with pytest.raises(error, match=message):
        verify(found.module, found.context)


def test_the_good_graph_is_valid(good: Case) -> None:
    verify(good.module, good.context)
    assert [len(good.nodes(target)) for target in (CARRIED, PREFETCH, PREFETCH_AHEAD)] == [3, 3, 3]


@pytest.mark.parametrize("i", range(3))
def test_a_copy_for_the_next_step_that_does_not_wait_for_a_release(good: Case, i: int) -> None:
    found = again(good)
    found.nodes(PREFETCH_AHEAD)[i].update_arg(4, [])
    check(found, SlotInUseError, "overwrites the slot of prefetch.* without waiting for its release")


def test_a_copy_that_nobody_takes_over(good: Case) -> None:
    found = again(good)
    node = found.nodes(CARRIED)[0]
    with found.module.graph.inserting_before(node):
        other = found.module.graph.call_function(PREFETCH, (*node.args, []))
    other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    found.module.graph.erase_node(node)
    check(found, ScheduleError, f"comes from the step before, but a slot is filled first; .* -> {other.name}")


@pytest.mark.parametrize("i", range(3))
def test_a_copy_that_is_not_started(good: Case, i: int) -> None:
    found = again(good)
    found.module.graph.erase_node(found.nodes(PREFETCH_AHEAD)[i])
    check(found, ScheduleError, "carried.* is carried over the end of the step on one side only")


def test_a_copy_of_other_rows(good: Case) -> None:
    found = again(good)
    found.nodes(PREFETCH_AHEAD)[1].update_arg(1, [0, 32])
    check(found, ScheduleError, r"(prefetch_ahead|carried)\w*_1 .*on one side only")


def test_a_prefetch_behind_the_copies_for_the_next_step(good: Case) -> None:
    found = again(good)
    last, ahead = found.nodes(PREFETCH)[-1], found.nodes(PREFETCH_AHEAD)[0]
    last.prepend(ahead)
    ahead.update_arg(4, [node for node in found.nodes(RELEASE) if order(found)[node] < order(found)[last]])
    check(found, SlotInUseError, f"{ahead.name} .*overwrites the slot")


def test_a_reader_of_the_copy_for_the_next_step(good: Case) -> None:
    found = again(good)
    part = found.nodes(PREFETCH_AHEAD)[0]
    output = next(iter(reversed(found.module.graph.nodes)))
    output.args = ((*output.args[0], part),)
    check(found, MissingWaitError, f"output uses {part.name} .*the next step")


@pytest.mark.parametrize("i", range(3))
def test_a_carried_transfer_needs_its_release(good: Case, i: int) -> None:
    found = again(good)
    node = found.nodes(CARRIED)[i]
    release = next(user for user in node.users if user.target == RELEASE)
    for user in list(release.users):
        user.update_arg(4, [token for token in user.args[4] if token is not release])
    found.module.graph.erase_node(release)
    assert info(node).side is not None
    check(found, ScheduleError, rf"{node.name} .*has 0 release")
