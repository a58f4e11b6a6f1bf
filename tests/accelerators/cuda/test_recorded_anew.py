"""Where results of chains lie when they are recorded anew, late or not at all, over the fake of torch.cuda."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import CudaAccelerator, Op, StepFacts
from hetegen_compile.accelerators.base import LaunchChain
from hetegen_compile.accelerators.cuda import replays
from hetegen_compile.accelerators.cuda.allocator import RECORDED_BYTES
from tests.accelerators.cuda.chained_layers import Layer, Row, steps, wants


def test_what_is_recorded_anew_leaves_its_results_where_they_were(cuda: CudaAccelerator) -> None:
    """Those behind it are given the same, and their graphs were recorded when its results had been born."""
    row, x = Row(cuda), torch.randn(replays.COPIED_BYTES)
    w, caches = torch.ones(1), [torch.randn(replays.COPIED_BYTES) for _ in range(2)]
    assert [row.step(x, [w, caches[0], w]) for _ in range(12)][-1] == [True] * 3
    before = row.recordings()
    assert row.step(x, [w, caches[1], w]) == [True, False, False], "its result lies elsewhere, for once"
    assert row.step(x, [w, caches[1], w]) == [True] * 3
    first, second, third = row.recordings()
    assert (first, third) == (before[0], before[2])
    assert second.number > before[1].number
    assert (second.born, second.places) == (before[1].born, before[1].places)
    assert cuda.counters.chains_recorded == 4
    assert all(row.step(x, [w, caches[1], w]) == [True] * 3 for _ in range(3))


def test_results_that_were_made_in_inference_mode_stay_too(cuda: CudaAccelerator) -> None:
    layer, w = Layer(cuda), torch.ones(1)
    xs = [torch.randn(replays.COPIED_BYTES) for _ in range(2)]
    with torch.inference_mode():
        assert any(steps(layer, [(xs[0], w)] * 8))
    place = layer.chain.recorded.recording.places
    assert any(steps(layer, [(xs[1], w)] * 4))
    assert layer.chain.recorded.recording.places == place


def test_no_graph_is_replayed_behind_results_that_were_born_later(cuda: CudaAccelerator) -> None:
    """They may lie in its scratch. One that is recorded late has those behind it recorded once more."""
    late, early, w = Layer(cuda), Layer(cuda), torch.ones(1)
    xs = [torch.randn(replays.COPIED_BYTES) for _ in range(4)]

    def step(x: Tensor) -> list[int]:
        cuda.begin_step(facts=StepFacts(again=True, chains=[late.chain, early.chain]))
        for layer, value in ((late, x), (early, xs[0])):
            z, _ = cuda.launch_chain(layer.chain, [value, w])
            assert torch.equal(z, 2 * value + w)
        cuda.end_step()
        recordings = [layer.chain.recorded.recording for layer in (late, early)]
        return [0 if one is None else one.number for one in recordings]

    assert [step(x) for x in xs][-1] == [0, 1]
    assert [step(xs[1]) for _ in range(12)][-1] == [2, 3]


def test_results_of_another_geometry_are_born_anew(cuda: CudaAccelerator) -> None:
    layer, w = Layer(cuda), torch.ones(1)
    xs = [torch.randn(size) for size in (replays.COPIED_BYTES, replays.COPIED_BYTES + 8)]
    for x in xs:
        assert any(steps(layer, [(x, w)] * 12))
    assert layer.chain.recorded.recording.born == layer.chain.recorded.recording.number == 2


def test_results_that_are_expanded_are_born_anew(cuda: CudaAccelerator) -> None:
    """Nothing may be copied to them, which is no reason to record nothing any more."""

    def run(given: list[Any]) -> tuple[Any, ...]:
        (x,) = given
        given.clear()
        return (cuda.launch(Op("expand"), lambda x: (x * 2)[:1].expand(3), (x,)),)

    chain = LaunchChain("expand", run)
    for x in [torch.randn(replays.COPIED_BYTES) for _ in range(2)]:
        for _ in range(6):
            cuda.begin_step(facts=StepFacts(again=True, chains=[chain]))
            seen = chain.recorded
            if seen is None or seen.recording is None or not cuda.counters.chains_replayed:
                cuda.launch_chain(chain, [x])
            else:  # the fake cannot replay it
                seen.recording = seen.recording._replace(graph=_Nothing())
                cuda.launch_chain(chain, [x])
            cuda.end_step()
    assert cuda.counters.chains_recorded == 2
    assert not cuda.cannot_record
    assert chain.recorded.recording.born == 2


class _Nothing:
    def replay(self) -> None: ...


def test_behind_a_view_of_what_was_given_chains_are_recorded(cuda: CudaAccelerator) -> None:
    first, x, w = Layer(cuda), torch.randn(4), torch.randn(4)
    behind = Layer(cuda, made=(1,))
    for _ in range(6):
        cuda.begin_step(facts=StepFacts(again=True, chains=[first.chain, behind.chain]))
        _, view = cuda.launch_chain(first.chain, [x, w])
        z, _ = cuda.launch_chain(behind.chain, [x, view])
        cuda.end_step()
        assert torch.equal(z, 2 * x + w[:1])
    assert behind.chain.recorded.replays > 2


def test_who_finds_no_room_asks_less_and_less(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "RECORDED_BYTES", 0)
    layer, x, w, opened = Layer(cuda), torch.randn(4), torch.randn(4), []
    for step in range(400):
        layer.step(x, w)
        if wants(layer):
            opened.append(step)
    assert cuda.counters.chains_recorded == 0
    gaps = [after - before for before, after in itertools.pairwise(opened)]
    assert 2 < len(gaps) < 6
    assert gaps[1:] == sorted(gaps[1:])
    assert gaps[-1] >= 2 * gaps[1]


def test_what_another_chain_gives_is_never_a_copy(cuda: CudaAccelerator) -> None:
    """It lies elsewhere for a step where that one is recorded anew."""
    layer, w = Layer(cuda, made=(0,)), torch.randn(4)
    assert not any(steps(layer, [(torch.randn(4), w) for _ in range(8)]))
    assert layer.chain.recorded.moving == ()


def test_what_is_recorded_stays_within_its_share(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter(range(0, 1 << 40, RECORDED_BYTES // 2))
    monkeypatch.setattr(replays, "reserved_now_bytes", lambda device: next(reserved))
    layers, x, w = [Layer(cuda) for _ in range(3)], torch.randn(4), torch.randn(4)
    for _ in range(6):
        for layer in layers:
            layer.step(x, w)
    assert cuda.counters.chains_recorded == 2, "two halves, after which there is no room"
    steps(layers[2], [(x, w)] * 60)
    assert cuda.counters.chains_recorded == 3, "what was not used for long makes room"
    assert [layer.chain.recorded.recording is None for layer in layers] == [True, True, False]


def test_what_is_gone_takes_nothing(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter(range(0, 1 << 40, RECORDED_BYTES // 2))
    monkeypatch.setattr(replays, "reserved_now_bytes", lambda device: next(reserved))
    layers, x, w = [Layer(cuda) for _ in range(2)], torch.randn(4), torch.randn(4)
    for layer in layers:
        assert any(steps(layer, [(x, w)] * 4))
    del layer
    layers.clear()
    gc.collect()
    assert any(steps(Layer(cuda), [(x, w)] * 4)), "in a pool of memory that is new"
