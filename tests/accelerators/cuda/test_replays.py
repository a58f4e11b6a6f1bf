"""Chains of launches as CUDA graphs, over the fake of torch.cuda: what is recorded when, and what is replayed."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import CudaAccelerator, Op, StepFacts
from hetegen_compile.accelerators.base import Chain
from hetegen_compile.accelerators.cuda import replays
from hetegen_compile.accelerators.cuda.allocator import RECORDED_BYTES
from hetegen_compile.errors import AcceleratorMemoryError
from tests.accelerators import fake_cuda
from tests.accelerators.fake_cuda import LOG, FakeGraph


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaAccelerator]:
    fake_cuda.install(monkeypatch)
    accelerator = CudaAccelerator()
    yield accelerator
    accelerator.close()


class Layer:
    """A chain of two launches: y = 2x, z = y + w; gives z, and w's first element as a view."""

    def __init__(self, accelerator: CudaAccelerator, made: tuple[int, ...] = ()) -> None:
        self.accelerator = accelerator
        self.chain = Chain("double", self.run, made=made)
        self.runs = 0

    def run(self, given: list[Any]) -> tuple[Any, ...]:
        self.runs += 1
        x, w = given
        given.clear()
        y = self.accelerator.launch(Op("double"), lambda x: x * 2, (x,))
        z = self.accelerator.launch(Op("add"), torch.add, (y, w))
        return z, w[:1]

    def step(self, x: Tensor, w: Tensor, *, again: bool = True) -> tuple[Tensor, Tensor]:
        self.accelerator.begin_step(facts=StepFacts(again=again, chains=[self.chain]))
        given = [x, w]
        z, first = self.accelerator.launch_chain(self.chain, given)
        assert given == [], "what is given may die on the way"
        self.accelerator.end_step()
        assert torch.equal(z, 2 * x + w)
        assert torch.equal(first, w[:1])
        return z, first


def wants(layer: Layer) -> bool:
    return layer.accelerator._replays.wants_open_gates([layer.chain])


def steps(layer: Layer, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether each was replayed, or recorded and replayed."""
    found = []
    for x, w in pairs:
        before = layer.accelerator.counters.chains_replayed
        layer.step(x, w)
        found.append(layer.accelerator.counters.chains_replayed > before)
    return found


def test_what_lies_still_is_recorded_once_and_replayed(accelerator: CudaAccelerator) -> None:
    layer, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)
    layer.step(x, w, again=False)
    assert steps(layer, [(x, w)] * 5) == [True] * 5
    assert (layer.runs, LOG.count("recorded 2 launches"), accelerator.counters.chains_recorded) == (2, 1, 1)
    x.fill_(7.0)  # other contents
    w.fill_(3.0)
    z, first = layer.step(x, w)
    assert first.data_ptr() == w.data_ptr(), "what lies in something given is found in it"
    assert layer.step(x, w)[0].data_ptr() == z.data_ptr()


def test_nothing_is_recorded_while_gates_are_closed_or_code_may_be_loaded(accelerator: CudaAccelerator) -> None:
    layer, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)
    for _ in range(4):
        layer.step(x, w, again=False)
    assert accelerator.counters.chains_recorded == 0
    layer.chain.recorded.wants = False
    layer.step(x, w)
    assert wants(layer), "the next step closes none"
    assert accelerator.counters.chains_recorded == 0
    layer.step(x, w)
    assert accelerator.counters.chains_recorded == 1
    assert not wants(layer)


def test_traced_steps_have_a_span_for_each_launch(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)
    steps(layer, [(x, w)] * 4)
    monkeypatch.setattr(accelerator._streams.tracer, "enabled", True)
    monkeypatch.setattr(accelerator._streams.tracer, "stream_span", lambda name, *rest: _Noted(name))
    layer.step(x, w)
    assert _Noted.names == ["double", "add"]


class _Noted:
    names: list[str] = []

    def __init__(self, name: str) -> None:
        self.names.append(name)

    def __enter__(self) -> None: ...

    def __exit__(self, *raised: object) -> None: ...


def test_a_chain_whose_inputs_moved_is_launched_one_by_one_and_recorded_again(accelerator: CudaAccelerator) -> None:
    layer, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)
    assert steps(layer, [(x, w)] * 12)[2:] == [True] * 10
    other = torch.randn(4)
    assert steps(layer, [(x, other)] * 4) == [False, True, True, True], "gates are open in the second"
    assert accelerator.counters.chains_recorded == 2


def test_what_moves_each_time_is_copied_if_it_is_small(accelerator: CudaAccelerator) -> None:
    layer, w = Layer(accelerator), torch.randn(4)
    places = [torch.randn(4) for _ in range(12)]
    assert steps(layer, [(x, w) for x in places])[-4:] == [True] * 4
    assert accelerator.counters.chains_recorded == 1
    large = [torch.randn(replays.COPIED_BYTES) for _ in range(8)]
    layer = Layer(accelerator)
    assert not any(steps(layer, [(x, torch.ones(1)) for x in large]))


def test_what_is_written_is_never_a_copy(accelerator: CudaAccelerator) -> None:
    def run(given: list[Any]) -> tuple[Any, ...]:
        cache, x = given
        given.clear()
        return (accelerator.launch(Op("write"), lambda cache, x: cache.copy_(x), (cache, x), mutates=(0,)),)

    chain, x = Chain("write", run, written=(0,)), torch.randn(4)
    for cache in [torch.zeros(4) for _ in range(10)]:
        accelerator.begin_step(facts=StepFacts(again=True, chains=[chain]))
        accelerator.launch_chain(chain, [cache, x])
        accelerator.end_step()
        assert torch.equal(cache, x)
    assert accelerator.counters.chains_recorded == 0


def test_what_comes_and_goes_is_not_recorded_each_time(accelerator: CudaAccelerator) -> None:
    """Two large caches by turns, three steps each: every turn could be recorded anew, and replayed twice."""
    layer, x = Layer(accelerator), torch.randn(replays.COPIED_BYTES)
    caches = [torch.randn(replays.COPIED_BYTES) for _ in range(2)]
    steps(layer, [(x, caches[number // 3 % 2]) for number in range(120)])
    assert accelerator.counters.chains_recorded < accelerator.counters.chains_replayed / 2
    assert all(steps(layer, [(x, caches[0])] * 80)[-8:]), "at last, when it stays"


def test_a_chain_behind_another_is_recorded_in_the_same_step(accelerator: CudaAccelerator) -> None:
    """The first one's results lie elsewhere from then on, and stay there."""
    first, second = Layer(accelerator), Layer(accelerator, made=(0,))
    x, w = torch.randn(4), torch.randn(4)
    for _ in range(4):
        accelerator.begin_step(facts=StepFacts(again=True, chains=[first.chain, second.chain]))
        z, _ = accelerator.launch_chain(first.chain, [x, w])
        y, _ = accelerator.launch_chain(second.chain, [z, w])
        accelerator.end_step()
        assert torch.equal(y, 2 * (2 * x + w) + w)
        if accelerator.counters.chains_recorded:
            break
    assert accelerator.counters.chains_recorded == 2


class Row:
    """Layers that follow each other, the first of ``x`` and all of ``ws``."""

    def __init__(self, accelerator: CudaAccelerator, count: int = 3) -> None:
        self.accelerator = accelerator
        self.layers = [Layer(accelerator, made=(0,) if index else ()) for index in range(count)]

    def step(self, x: Tensor, ws: Sequence[Tensor]) -> list[bool]:
        """Whether each was replayed."""
        self.accelerator.begin_step(facts=StepFacts(again=True, chains=[layer.chain for layer in self.layers]))
        value, expected, found = x, x, []
        for layer, w in zip(self.layers, ws, strict=True):
            before = self.accelerator.counters.chains_replayed
            value, _ = self.accelerator.launch_chain(layer.chain, [value, w])
            expected = 2 * expected + w
            found.append(self.accelerator.counters.chains_replayed > before)
        self.accelerator.end_step()
        assert torch.equal(value, expected)
        return found

    def recordings(self) -> list[Any]:
        return [layer.chain.recorded.recording for layer in self.layers]


def test_what_is_recorded_anew_leaves_its_results_where_they_were(accelerator: CudaAccelerator) -> None:
    """Those behind it are given the same, and their graphs were recorded when its results had been born."""
    row, x = Row(accelerator), torch.randn(replays.COPIED_BYTES)
    w, caches = torch.ones(1), [torch.randn(replays.COPIED_BYTES) for _ in range(2)]
    assert [row.step(x, [w, caches[0], w]) for _ in range(12)][-1] == [True] * 3
    before = row.recordings()
    assert row.step(x, [w, caches[1], w]) == [True, False, False], "its result lies elsewhere, for once"
    assert row.step(x, [w, caches[1], w]) == [True] * 3
    first, second, third = row.recordings()
    assert (first, third) == (before[0], before[2])
    assert second.number > before[1].number
    assert (second.born, second.places) == (before[1].born, before[1].places)
    assert accelerator.counters.chains_recorded == 4
    assert all(row.step(x, [w, caches[1], w]) == [True] * 3 for _ in range(3))


def test_results_that_were_made_in_inference_mode_stay_too(accelerator: CudaAccelerator) -> None:
    layer, w = Layer(accelerator), torch.ones(1)
    xs = [torch.randn(replays.COPIED_BYTES) for _ in range(2)]
    with torch.inference_mode():
        assert any(steps(layer, [(xs[0], w)] * 8))
    place = layer.chain.recorded.recording.places
    assert any(steps(layer, [(xs[1], w)] * 4))
    assert layer.chain.recorded.recording.places == place


def test_no_graph_is_replayed_behind_results_that_were_born_later(accelerator: CudaAccelerator) -> None:
    """They may lie in its scratch. One that is recorded late has those behind it recorded once more."""
    late, early, w = Layer(accelerator), Layer(accelerator), torch.ones(1)
    xs = [torch.randn(replays.COPIED_BYTES) for _ in range(4)]

    def step(x: Tensor) -> list[int]:
        accelerator.begin_step(facts=StepFacts(again=True, chains=[late.chain, early.chain]))
        for layer, value in ((late, x), (early, xs[0])):
            z, _ = accelerator.launch_chain(layer.chain, [value, w])
            assert torch.equal(z, 2 * value + w)
        accelerator.end_step()
        recordings = [layer.chain.recorded.recording for layer in (late, early)]
        return [0 if one is None else one.number for one in recordings]

    assert [step(x) for x in xs][-1] == [0, 1]
    assert [step(xs[1]) for _ in range(12)][-1] == [2, 3]


def test_results_of_another_geometry_are_born_anew(accelerator: CudaAccelerator) -> None:
    layer, w = Layer(accelerator), torch.ones(1)
    xs = [torch.randn(size) for size in (replays.COPIED_BYTES, replays.COPIED_BYTES + 8)]
    for x in xs:
        assert any(steps(layer, [(x, w)] * 12))
    assert layer.chain.recorded.recording.born == layer.chain.recorded.recording.number == 2


def test_results_that_are_expanded_are_born_anew(accelerator: CudaAccelerator) -> None:
    """Nothing may be copied to them, which is no reason to record nothing any more."""

    def run(given: list[Any]) -> tuple[Any, ...]:
        (x,) = given
        given.clear()
        return (accelerator.launch(Op("expand"), lambda x: (x * 2)[:1].expand(3), (x,)),)

    chain = Chain("expand", run)
    for x in [torch.randn(replays.COPIED_BYTES) for _ in range(2)]:
        for _ in range(6):
            accelerator.begin_step(facts=StepFacts(again=True, chains=[chain]))
            seen = chain.recorded
            if seen is None or seen.recording is None or not accelerator.counters.chains_replayed:
                accelerator.launch_chain(chain, [x])
            else:  # the fake cannot replay it
                seen.recording = seen.recording._replace(graph=_Nothing())
                accelerator.launch_chain(chain, [x])
            accelerator.end_step()
    assert accelerator.counters.chains_recorded == 2
    assert not accelerator.cannot_record
    assert chain.recorded.recording.born == 2


class _Nothing:
    def replay(self) -> None: ...


def test_behind_a_view_of_what_was_given_chains_are_recorded(accelerator: CudaAccelerator) -> None:
    first, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)
    behind = Layer(accelerator, made=(1,))
    for _ in range(6):
        accelerator.begin_step(facts=StepFacts(again=True, chains=[first.chain, behind.chain]))
        _, view = accelerator.launch_chain(first.chain, [x, w])
        z, _ = accelerator.launch_chain(behind.chain, [x, view])
        accelerator.end_step()
        assert torch.equal(z, 2 * x + w[:1])
    assert behind.chain.recorded.replays > 2


def test_who_finds_no_room_asks_less_and_less(accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "RECORDED_BYTES", 0)
    layer, x, w, opened = Layer(accelerator), torch.randn(4), torch.randn(4), []
    for step in range(400):
        layer.step(x, w)
        if wants(layer):
            opened.append(step)
    assert accelerator.counters.chains_recorded == 0
    gaps = [after - before for before, after in itertools.pairwise(opened)]
    assert 2 < len(gaps) < 6
    assert gaps[1:] == sorted(gaps[1:])
    assert gaps[-1] >= 2 * gaps[1]


def test_what_another_chain_gives_is_never_a_copy(accelerator: CudaAccelerator) -> None:
    """It lies elsewhere for a step where that one is recorded anew."""
    layer, w = Layer(accelerator, made=(0,)), torch.randn(4)
    assert not any(steps(layer, [(torch.randn(4), w) for _ in range(8)]))
    assert layer.chain.recorded.moving == ()


@pytest.mark.parametrize(
    "place", [lambda: torch.randn(2, 8)[:, :3], lambda: torch.randn(2, 1).expand(2, 3), lambda: torch.randn(3, 2).t()]
)
def test_copies_lie_in_memory_as_what_they_are_of(accelerator: CudaAccelerator, place: Callable[[], Tensor]) -> None:
    layer, w = Layer(accelerator), torch.randn(2, 3)
    places = [place() for _ in range(12)]
    assert steps(layer, [(x, w) for x in places])[-4:] == [True] * 4


def test_a_wish_is_for_the_next_step_of_ones_own(accelerator: CudaAccelerator) -> None:
    """A prompt's chains that could be recorded leave the gates of the answer's steps alone."""
    prompt, answer, x, w = Layer(accelerator), Layer(accelerator), torch.randn(4), torch.randn(4)
    steps(answer, [(x, w)] * 4)
    prompt.step(x, w)
    assert wants(prompt)
    for _ in range(40):
        assert not wants(answer)
        answer.step(x, w)
    prompt.step(x, w)
    assert accelerator.counters.chains_recorded == 2
    assert not wants(prompt)


def test_gates_stay_closed_for_what_moves_in_every_step(accelerator: CudaAccelerator) -> None:
    layer, w, opened = Layer(accelerator), torch.ones(1), []
    for x in [torch.randn(replays.COPIED_BYTES) for _ in range(12)]:
        layer.step(x, w)
        opened.append(wants(layer))
    assert sum(opened) == 1


def test_a_replay_that_fails_names_its_first_launch(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)
    assert any(steps(layer, [(x, w)] * 4))

    def fail(graph: FakeGraph) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(FakeGraph, "replay", fail)
    with pytest.raises(AcceleratorMemoryError, match="double found no memory"):
        layer.step(x, w)


@pytest.mark.parametrize("where", ["capture_begin", "capture_end", "a launch"])
def test_what_cannot_be_recorded_is_launched_one_by_one_and_said_once(
    accelerator: CudaAccelerator, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)

    def fail(*args: Any, **options: Any) -> None:
        FakeGraph.recording = None
        raise RuntimeError("operation not permitted when stream is capturing")

    def launch(op: Op, function: Any, args: Any, **options: Any) -> Any:
        return fail() if FakeGraph.recording is not None else function(*args)

    if where == "a launch":
        monkeypatch.setattr(accelerator, "launch", launch)
    else:
        monkeypatch.setattr(FakeGraph, where, fail)
    assert not any(steps(layer, [(x, w)] * 6))
    reason = "issued one by one, recording double as a CUDA graph failed: operation not permitted"
    assert caplog.text.count(f"launches are {reason}") == 1
    assert accelerator.cannot_record.startswith(reason)


def test_what_is_recorded_stays_within_its_share(accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter(range(0, 1 << 40, RECORDED_BYTES // 2))
    monkeypatch.setattr(replays, "reserved_now_bytes", lambda device: next(reserved))
    layers, x, w = [Layer(accelerator) for _ in range(3)], torch.randn(4), torch.randn(4)
    for _ in range(6):
        for layer in layers:
            layer.step(x, w)
    assert accelerator.counters.chains_recorded == 2, "two halves, after which there is no room"
    steps(layers[2], [(x, w)] * 60)
    assert accelerator.counters.chains_recorded == 3, "what was not used for long makes room"
    assert [layer.chain.recorded.recording is None for layer in layers] == [True, True, False]


def test_what_is_gone_takes_nothing(accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter(range(0, 1 << 40, RECORDED_BYTES // 2))
    monkeypatch.setattr(replays, "reserved_now_bytes", lambda device: next(reserved))
    layers, x, w = [Layer(accelerator) for _ in range(2)], torch.randn(4), torch.randn(4)
    for layer in layers:
        assert any(steps(layer, [(x, w)] * 4))
    del layer
    layers.clear()
    gc.collect()
    assert any(steps(Layer(accelerator), [(x, w)] * 4)), "in a pool of memory that is new"


def test_memory_that_ends_while_recording_is_no_error(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)

    def launch(op: Op, function: Any, args: Any, **options: Any) -> Any:
        if FakeGraph.recording is not None:
            raise AcceleratorMemoryError("no memory")
        return function(*args)

    monkeypatch.setattr(accelerator, "launch", launch)
    assert not any(steps(layer, [(x, w)] * 4))
    monkeypatch.undo()
    fake_cuda.install(monkeypatch)
    assert any(steps(Layer(accelerator), [(x, w)] * 4)), "another chain may find some"


def test_a_view_of_another_type_of_what_was_given_is_not_recorded(accelerator: CudaAccelerator) -> None:
    def run(given: list[Any]) -> tuple[Any, ...]:
        (x,) = given
        given.clear()
        return (accelerator.launch(Op("view"), lambda x: x.view(torch.int32), (x,)),)

    chain, x = Chain("view", run), torch.randn(4)
    for _ in range(4):
        accelerator.begin_step(facts=StepFacts(again=True, chains=[chain]))
        (seen,) = accelerator.launch_chain(chain, [x])
        accelerator.end_step()
        assert seen.data_ptr() == x.data_ptr()
    assert accelerator.counters.chains_recorded == 0
    assert any(steps(Layer(accelerator), [(x, x)] * 4)), "others are"
