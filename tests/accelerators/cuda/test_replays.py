"""Chains of launches as CUDA graphs, over the fake of torch.cuda: what is recorded when, and what is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import CudaAccelerator, Op, StepFacts
from hetegen_compile.accelerators.base import LaunchChain
from hetegen_compile.accelerators.cuda import replays
from hetegen_compile.accelerators.cuda.allocator import GRAPH_BYTES
from hetegen_compile.errors import AcceleratorError, AcceleratorMemoryError
from hetegen_compile.steps.chains import RESULT_BYTES
from tests.accelerators import fake_cuda
from tests.accelerators.cuda.chained_layers import Layer, Row, steps, wants
from tests.accelerators.fake_cuda import LOG, FakeGraph


def test_what_lies_still_is_recorded_once_and_replayed(cuda: CudaAccelerator) -> None:
    layer, x, w = Layer(cuda), torch.randn(4), torch.randn(4)
    layer.step(x, w, again=False)
    assert steps(layer, [(x, w)] * 5) == [True] * 5
    assert (layer.runs, LOG.count("recorded 2 launches"), cuda.counters.chains_recorded) == (2, 1, 1)
    x.fill_(7.0)  # other contents
    w.fill_(3.0)
    z, first = layer.step(x, w)
    assert first.data_ptr() == w.data_ptr(), "what lies in something given is found in it"
    assert layer.step(x, w)[0].data_ptr() == z.data_ptr()


def test_nothing_is_recorded_while_gates_are_closed_or_code_may_be_loaded(cuda: CudaAccelerator) -> None:
    layer, x, w = Layer(cuda), torch.randn(4), torch.randn(4)
    for _ in range(4):
        layer.step(x, w, again=False)
    assert cuda.counters.chains_recorded == 0
    layer.chain.recorded.wants = False
    layer.step(x, w)
    assert wants(layer), "the next step closes none"
    assert cuda.counters.chains_recorded == 0
    layer.step(x, w)
    assert cuda.counters.chains_recorded == 1
    assert not wants(layer)


def test_traced_steps_have_a_span_for_each_launch(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, w = Layer(cuda), torch.randn(4), torch.randn(4)
    steps(layer, [(x, w)] * 4)
    monkeypatch.setattr(cuda._streams.tracer, "enabled", True)
    monkeypatch.setattr(cuda._streams.tracer, "stream_span", lambda name, *rest: _Noted(name))
    layer.step(x, w)
    assert _Noted.names == ["double", "add"]


class _Noted:
    names: list[str] = []

    def __init__(self, name: str) -> None:
        self.names.append(name)

    def __enter__(self) -> None: ...

    def __exit__(self, *raised: object) -> None: ...


def test_a_chain_whose_inputs_moved_is_launched_one_by_one_and_recorded_again(cuda: CudaAccelerator) -> None:
    layer, x, w = Layer(cuda), torch.randn(4), torch.randn(4)
    assert steps(layer, [(x, w)] * 12)[2:] == [True] * 10
    other = torch.randn(4)
    assert steps(layer, [(x, other)] * 4) == [False, True, True, True], "gates are open in the second"
    assert cuda.counters.chains_recorded == 2


def test_what_moves_each_time_is_copied_if_it_is_small(cuda: CudaAccelerator) -> None:
    layer, w = Layer(cuda), torch.randn(4)
    places = [torch.randn(4) for _ in range(12)]
    assert steps(layer, [(x, w) for x in places])[-4:] == [True] * 4
    assert cuda.counters.chains_recorded == 1
    large = [torch.randn(replays.COPIED_BYTES) for _ in range(8)]
    layer = Layer(cuda)
    assert not any(steps(layer, [(x, torch.ones(1)) for x in large]))


def test_what_is_written_is_never_a_copy(cuda: CudaAccelerator) -> None:
    def run(given: list[Any]) -> tuple[Any, ...]:
        cache, x = given
        given.clear()
        return (cuda.launch(Op("write"), lambda cache, x: cache.copy_(x), (cache, x), mutates=(0,)),)

    chain, x = LaunchChain("write", run, written=(0,)), torch.randn(4)
    for cache in [torch.zeros(4) for _ in range(10)]:
        cuda.begin_step(facts=StepFacts(again=True, chains=[chain]))
        cuda.launch_chain(chain, [cache, x])
        cuda.end_step()
        assert torch.equal(cache, x)
    assert cuda.counters.chains_recorded == 0


def test_what_comes_and_goes_is_not_recorded_each_time(cuda: CudaAccelerator) -> None:
    """Two large caches by turns, three steps each: every turn could be recorded anew, and replayed twice."""
    layer, x = Layer(cuda), torch.randn(replays.COPIED_BYTES)
    caches = [torch.randn(replays.COPIED_BYTES) for _ in range(2)]
    steps(layer, [(x, caches[number // 3 % 2]) for number in range(120)])
    assert cuda.counters.chains_recorded < cuda.counters.chains_replayed / 2
    assert all(steps(layer, [(x, caches[0])] * 80)[-8:]), "at last, when it stays"


def test_a_chain_behind_another_is_recorded_in_the_same_step(cuda: CudaAccelerator) -> None:
    """The first one's results lie elsewhere from then on, and stay there."""
    first, second = Layer(cuda), Layer(cuda, made=(0,))
    x, w = torch.randn(4), torch.randn(4)
    for _ in range(4):
        cuda.begin_step(facts=StepFacts(again=True, chains=[first.chain, second.chain]))
        z, _ = cuda.launch_chain(first.chain, [x, w])
        y, _ = cuda.launch_chain(second.chain, [z, w])
        cuda.end_step()
        assert torch.equal(y, 2 * (2 * x + w) + w)
        if cuda.counters.chains_recorded:
            break
    assert cuda.counters.chains_recorded == 2


@pytest.mark.parametrize(
    "place", [lambda: torch.randn(2, 8)[:, :3], lambda: torch.randn(2, 1).expand(2, 3), lambda: torch.randn(3, 2).t()]
)
def test_copies_lie_in_memory_as_what_they_are_of(cuda: CudaAccelerator, place: Callable[[], Tensor]) -> None:
    layer, w = Layer(cuda), torch.randn(2, 3)
    places = [place() for _ in range(12)]
    assert steps(layer, [(x, w) for x in places])[-4:] == [True] * 4


def test_a_wish_is_for_the_next_step_of_ones_own(cuda: CudaAccelerator) -> None:
    """A prompt's chains that could be recorded leave the gates of the answer's steps alone."""
    prompt, answer, x, w = Layer(cuda), Layer(cuda), torch.randn(4), torch.randn(4)
    steps(answer, [(x, w)] * 4)
    prompt.step(x, w)
    assert wants(prompt)
    for _ in range(40):
        assert not wants(answer)
        answer.step(x, w)
    prompt.step(x, w)
    assert cuda.counters.chains_recorded == 2
    assert not wants(prompt)


def test_gates_stay_closed_for_what_moves_in_every_step(cuda: CudaAccelerator) -> None:
    layer, w, opened = Layer(cuda), torch.ones(1), []
    for x in [torch.randn(replays.COPIED_BYTES) for _ in range(12)]:
        layer.step(x, w)
        opened.append(wants(layer))
    assert sum(opened) == 1


def test_a_replay_that_fails_names_its_first_launch(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, w = Layer(cuda), torch.randn(4), torch.randn(4)
    assert any(steps(layer, [(x, w)] * 4))

    def fail(graph: FakeGraph) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(FakeGraph, "replay", fail)
    with pytest.raises(AcceleratorMemoryError, match="double found no memory"):
        layer.step(x, w)


@pytest.mark.parametrize("where", ["capture_begin", "capture_end", "a launch"])
def test_what_cannot_be_recorded_is_launched_one_by_one_and_said_once(
    cuda: CudaAccelerator, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x, w = Layer(cuda), torch.randn(4), torch.randn(4)

    def fail(*args: Any, **options: Any) -> None:
        FakeGraph.recording = None
        raise RuntimeError("operation not permitted when stream is capturing")

    def launch(op: Op, function: Any, args: Any, **options: Any) -> Any:
        return fail() if FakeGraph.recording is not None else function(*args)

    if where == "a launch":
        monkeypatch.setattr(cuda, "launch", launch)
    else:
        monkeypatch.setattr(FakeGraph, where, fail)
    assert not any(steps(layer, [(x, w)] * 6))
    reason = "issued one by one, recording double as a CUDA graph failed: operation not permitted"
    assert caplog.text.count(f"launches are {reason}") == 1
    assert cuda.cannot_record.startswith(reason)


def test_what_one_chain_cannot_is_tried_for_others_up_to_the_third_that_fails(
    cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that waits for the device is one segment's; a driver that cannot record is all of them's."""
    tried: list[object] = []
    begin, x, w = FakeGraph.capture_begin, torch.randn(4), torch.randn(4)

    def fail(graph: FakeGraph, **how: Any) -> None:
        tried.append(graph)
        raise RuntimeError("operation not permitted when stream is capturing")

    def attempts(failing: bool) -> int:
        monkeypatch.setattr(FakeGraph, "capture_begin", fail if failing else begin)
        tried.clear()
        assert any(steps(Layer(cuda), [(x, w)] * 6)) is not failing
        return len(tried)

    assert [attempts(failing) for failing in (True, True, False, True, True)] == [1, 1, 0, 1, 1]
    assert attempts(True) == 1, "the third in a row"
    assert attempts(True) == 0
    monkeypatch.setattr(FakeGraph, "capture_begin", begin)
    assert not any(steps(Layer(cuda), [(x, w)] * 6))


def test_what_fails_in_a_step_is_tried_no_more_in_that_step(
    cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, x, ws = Row(cuda), torch.randn(4), [torch.randn(4) for _ in range(3)]
    tried: list[object] = []

    def fail(graph: FakeGraph, **how: Any) -> None:
        tried.append(graph)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeGraph, "capture_begin", fail)
    attempts: list[int] = []
    for _ in range(6):
        row.step(x, ws)
        attempts.append(len(tried) - sum(attempts))
    assert max(attempts) == 1


def test_a_recording_that_is_broken_off_ends_for_the_allocator_too(
    cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.11 leaves it believing that one is under way: nothing that another stream has read is freed then."""
    ended: list[Any] = []
    begun: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: ended.append(args), raising=False)
    monkeypatch.setattr(FakeGraph, "capture_end", lambda graph: _raise("operation failed due to a previous error"))
    handles = iter(((0, 1), (0, 2)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(FakeGraph, "capture_begin", lambda graph, **how: begun.append(how["pool"]))
    for _ in range(2):
        assert not any(steps(Layer(cuda), [(torch.randn(4), torch.randn(4))] * 6))
    assert begun == [(0, 1), (0, 2)], "graphs that follow have another pool"
    assert ended == [(None, pool) for pool in begun]


def test_random_numbers_go_on_behind_a_recording_that_is_broken_off(
    cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.11 leaves the generator's state believing that one is under way; a copy of it does not."""

    class Generator:
        def __init__(self) -> None:
            self.states: list[object] = []

        def clone_state(self) -> str:
            return "a copy"

        def graphsafe_set_state(self, state: object) -> None:
            self.states.append(state)

    generators = Generator(), Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    assert any(steps(Layer(cuda), [(torch.randn(4), torch.randn(4))] * 6))
    monkeypatch.setattr(FakeGraph, "capture_end", lambda graph: _raise("operation failed due to a previous error"))
    assert not any(steps(Layer(cuda), [(torch.randn(4), torch.randn(4))] * 6))
    assert [one.states for one in generators] == [["a copy"], []]


@pytest.mark.parametrize(("error", "tries"), [(AcceleratorError("illegal"), 3), (AcceleratorMemoryError("none"), 5)])
def test_what_cuda_says_to_a_launch_counts_too(
    cuda: CudaAccelerator, error: AcceleratorError, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each recording that it breaks off costs a pool of memory; that there is no memory is no reason to give up."""
    tried: list[str] = []

    def launch(op: Op, function: Any, args: Any, **options: Any) -> Any:
        if FakeGraph.recording is None:
            return function(*args)
        tried.append(op.name)
        raise error

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(FakeGraph, "capture_end", lambda graph: _raise("operation failed due to a previous error"))
    for _ in range(5):
        assert not any(steps(Layer(cuda), [(torch.randn(4), torch.randn(4))] * 6))
    assert len(tried) == tries


def test_what_a_broken_off_recording_took_stays_counted(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter(range(0, 1 << 40, 4 << 20))
    monkeypatch.setattr(replays, "reserved_now_bytes", lambda device: next(reserved))
    monkeypatch.setattr(FakeGraph, "capture_end", lambda graph: _raise("operation failed due to a previous error"))
    assert not any(steps(Layer(cuda), [(torch.randn(4), torch.randn(4))] * 6))
    assert cuda._replays._graphs == 0
    monkeypatch.undo()
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(replays, "RECORDED_BYTES", (4 << 20) + GRAPH_BYTES - 1)
    assert not any(steps(Layer(cuda), [(torch.randn(4), torch.randn(4))] * 6)), "no room is left"
    monkeypatch.setattr(replays, "RECORDED_BYTES", (4 << 20) + GRAPH_BYTES)
    assert any(steps(Layer(cuda), [(torch.randn(4), torch.randn(4))] * 6))


def _raise(message: str) -> None:
    FakeGraph.recording = None
    raise RuntimeError(message)


def test_memory_that_ends_while_recording_is_no_error(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, w = Layer(cuda), torch.randn(4), torch.randn(4)

    def launch(op: Op, function: Any, args: Any, **options: Any) -> Any:
        if FakeGraph.recording is not None:
            raise AcceleratorMemoryError("no memory")
        return function(*args)

    monkeypatch.setattr(cuda, "launch", launch)
    assert not any(steps(layer, [(x, w)] * 4))
    monkeypatch.undo()
    fake_cuda.install(monkeypatch)
    assert any(steps(Layer(cuda), [(x, w)] * 4)), "another chain may find some"


def test_a_view_of_another_type_of_what_was_given_is_not_recorded(cuda: CudaAccelerator) -> None:
    def run(given: list[Any]) -> tuple[Any, ...]:
        (x,) = given
        given.clear()
        return (cuda.launch(Op("view"), lambda x: x.view(torch.int32), (x,)),)

    chain, x = LaunchChain("view", run), torch.randn(4)
    for _ in range(4):
        cuda.begin_step(facts=StepFacts(again=True, chains=[chain]))
        (seen,) = cuda.launch_chain(chain, [x])
        cuda.end_step()
        assert seen.data_ptr() == x.data_ptr()
    assert cuda.counters.chains_recorded == 0
    assert any(steps(Layer(cuda), [(x, x)] * 4)), "others are"


def test_what_attention_gives_the_next_chain_is_copied_to_a_place_of_its_own() -> None:
    """With a growing cache it lies elsewhere in each step, and may be as large as results of a chain's launches."""
    assert replays.COPIED_BYTES >= RESULT_BYTES
