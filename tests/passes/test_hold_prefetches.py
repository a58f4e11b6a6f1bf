"""What the host has made of a prompt does not go up behind all the prefetches that the ring has room for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile import ir
from hetegen_compile.cost_model import RateCurve
from hetegen_compile.passes.carry_prefetches import carry_prefetches
from hetegen_compile.passes.hold_prefetches import HeldPrefetches
from hetegen_compile.passes.measure_memory import measure_memory
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.precedence import Precedence
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import PROFILE, Case, case, halves, scheduled

WIDTH, LAYERS, RING = 1024, 4, 1 << 24
STACK = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
MANY, FEW = 2100, 4
"""Tokens of which half of the columns are more than is read in place, and not."""


_UP = PROFILE.link.up
_SLOW = replace(_UP, pinned=RateCurve(tuple((size, rate / 100) for size, rate in _UP.pinned.points)))
SLOW_LINK = replace(PROFILE, link=replace(PROFILE.link, up=_SLOW))
"""A link that takes longer for half of a weight than the host does."""


def chain(x: Tensor) -> Any:
    for layer in STACK:
        x = layer(x).softmax(-1)
    return x


def order(tokens: int) -> tuple[Case, list[Any]]:
    found = scheduled(chain, torch.zeros(tokens, WIDTH), plan=halves, ring_bytes=RING, profile=SLOW_LINK)
    return found, [node for node in found.module.graph.nodes if node.target in (ir.PREFETCH, ir.TO_ACCELERATOR)]


def test_each_large_result_goes_up_before_what_is_prefetched_for_later() -> None:
    found, queue = order(MANY)
    assert all(node_work(node, found.context).resource == "up" for node in queue if node.target == ir.TO_ACCELERATOR)
    kinds = [node.target for node in queue]
    first = kinds.index(ir.TO_ACCELERATOR)
    assert kinds[:first].count(ir.PREFETCH) < LAYERS, "though the ring holds all of them"
    for i in range(1, LAYERS):
        sent = [place for place, kind in enumerate(kinds) if kind == ir.TO_ACCELERATOR][i - 1]
        assert kinds[sent:].count(ir.PREFETCH) == LAYERS - kinds[:sent].count(ir.PREFETCH)
    prediction = found.apply(predict_step)
    for node in queue:
        if node.target == ir.TO_ACCELERATOR:
            made_s = max(prediction.end_s[one] for one in node.all_input_nodes)
            one_s = max(prediction.work[node].seconds for node in found.nodes(ir.PREFETCH))
            assert prediction.start_s[node] - made_s < one_s, "it waits for one prefetch at most"


def test_what_an_upload_needs_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each prefetch that is asked about: that grows with the square of the depth."""
    asked: list[tuple[HeldPrefetches, Any]] = []
    found = HeldPrefetches._needed_for

    def needed_for(self: HeldPrefetches, upload: Any) -> set[Any]:
        asked.append((self, upload))
        return found(self, upload)

    monkeypatch.setattr(HeldPrefetches, "_needed_for", needed_for)
    order(MANY)
    assert len({upload for _, upload in asked}) > LAYERS / 2
    assert len(asked) == len(set(asked))


def test_small_results_leave_all_prefetches_in_front() -> None:
    _, queue = order(FEW)
    assert [node.target for node in queue[:LAYERS]] == [ir.PREFETCH] * LAYERS


def test_the_step_is_no_longer_than_with_all_prefetches_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = order(MANY)
    held_s = found.apply(predict_step).step_s
    monkeypatch.setattr(HeldPrefetches, "holds", lambda self, node: False)
    plain, queue = order(MANY)
    assert [node.target for node in queue[:LAYERS]] == [ir.PREFETCH] * LAYERS
    assert held_s < plain.apply(predict_step).step_s


def test_where_holding_back_is_longer_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orders are simulated."""
    monkeypatch.setattr(HeldPrefetches, "_made_at_s", lambda self, needed: -1.0)
    found, _ = order(MANY)
    late_s = found.apply(predict_step).step_s
    monkeypatch.setattr(HeldPrefetches, "holds", lambda self, node: False)
    plain, _ = order(MANY)
    assert late_s <= plain.apply(predict_step).step_s


def test_the_verifier_takes_it_and_it_computes_the_same() -> None:
    x = torch.randn(MANY, WIDTH)
    found = scheduled(chain, x, plan=halves, ring_bytes=RING, profile=SLOW_LINK)
    with torch.no_grad():
        torch.testing.assert_close(found.outputs()[0], chain(x))
    for stage in (carry_prefetches, measure_memory, verify):
        found.apply(stage)


def test_only_what_is_in_front_of_the_first_large_result_is_carried() -> None:
    found, queue = order(MANY)
    kinds = [node.target for node in queue]
    in_front = kinds[: kinds.index(ir.TO_ACCELERATOR)].count(ir.PREFETCH)
    found.apply(carry_prefetches)
    assert 0 < len(found.nodes(ir.CARRIED)) == in_front < LAYERS
    few, _ = order(FEW)
    few.apply(carry_prefetches)
    assert len(few.nodes(ir.CARRIED)) == LAYERS


# ---- the order itself ------------------------------------------------------------------------------------------


def test_a_held_node_follows_the_next_that_lets_it() -> None:
    nodes = list(case(chain, torch.zeros(1, WIDTH)).module.graph.nodes)[:4]
    key = {node: (0, place) for place, node in enumerate(nodes)}
    issued: list[Any] = []

    def holds(node: Any) -> bool:
        return node is nodes[0] and nodes[2] not in issued

    for node in Precedence(nodes).order(key, holds):
        issued.append(node)
    assert issued == [nodes[1], nodes[2], nodes[0], nodes[3]]


def test_what_nothing_else_is_left_for_is_not_held() -> None:
    nodes = list(case(chain, torch.zeros(1, WIDTH)).module.graph.nodes)[:3]
    tasks = Precedence(nodes)
    tasks.add(nodes[0], nodes[2])
    key = {node: (0, place) for place, node in enumerate(nodes)}
    assert list(tasks.order(key, lambda node: node is nodes[0])) == [nodes[1], nodes[0], nodes[2]]
