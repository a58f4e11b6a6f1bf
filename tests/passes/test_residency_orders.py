"""Some rows stay before those of more gain per byte where that shortens the step, and only there."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import cache

import pytest
from torch import fx

from benchmarks.schedule_quality import Result, Work
from hetegen_compile.cost_model import HardwareProfile, RateCurve, load_profile
from hetegen_compile.passes import residency_orders
from hetegen_compile.passes.claims import Claim
from hetegen_compile.passes.findings import NodeCost
from hetegen_compile.passes.residency_estimate import LinearWork
from hetegen_compile.passes.residency_orders import ordered_claims
from hetegen_compile.passes.residency_shares import residency_shares
from hetegen_compile.planning import weigh_residency
from hetegen_compile.planning.share_search import Search
from tests.benchmarks.shapes import config

PROFILE = load_profile("h100-server")
MIB = 1 << 20


@cache
def work(model_type: str, vocab_size: int) -> Work:
    return Work(config(model_type, layers=3, full_layers=6, vocab_size=vocab_size), "decode-1")


def fast_link() -> HardwareProfile:
    """Host memory next to the accelerator's: a link of 400 GB/s at every size."""
    up = replace(PROFILE.link.up, pinned=RateCurve.constant(4e11))
    return replace(PROFILE, link=replace(PROFILE.link, up=up))


def slow_accelerator() -> HardwareProfile:
    """Three times as fast as the host at reading weights."""
    return replace(PROFILE, accelerator=replace(PROFILE.accelerator, memory_bytes_per_s=4e11))


def both_ways(found: Work, profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch) -> tuple[Result, Result]:
    """The result, and that with gain per byte alone."""
    chosen = found.result(profile, 0.75)
    monkeypatch.setattr(residency_orders, "_SHORTER", 0.0)
    return chosen, found.result(profile, 0.75)


@pytest.mark.parametrize(
    ("model_type", "vocab_size", "profile", "least"),
    [("llama", 65536, fast_link(), 0.95), ("gptj", 16384, slow_accelerator(), 0.97)],
    ids=["the output layer waits for the link", "the accelerator waits for the host"],
)
def test_steps_are_shorter_than_with_gain_alone(
    model_type: str, vocab_size: int, profile: HardwareProfile, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "along_ring", lambda *_, **__: None)  # it makes up for a part of what the order costs
    monkeypatch.setattr(weigh_residency, "_MOST", 0)  # so does this
    chosen, gain = both_ways(work(model_type, vocab_size), profile, monkeypatch)
    assert chosen.step_s < least * gain.step_s
    assert chosen.resident_share == pytest.approx(gain.resident_share, abs=0.02)
    assert chosen.ratio >= 1.0


def test_the_same_share_of_one_linear_of_each_layer_keeps_the_host_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = work("gptj", 16384)
    chosen = found.result(PROFILE, 0.75)
    monkeypatch.setattr(residency_orders, "_of_one_kind", lambda *_: ())
    without = found.result(PROFILE, 0.75)
    assert chosen.step_s < 0.97 * without.step_s
    assert chosen.resident_share == pytest.approx(without.resident_share, abs=0.02)


# ---- claims by themselves ----------------------------------------------------------------------------------------


def layers_and_output() -> tuple[list[Claim], list[LinearWork]]:
    """Eight Linears of 16 MiB one after the other, of more gain than an output layer of 128 MiB."""
    graph = fx.Graph()
    claims, found = [], []
    for place, rows in enumerate([2048] * 8 + [16384]):
        nbytes = rows * 8192
        claims.append(Claim(place, rows, 0, 8192, gain_s_per_byte=2.0 if rows == 2048 else 1.0))
        cost = NodeCost(
            flops=0.0, traffic_bytes=nbytes, weight_bytes=nbytes, tokens=1, host_s=nbytes / 1.4e11,
            accelerator_s=nbytes / 3e12 + 5e-6, link_s=nbytes / 4e11, host_alone_s=nbytes / 1.6e11,
        )  # fmt: skip
        found.append(LinearWork(graph.placeholder(f"x{place}"), place, rows, cost))
    return claims, found


def test_some_of_the_output_layer_comes_before_the_layers() -> None:
    claims, found = layers_and_output()
    order, *others = ordered_claims(claims, found, 128 * MIB, 32 * MIB, 16 * MIB, fast_link())
    assert residency_shares([claims], 128 * MIB) == dict.fromkeys(range(8), 0)
    rows = residency_shares([order], 128 * MIB)
    assert rows[8] < 16384
    assert sum((claim.rows - rows.get(claim.key, claim.rows)) * claim.row_bytes for claim in claims) <= 128 * MIB
    shared = [residency_shares([one], 128 * MIB) for one in (order, *others)]
    assert all(one != other for i, one in enumerate(shared) for other in shared[:i]), "each keeps other rows"
    assert dict.fromkeys(range(8), 0) in shared, "gain alone is among them"
    assert shared[1][8] == 0, "first of the others is the output layer whole, if it fits"


def test_what_an_estimate_is_known_to_be_wrong_by() -> None:
    claims, _ = layers_and_output()
    kept: dict[Hashable, int] = dict.fromkeys(range(8), 0)

    def corrected(first_rows: dict[Hashable, int]) -> float:
        return residency_orders._corrected_s(1.0, claims, first_rows, frozenset({8}))

    assert corrected({}) == corrected({**kept}) == 1.0
    halves = corrected(dict.fromkeys(range(8), 1024))
    assert halves == pytest.approx(1.0 + residency_orders._IN_TWO_PLACES * 8 / 9), "in two places"
    assert corrected(dict.fromkeys(range(4), 1024)) - 1.0 == pytest.approx((halves - 1.0) / 2)
    whole = corrected({**kept, 8: 0})
    assert whole == pytest.approx(1.0 - residency_orders._LARGE_KEPT / 2), "half of all bytes are the output layer's"
    assert whole < corrected({**kept, 8: 8192}) < halves


@pytest.mark.parametrize("free_bytes", [0, 300 * MIB])
def test_nothing_is_compared_where_nothing_or_everything_stays(free_bytes: int) -> None:
    claims, found = layers_and_output()
    assert ordered_claims(claims, found, free_bytes, 32 * MIB, 16 * MIB, fast_link()) == [claims]


def test_where_no_linear_asks_for_memory_nothing_is_compared() -> None:
    """The options put all of them on the host, and what is left are stacks of experts."""
    claims, found = layers_and_output()
    stacks = [replace(claim, rank=1) for claim in claims]
    assert ordered_claims(stacks, found, 128 * MIB, 32 * MIB, 16 * MIB, fast_link()) == [stacks]


def test_gain_has_its_way_where_nothing_is_much_shorter() -> None:
    claims, found = layers_and_output()
    slow = replace(PROFILE, link=replace(PROFILE.link, up=replace(PROFILE.link.up, pinned=RateCurve.constant(1e10))))
    work_there = [replace(one, cost=replace(one.cost, link_s=one.cost.weight_bytes / 1e10)) for one in found]
    assert ordered_claims(claims, work_there, 32 * MIB, 32 * MIB, 16 * MIB, slow)[0] is claims
