"""Trips that a worker takes over: the graph, what is left alone, memory, the simulation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hetegen_compile import ir
from hetegen_compile.errors import BudgetError, ScheduleError
from hetegen_compile.ir import annotate, info
from hetegen_compile.passes.carry_prefetches import carry_prefetches
from hetegen_compile.passes.closed_gates import sizes_behind_gates
from hetegen_compile.passes.issue_ahead import WINDOW, issue_ahead
from hetegen_compile.passes.measure_memory import measure_memory
from hetegen_compile.passes.node_work import WORKER
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import PROFILE, Case, halves, least_s, on_host, quarters, resident, scheduled, streamed
from tests.passes.worker import LAYERS, WIDTH, X, ahead, chain, gated, of, places, workers


def test_every_trip_of_a_chain_is_the_workers_and_begins_behind_its_download() -> None:
    found = ahead()
    assert len(of(found, ir.HOST_LINEAR)) == len(of(found, ir.TO_ACCELERATOR)) == len(LAYERS)
    assert len(of(found, ir.WAIT_HOST)) == len(LAYERS) - 1, "the first reads an input"
    nodes = list(found.module.graph.nodes)
    for wait in of(found, ir.WAIT_HOST):
        before = nodes[nodes.index(wait) - 1]
        assert before.target in (ir.TO_HOST, ir.CAUGHT_UP)
    place = places(found)
    for partial in found.nodes(ir.PARTIAL_LINEAR)[1:]:
        (part,) = [node for node in of(found, ir.HOST_LINEAR) if info(node).position == info(partial).position]
        assert place[part] < place[partial], "given to the worker before the accelerator's part is issued"


def test_the_issuing_thread_is_two_trips_ahead_at_most() -> None:
    found = ahead()
    sent, place = of(found, ir.TO_ACCELERATOR), places(found)
    caught = found.nodes(ir.CAUGHT_UP)
    assert [node.args[0] for node in caught] == sent[:-WINDOW]
    for node, later in zip(caught, sent[WINDOW:], strict=True):
        assert place[sent[sent.index(later) - 1]] < place[node] < place[later]


def test_a_run_of_launches_behind_a_gate_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two split Linears, then many that are resident: nothing else would let the issuing thread catch up."""
    many = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(20)])

    def long(x: Tensor) -> Tensor:
        for layer in many:
            x = layer(x).relu()
        return x

    def split_first(rows: int) -> LinearPlan:
        made.append(rows)
        return halves(rows) if len(made) <= 2 else resident(rows)

    made: list[int] = []
    assert not ahead(long, X, plan=split_first).nodes(ir.CAUGHT_UP)
    made.clear()
    monkeypatch.setattr(importlib.import_module("hetegen_compile.passes.closed_gates"), "LAUNCHES", 12)
    found = ahead(long, X, plan=split_first)
    (caught,) = found.nodes(ir.CAUGHT_UP)
    assert caught.args[0] is of(found, ir.TO_ACCELERATOR)[-1]
    (wait,) = [user for user in caught.args[0].users if user.target == ir.WAIT_ACCELERATOR]
    between = list(found.module.graph.nodes)[places(found)[wait] + 1 : places(found)[caught]]
    assert 3 <= sum(node.op == "call_module" or node.target == ir.PARTIAL_LINEAR for node in between) <= 12
    found.apply(verify)


def test_what_is_new_in_each_step_is_issued_when_gates_are_open() -> None:
    """Attention to a cache: between a trip's wait and it the issuing thread catches up, and nowhere else."""

    def attends(x: Tensor, keys: Tensor) -> Tensor:
        for layer in LAYERS[:2]:
            x = layer(x).relu()
        scores = (x @ keys.T).softmax(-1)
        attended: Tensor = LAYERS[2](scores @ keys).relu()
        return attended

    keys = torch.randn(7, WIDTH)
    torch._dynamo.mark_dynamic(keys, 0)
    found = scheduled(attends, X, keys, plan=halves, profile=gated())
    (length,) = found.context.sizes
    assert [node.args[0] for node in ahead_of(found, frozenset()).nodes(ir.CAUGHT_UP)] == trips(found)[:1]  # window
    assert sizes_behind_gates(found.module) == {length}
    found = scheduled(attends, X, keys, plan=halves, profile=gated())
    caught = ahead_of(found, frozenset(found.context.sizes)).nodes(ir.CAUGHT_UP)
    assert [node.args[0] for node in caught] == [trips(found)[1], trips(found)[0]]
    assert not sizes_behind_gates(found.module)
    found.apply(verify)


def trips(found: Case) -> list[fx.Node]:
    return of(found, ir.TO_ACCELERATOR)


def ahead_of(found: Case, lengths: frozenset[Any]) -> Case:
    found.context = replace(found.context, lengths=lengths)
    found.apply(issue_ahead)
    return found


def test_it_computes_what_it_did() -> None:
    with torch.no_grad():
        expected = chain(X)
    for plan in (halves, quarters, on_host):
        found = ahead(plan=plan)
        assert workers(found)
        torch.testing.assert_close(found.outputs()[0], expected)


def test_what_else_needs_a_download_waits_for_it_by_itself() -> None:
    """A cache that is appended to: the issuing thread has work of its own with what comes down."""

    def growing(x: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
        grown = []
        for key, last, past in zip(LAYERS[::2], LAYERS[1::2], pasts, strict=False):
            cache = torch.cat([past, key(x)])
            x = last(x + cache.mean(0)).relu()
            grown.append(cache)
        return (x, *grown)

    pasts = [torch.randn(8, WIDTH) for _ in range(2)]
    found = ahead(growing, X, *pasts)
    shared = [node for node in found.nodes(ir.TO_HOST) if len(node.users) == 2]
    assert shared
    for download in shared:
        assert sorted(info(wait).ahead for wait in download.users) == [False, True]
    found.apply(verify)
    with torch.no_grad():
        torch.testing.assert_close(tuple(found.outputs()), growing(X, *pasts))


# ---- what is left alone ------------------------------------------------------------------------------------


def written(x: Tensor) -> Any:
    y = LAYERS[0](x)
    z = LAYERS[1](y)
    y.add_(1.0)
    return LAYERS[2](y * z)


def large(x: Tensor) -> Any:
    return LAYERS[1](LAYERS[0](x).relu())


def picked(x: Tensor) -> Any:
    return LAYERS[1](LAYERS[0](x[x[:, 0].nonzero().flatten()]).relu())


DATA_DEPENDENT = {"capture_dynamic_output_shape_ops": True}
LEFT_ALONE: dict[str, tuple[Callable[..., Any], Tensor, dict[str, Any]]] = {
    "what comes down is written in place": (written, X, {}),
    "more than the accelerator reads in place": (large, torch.randn(4096, WIDTH), {}),
    "sizes that depend on data": (picked, torch.randn(6, WIDTH), {"dynamo": DATA_DEPENDENT}),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_left_to_the_issuing_thread(what: str) -> None:
    function, x, options = LEFT_ALONE[what]
    found = ahead(function, x, **options)
    parts = found.nodes(ir.HOST_LINEAR)
    mine = [node for node in parts if not info(node).ahead]
    assert mine
    assert not found.refusals, "it was left to the pass what to do"
    (told,) = ahead(function, x, issue_ahead=True, **options).reasons()
    assert told.startswith(f"{len(mine)} of {len(parts)} are computed by the issuing thread: what they send up is more")
    if function is not written:
        assert not workers(found)
        assert not found.nodes(ir.CAUGHT_UP)
    found.apply(verify)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"profile": PROFILE}, []),
        ({"issue_ahead": False}, []),
        ({"cannot_issue_ahead": "no gates"}, ["no gates"]),
        ({"lean": True}, ["the budget holds no more than the leanest schedule"]),
        ({"profile": PROFILE, "issue_ahead": True, "cannot_issue_ahead": "no gates"}, ["no gates"]),
    ],
)
def test_where_nothing_is_issued_ahead(changes: dict[str, Any], told: list[str]) -> None:
    found = ahead(**changes)
    assert not workers(found)
    assert found.reasons() == told


def test_the_option_asks_for_it_where_no_gate_was_measured() -> None:
    assert workers(ahead(profile=PROFILE, issue_ahead=True))


def test_sizes_that_the_graph_is_called_with() -> None:
    found = ahead(large, torch.randn(3, WIDTH), dynamic=True)
    assert len(of(found, ir.TO_ACCELERATOR)) == 2
    found.apply(verify)


def test_a_graph_without_host_parts() -> None:
    assert not workers(ahead(plan=streamed))


# ---- memory and time ---------------------------------------------------------------------------------------


def test_what_the_workers_downloads_read_is_counted_until_the_host_has_caught_up() -> None:
    wide = torch.randn(64, WIDTH)
    found = ahead(chain, wide)
    need = measure_memory(found.module, found.context)
    in_turn = scheduled(chain, wide, plan=halves)
    before = measure_memory(in_turn.module, in_turn.context).peak_bytes(found.context.number)
    after = need.peak_bytes(found.context.number)
    assert before < after <= before + (WINDOW + 1) * wide.nbytes


def test_the_verifier_counts_what_the_plan_does() -> None:
    found = ahead(chain, torch.randn(64, WIDTH))
    needed = measure_memory(found.module, found.context).peak_bytes(found.context.number)
    ring = found.context.residency.ring_bytes  # type: ignore[union-attr]
    mirrored = (len(LAYERS) + 64) * WIDTH * 4  # biases, x
    found.context = replace(found.context, budget_bytes=ring + needed + mirrored)
    found.apply(verify)
    found.context = replace(found.context, budget_bytes=ring + needed + mirrored - 1)
    with pytest.raises(BudgetError, match="are alive on the accelerator"):
        found.apply(verify)


def test_only_what_the_worker_sends_is_caught_up_with() -> None:
    found = scheduled(chain, X, plan=halves)
    sent = found.nodes(ir.TO_ACCELERATOR)[0]
    with found.module.graph.inserting_after(sent):
        annotate(ir.call(found.module.graph, ir.CAUGHT_UP, (sent,)), side="host")
    with pytest.raises(ScheduleError, match="which the worker does not send"):
        found.apply(verify)


def test_prefetches_for_the_next_step_are_still_started() -> None:
    in_turn = scheduled(chain, X, plan=halves)
    in_turn.apply(carry_prefetches)
    found = ahead()
    found.apply(carry_prefetches)
    assert len(found.nodes(ir.CARRIED)) == len(in_turn.nodes(ir.CARRIED)) > 0
    found.apply(verify)


@pytest.mark.parametrize("carried", [False, True])
def test_issuing_is_hidden_behind_the_hosts_parts(*, carried: bool) -> None:
    dear = {"issue_s": 5e-4, "segment_issue_s": 5e-4}
    found, in_turn = ahead(profile=gated(**dear)), scheduled(chain, X, plan=halves, profile=gated(**dear))
    for one in (found, in_turn) if carried else ():
        one.apply(carry_prefetches)
    here, there = (predict_step(one.module, one.context) for one in (found, in_turn))
    parts = sum(there.work[node].seconds for node in in_turn.nodes(ir.HOST_LINEAR))
    assert here.busy_s[WORKER] >= parts
    assert here.busy_s["host"] < there.busy_s["host"]
    assert here.step_s < there.step_s
    assert here.step_s >= least_s(here)
    waits = [node for node in found.nodes(ir.WAIT_ACCELERATOR) if info(node.args[0]).ahead]
    assert all(here.work[node].issue_s == 1e-5 for node in waits)
    assert waits


def test_the_worker_and_the_issuing_thread_do_not_read_weights_at_the_same_time() -> None:
    """One of two trips that do not need each other sends up more than is read in place: each has its thread."""
    small, wide = (nn.Linear(WIDTH, rows) for rows in (256 * WIDTH, 2048 * WIDTH))

    def function(x: Tensor) -> Any:
        one, other = x.softmax(-1), x.tanh()
        return small(one) + wide(other).mean(-1, keepdim=True)

    found = ahead(function, plan=on_host)
    parts = found.nodes(ir.HOST_LINEAR)
    assert sorted(info(part).ahead for part in parts) == [False, True]
    step = predict_step(found.module, found.context)
    first, second = sorted(parts, key=step.start_s.__getitem__)
    assert step.start_s[second] >= step.end_s[first]


def test_a_part_that_is_there_does_not_wait_for_one_of_the_workers_that_is_not() -> None:
    """The issuing thread's comes behind it in issue order; what the worker's part reads takes the accelerator long."""
    first, small, wide = (nn.Linear(WIDTH, rows) for rows in (WIDTH, 256 * WIDTH, 2048 * WIDTH))

    def function(x: Tensor) -> Any:
        there, late = x.tanh(), first(x.softmax(-1))
        long = torch.ones(2048, 2048) * late.sum()
        for _ in range(6):
            long = torch.mm(long, long)
        return small(late + long.sum()) + wide(there).mean(-1, keepdim=True)

    found = ahead(function, plan=on_host)
    parts = found.nodes(ir.HOST_LINEAR)
    step = predict_step(found.module, found.context)
    (own,) = [part for part in parts if not info(part).ahead]
    late_part = max(parts, key=step.start_s.__getitem__)
    assert info(late_part).ahead
    assert places(found)[late_part] < places(found)[own]
    assert step.end_s[own] < step.start_s[late_part]
