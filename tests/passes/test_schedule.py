"""The issue order and the slots: what runs by itself first, and no slot is overwritten while it is read."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from hetegen_compile import ir
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import HOST_LINEAR, PREFETCH, RELEASE, TO_HOST, WAIT, info
from hetegen_compile.passes.choose_residency import SLOT_ALIGNMENT
from hetegen_compile.passes.insert_transfers import insert_transfers
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.schedule import schedule, slot_bytes, task_graph
from hetegen_compile.passes.split_linears import split_linears
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import (
    Case,
    assert_equal_to_eager,
    halves,
    on_host,
    planned,
    property_test,
    quarters,
    scheduled,
    streamed,
)
from tests.passes.test_group_segments import FUNCTIONS, A, C, X, static_cache, write_between

ROW = 64 * 4  # bytes of one row of A, B and C; also the alignment of slots
LAYERS = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(4)])


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


def order(found: Case) -> dict[fx.Node, int]:
    return {node: place for place, node in enumerate(found.module.graph.nodes)}


def test_prefetches_first_then_the_trip_down_then_the_accelerator_then_the_host() -> None:
    found = scheduled(lambda x: C(A(x + 1)), X, ring_bytes=2 * 32 * ROW)
    lines = [line.partition(" = ")[2] for line in found.text.splitlines() if "mirror" not in line]
    assert [line for line in lines if "wait" not in line and not line.endswith("[0]")][:8] == [
        "prefetch(A.weight, [32, 64], 0, 0, [])",
        "prefetch(C.weight, [32, 64], 0, 8192, [])",
        "segment_0(t3)",
        "to_host([t7])",
        "partial_linear(t7, t9, t1, 32, 64, 0)",
        "release(t4)",
        "host_linear(t13, A.weight, A.bias, 0, 32, 0)",
        "to_accelerator([t14])",
    ]


def test_a_slot_is_filled_again_after_its_release() -> None:
    found = scheduled(chain, X, plan=streamed, ring_bytes=2 * 64 * ROW)
    places = [(node.args[3], node.args[4]) for node in found.nodes(PREFETCH)]
    first, second = found.nodes(PREFETCH)[:2]
    releases = {node.args[0]: node for node in found.nodes(RELEASE)}
    assert places == [(0, []), (64 * ROW, []), (0, [releases[first]]), (64 * ROW, [releases[second]])]


def test_a_chunk_that_is_larger_than_the_ring_is_an_error() -> None:
    with pytest.raises(ScheduleError, match=r"prefetch\S* needs a slot of 16384 bytes; the ring has 16383"):
        scheduled(chain, X, plan=streamed, ring_bytes=64 * ROW - 1)


def test_prefetches_of_a_large_ring_come_before_everything_that_computes() -> None:
    found = scheduled(chain, X, plan=quarters)
    computing = [p for node, p in order(found).items() if node.target in (HOST_LINEAR, ir.PARTIAL_LINEAR, TO_HOST)]
    assert max(order(found)[node] for node in found.nodes(PREFETCH)) < min(computing)


WIDE = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(4)])
TABLE = nn.Embedding(8192, 1024)


def looked_up(ids: Tensor) -> Tensor:
    x: Tensor = TABLE(ids)
    for layer in WIDE:
        x = layer(x).relu()
    return x


def looked_up_by_positions(ids: Tensor) -> Tensor:
    """As OPT does: where a token stands is computed of a mask that the accelerator has."""
    mask = (ids > 3).float()
    return looked_up(mask.cumsum(-1).long()) * mask[..., None]


def looked_up_behind_a_linear(ids: Tensor) -> Tensor:
    return looked_up(WIDE[0](TABLE(ids[:1])).argmax() + ids)


@pytest.mark.parametrize(
    ("function", "tokens", "ring_bytes", "first"),
    [
        (looked_up, 1100, 1 << 24, True),
        (looked_up_by_positions, 1100, 1 << 24, True),
        (looked_up, 4, 1 << 24, False),  # so little that a kernel reads it
        (looked_up, 4000, 1 << 21, False),  # the ring is filled while the host looks up
        (looked_up_behind_a_linear, 1100, 1 << 24, False),
    ],
)
def test_a_prompt_goes_up_before_prefetches_that_it_would_queue_behind(
    function: Any, tokens: int, ring_bytes: int, first: bool
) -> None:
    found = scheduled(function, torch.arange(tokens), plan=halves, ring_bytes=ring_bytes)
    place = order(found)
    looks_up = [node for node in found.module.graph.nodes if node.target is torch.nn.functional.embedding][-1]
    (prompt,) = (place[node] for node in found.nodes(ir.TO_ACCELERATOR) if looks_up in node.all_input_nodes)
    prefetches = [place[node] for node in found.nodes(PREFETCH)]
    assert (prompt < min(prefetches)) == first
    parts = [place[node] for node in found.nodes(ir.TO_ACCELERATOR) if place[node] > prompt]
    assert min(parts) > min(prefetches), "what host parts make does not hold up the link"


@pytest.mark.parametrize(("keeps", "host_rows"), [(False, 0), (True, 0), (True, 1536)])
def test_what_a_late_layer_reads_does_not_go_up_first(keeps: bool, host_rows: int) -> None:
    """It may come of work whose place is behind a host part that was issued to complete something."""
    layers = [nn.Linear(1024, 1024, bias=False) for _ in range(7)]
    middle, behind = nn.Linear(1024, 1536, bias=False), nn.Linear(1536, 1024, bias=False)
    last = nn.Linear(1024, 1024, bias=False)
    table = nn.Embedding(8192, 1536)

    def function(ids: Tensor, cache: Tensor) -> Any:
        x, grown = TABLE(ids), []
        for layer in layers:
            x = layer(x).relu()
            grown += [torch.cat([cache, x], 0)] if keeps else []
        x = middle(x) + table((ids > 3).float().cumsum(-1).long())
        return (last(behind(x).relu()).relu(), *grown)

    found = scheduled(
        function, torch.arange(1100), torch.zeros(5, 1024), ring_bytes=1 << 25,
        plan=lambda rows: on_host(rows) if rows == host_rows else streamed(rows),
    )  # fmt: skip
    place = order(found)
    first, *others = (place[node] for node in found.nodes(ir.TO_ACCELERATOR))
    assert first < min(place[node] for node in found.nodes(PREFETCH)) < min(others)
    verify(found.module, found.context)


def test_tables_go_up_first_as_long_as_all_of_them_are_there_before_the_ring_is_full() -> None:
    tables = nn.ModuleList([nn.Embedding(8192, 1024) for _ in range(6)])

    def function(ids: Tensor) -> Tensor:
        x = sum((table(ids) for table in tables), torch.zeros(1, device=ids.device))
        for layer in WIDE:
            x = layer(x).relu()
        return x

    found = scheduled(function, torch.arange(1100), plan=halves, ring_bytes=1 << 23)
    place = order(found)
    prefetch = min(place[node] for node in found.nodes(PREFETCH))
    first = [node for node in found.nodes(ir.TO_ACCELERATOR) if place[node] < prefetch]
    assert 0 < len(first) < len(tables)


def test_a_prefetch_follows_the_release_that_it_waits_for_before_the_host_computes() -> None:
    found = scheduled(chain, X, plan=halves, ring_bytes=32 * ROW)
    place = order(found)
    hosts = sorted(place[node] for node in found.nodes(HOST_LINEAR))
    waiting = [node for node in found.nodes(PREFETCH) if node.args[4]]
    assert len(waiting) == len(LAYERS) - 1
    for prefetch, host in zip(waiting, hosts, strict=False):
        assert place[prefetch] < host


# ---- slots, by any order of the two streams --------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> list[LinearPlan]:
    """For each layer a host part and chunks of any size."""
    result = []
    for _ in LAYERS:
        cuts = sorted(draw(st.sets(st.integers(1, 63), max_size=4)))
        bounds = [draw(st.sampled_from([0, *cuts[:1]])), *cuts, 64]
        bounds = sorted(set(bounds))
        result.append(LinearPlan(64, bounds[0], tuple(zip(bounds, bounds[1:], strict=False)), None))
    return result


@pytest.fixture(scope="module")
def uncut() -> Case:
    return planned(chain, X)


def scheduled_as(uncut: Case, decided: list[LinearPlan], ring_bytes: int) -> Case:
    from dataclasses import replace

    from tests.passes.graphs import again

    assert uncut.context.splits is not None
    assert uncut.context.residency is not None
    splits = dict(zip(sorted(uncut.context.splits), decided, strict=True))
    residency = replace(uncut.context.residency, ring_bytes=ring_bytes)
    found = again(uncut, splits=splits, residency=residency)
    for stage in (split_linears, insert_transfers, schedule):
        found.apply(stage)
    return found


@property_test
@given(plans(), st.integers(0, 100), st.integers(0, 2**32))
def test_a_slot_holds_what_its_reader_expects_whichever_stream_is_faster(
    uncut: Case, decided: list[LinearPlan], more: int, seed: int
) -> None:
    """Both streams run in their own order at any speed; bytes of the ring remember who filled them."""
    largest = max(hi - lo for plan in decided for lo, hi in plan.streamed)
    ring_bytes = largest * ROW + more * SLOT_ALIGNMENT
    found = scheduled_as(uncut, decided, ring_bytes)
    copies = found.nodes(PREFETCH)
    computes = [n for n in found.module.graph.nodes if n.target in (WAIT, ir.PARTIAL_LINEAR, RELEASE)]
    computes = [n for n in computes if n.target != WAIT or n.args[0] in copies]
    ring: list[fx.Node | None] = [None] * (ring_bytes // SLOT_ALIGNMENT)
    done: set[fx.Node] = set()
    either = random.Random(seed)
    while copies or computes:
        ready = [
            *(["copy"] if copies and done.issuperset(copies[0].args[4]) else []),
            *(["compute"] if computes and (computes[0].target != WAIT or computes[0].args[0] in done) else []),
        ]
        assert ready, "the streams wait for each other"
        node = (copies if either.choice(ready) == "copy" else computes).pop(0)
        done.add(node)
        if node.target == PREFETCH:
            lo = int(node.args[3]) // SLOT_ALIGNMENT
            count = slot_bytes(node) // SLOT_ALIGNMENT
            assert int(node.args[3]) % SLOT_ALIGNMENT == 0
            assert 0 <= lo <= lo + count <= len(ring)
            ring[lo : lo + count] = [node] * count
        elif node.target == ir.PARTIAL_LINEAR:
            transfer = node.args[1].args[0]
            assert ring.count(transfer) == slot_bytes(transfer) // SLOT_ALIGNMENT


@property_test
@given(plans(), st.integers(0, 100))
def test_no_two_live_slots_overlap_and_the_proof_agrees(uncut: Case, decided: list[LinearPlan], more: int) -> None:
    """A slot lives from its prefetch to the first prefetch, in copy order, after which its release is waited for."""
    ring_bytes = max(hi - lo for plan in decided for lo, hi in plan.streamed) * ROW + more * SLOT_ALIGNMENT
    found = scheduled_as(uncut, decided, ring_bytes)
    copies = found.nodes(PREFETCH)
    intervals = []
    for i, node in enumerate(copies):
        (release,) = [user for user in node.users if user.target == RELEASE]
        frees = (j for j, later in enumerate(copies) if j > i and release in later.args[4])
        intervals.append((i, next(frees, len(copies)), int(node.args[3]), int(node.args[3]) + slot_bytes(node)))
    for n, (born, dies, lo, hi) in enumerate(intervals):
        for other_born, other_dies, other_lo, other_hi in intervals[:n]:
            alive_together = born < other_dies and other_born < dies
            assert not (alive_together and lo < other_hi and other_lo < hi)
    verify(found.module, found.context)
    torch.testing.assert_close(found.outputs()[0], chain(X))


# ---- the order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_order_keeps_every_edge(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    found = planned(function, *inputs, plan=quarters)
    found.apply(split_linears)
    found.apply(insert_transfers)
    nodes = [n for n in found.module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    tasks = task_graph(nodes)
    edges = [(before, after) for before, followers in tasks.after.items() for after in followers]
    found.apply(schedule)
    place = order(found)
    assert all(place[before] < place[after] for before, after in edges)
    assert set(place) >= set(nodes)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_accelerator_work_that_is_ready_waits_for_the_host_to_compute(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    found = scheduled(function, *inputs, plan=quarters)
    nodes = [n for n in found.module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    tasks = task_graph(nodes)
    copies = found.nodes(PREFETCH)
    for before, after in pairwise(copies):
        tasks.add(before, after)
    place = order(found)
    ready_at: dict[fx.Node, int] = {}
    for node in nodes:  # a wait is ready when what it waits for has been issued
        waits = node.target == WAIT
        before = [ready_at[n] if n.target == WAIT else place[n] for n in tasks.before[node]]
        ready_at[node] = max(before, default=-1)
        asynchronous = info(node).side == "accelerator" or node.target in (PREFETCH, TO_HOST)
        if asynchronous and not waits:
            between = [n for n in nodes if n.target == HOST_LINEAR and ready_at[node] < place[n] < place[node]]
            assert between == [], f"{node} could have been issued before {between}"


def reads_and_writes(found: Case) -> list[str]:
    """Readers and writers of the value that is written in place, in order."""
    (written,) = {key for n in found.module.graph.nodes for key in info(n).writes if n.op == "call_module"}
    names = []
    for node in found.module.graph.nodes:
        sources = [key for operand in node.all_input_nodes for key in info(operand).storages]
        if node.op == "call_module" and written in info(node).writes:
            names.append("write")
        elif node.target in (ir.PARTIAL_LINEAR, TO_HOST) and written in sources:
            names.append(str(node.target.__name__).partition(".")[0])
        elif node.target == ir.WAIT_HOST and written in [
            key for operand in node.args[0].all_input_nodes for key in info(operand).storages
        ]:
            names.append("wait_host")
    return names


def test_a_write_comes_after_the_readers_of_the_old_value_and_before_those_of_the_new_one() -> None:
    found = scheduled(write_between, X, plan=streamed)
    assert reads_and_writes(found) == ["partial_linear", "write", "partial_linear"]
    torch.testing.assert_close(found.outputs()[0], write_between(X))


def test_a_write_waits_for_the_end_of_a_download_of_what_it_overwrites() -> None:
    names = reads_and_writes(scheduled(write_between, X, plan=halves))
    assert names.index("to_host") < names.index("wait_host") < names.index("write")


def test_a_cache_is_written_before_it_is_read() -> None:
    found = scheduled(static_cache, X, torch.tensor([2]), torch.randn(6, 64), plan=streamed)
    assert reads_and_writes(found)[0] == "write"


@pytest.mark.parametrize("ring_rows", [16, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numerics_with_rings_of_any_length(name: str, ring_rows: int) -> None:
    function, inputs = FUNCTIONS[name]
    found = assert_equal_to_eager(function, *inputs, ring_bytes=ring_rows * ROW)
    verify(found.module, found.context)


def test_nothing_is_added_and_nothing_is_lost() -> None:
    found = planned(chain, X, plan=quarters)
    found.apply(split_linears)
    found.apply(insert_transfers)
    before: Any = sorted(node.name for node in found.module.graph.nodes)
    found.apply(schedule)
    assert sorted(node.name for node in found.module.graph.nodes) == before
