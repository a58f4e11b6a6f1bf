"""Chains of launches as CUDA graphs, over the fake of torch.cuda: what is recorded when, and what is replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import CudaAccelerator, Op
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

    def __init__(self, accelerator: CudaAccelerator) -> None:
        self.accelerator = accelerator
        self.chain = Chain("double", self.run)
        self.runs = 0

    def run(self, given: list[Any]) -> tuple[Any, ...]:
        self.runs += 1
        x, w = given
        given.clear()
        y = self.accelerator.launch(Op("double"), lambda x: x * 2, (x,))
        z = self.accelerator.launch(Op("add"), torch.add, (y, w))
        return z, w[:1]

    def step(self, x: Tensor, w: Tensor, *, again: bool = True) -> tuple[Tensor, Tensor]:
        self.accelerator.begin_step(again=again)
        given = [x, w]
        z, first = self.accelerator.launch_chain(self.chain, given)
        assert given == [], "what is given may die on the way"
        self.accelerator.end_step()
        assert torch.equal(z, 2 * x + w)
        assert torch.equal(first, w[:1])
        return z, first


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
    assert steps(layer, [(x, w)] * 5) == [False, True, True, True, True]
    assert (layer.runs, LOG.count("recorded 2 launches"), accelerator.counters.chains_recorded) == (3, 1, 1)
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
    layer.step(x, w)
    assert accelerator._replays.wants_open_gates, "the next step closes none"
    assert accelerator.counters.chains_recorded == 0
    layer.step(x, w)
    assert accelerator.counters.chains_recorded == 1
    assert not accelerator._replays.wants_open_gates


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
    assert steps(layer, [(x, other)] * 4) == [False, False, True, True], "one closes gates, one records"
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
        accelerator.begin_step(again=True)
        accelerator.launch_chain(chain, [cache, x])
        accelerator.end_step()
        assert torch.equal(cache, x)
    assert accelerator.counters.chains_recorded == 0


def test_what_comes_and_goes_is_not_recorded_each_time(accelerator: CudaAccelerator) -> None:
    """Two large caches by turns, three steps each: every second turn could be recorded anew, and replayed once."""
    layer, x = Layer(accelerator), torch.randn(replays.COPIED_BYTES)
    caches = [torch.randn(replays.COPIED_BYTES) for _ in range(2)]
    steps(layer, [(x, caches[number // 3 % 2]) for number in range(120)])
    assert accelerator.counters.chains_recorded < 10
    assert all(steps(layer, [(x, caches[0])] * 80)[-8:]), "at last, when it stays"


def test_a_chain_behind_another_is_recorded_in_the_same_step(accelerator: CudaAccelerator) -> None:
    """The first one's results lie elsewhere from then on, and stay there."""
    first, second = Layer(accelerator), Layer(accelerator)
    x, w = torch.randn(4), torch.randn(4)
    for _ in range(4):
        accelerator.begin_step(again=True)
        z, _ = accelerator.launch_chain(first.chain, [x, w])
        y, _ = accelerator.launch_chain(second.chain, [z, w])
        accelerator.end_step()
        assert torch.equal(y, 2 * (2 * x + w) + w)
        if accelerator.counters.chains_recorded:
            break
    assert accelerator.counters.chains_recorded == 2


def test_graphs_are_replayed_in_the_order_in_which_they_were_recorded(accelerator: CudaAccelerator) -> None:
    """Scratch of an earlier one may be a later one's result: those behind one that is recorded anew are, too."""
    layers = [Layer(accelerator) for _ in range(3)]
    large, w = [torch.randn(replays.COPIED_BYTES) for _ in range(2)], torch.ones(1)

    def numbers(x: Tensor) -> list[int]:
        accelerator.begin_step(again=True)
        value, found = x, []
        for layer in layers:
            value, _ = accelerator.launch_chain(layer.chain, [value, w])
            recording = layer.chain.recorded.recording
            found.append(recording.number if recording is not None else 0)
        accelerator.end_step()
        assert torch.equal(value, 2 * (2 * (2 * x + w) + w) + w)
        return found

    assert [numbers(large[0]) for _ in range(12)][-1] == [1, 2, 3]
    found = [numbers(large[1]) for _ in range(6)][-1]
    assert found == sorted(found)
    assert min(found) > 3


@pytest.mark.parametrize(
    "place", [lambda: torch.randn(2, 8)[:, :3], lambda: torch.randn(2, 1).expand(2, 3), lambda: torch.randn(3, 2).t()]
)
def test_copies_lie_in_memory_as_what_they_are_of(accelerator: CudaAccelerator, place: Callable[[], Tensor]) -> None:
    layer, w = Layer(accelerator), torch.randn(2, 3)
    places = [place() for _ in range(12)]
    assert steps(layer, [(x, w) for x in places])[-4:] == [True] * 4


def test_steps_of_others_do_not_use_up_a_wish(accelerator: CudaAccelerator) -> None:
    """Graphs that take turns, of which one has nothing to record; and a wish that nobody comes for ends."""
    layer, x, w = Layer(accelerator), torch.randn(4), torch.randn(4)
    for _ in range(4):
        layer.step(x, w)
        accelerator.begin_step(again=True)  # another one's
        accelerator.end_step()
    assert accelerator.counters.chains_recorded == 1
    assert not accelerator._replays.wants_open_gates
    other = Layer(accelerator)
    for _ in range(2):
        other.step(x, w)
    assert accelerator._replays.wants_open_gates
    for _ in range(20):
        accelerator.begin_step(again=True)
        accelerator.end_step()
    assert not accelerator._replays.wants_open_gates


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
    del layer
    layers.clear()
    gc.collect()
    layer = Layer(accelerator)
    steps(layer, [(x, w)] * 4)
    assert accelerator.counters.chains_recorded == 3, "what is gone takes nothing, in a pool of memory that is new"


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
        accelerator.begin_step(again=True)
        (seen,) = accelerator.launch_chain(chain, [x])
        accelerator.end_step()
        assert seen.data_ptr() == x.data_ptr()
    assert accelerator.counters.chains_recorded == 0
    assert any(steps(Layer(accelerator), [(x, x)] * 4)), "others are"
