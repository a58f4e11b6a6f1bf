"""CudaAccelerator without a GPU: what it refuses, and its calls against a fake of torch.cuda."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hetegen_compile import doctor
from hetegen_compile.accelerators import CudaAccelerator, Op
from hetegen_compile.accelerators.cuda import copies
from hetegen_compile.accelerators.cuda.pinning import CudaHostMemory, _PinnedBytes
from hetegen_compile.errors import (
    AcceleratorError,
    AcceleratorMemoryError,
    AcceleratorUnavailableError,
    ScheduleError,
    SlotInUseError,
)
from hetegen_compile.ir import SMALL_UPLOAD_BYTES, VIEWED_UPLOAD_BYTES
from hetegen_compile.options import format_bytes
from hetegen_compile.reports.schedule import Schedule
from tests.accelerators import fake_cuda
from tests.accelerators.fake_cuda import ALREADY_REGISTERED, LOG, PENDING, FakeRuntime
from tests.accelerators.schedules import WIDTH, SplitLayers, make_weights, run_eager


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def accelerator(runtime: FakeRuntime) -> CudaAccelerator:
    accelerator = CudaAccelerator()
    accelerator.reserve_ring(4096)
    LOG.clear()
    return accelerator


@pytest.mark.parametrize(("version", "reason"), [(None, "CUDA build of torch"), ("13.0", "nvidia-smi")])
def test_no_device_is_an_error_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(AcceleratorUnavailableError, match=reason):
        CudaAccelerator()


@pytest.mark.usefixtures("runtime")
def test_split_layers_run_through_every_operation() -> None:
    accelerator = CudaAccelerator()
    weights = make_weights(4)
    layers = SplitLayers(accelerator, weights)
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(layers.step(x), run_eager(weights, x))
    assert accelerator.counters.uploaded_bytes["weights"] == 4 * 48 * WIDTH * 4
    assert accelerator.counters.peak_bytes == 123_456
    length = accelerator.counters.held_bytes["slots"]
    accelerator.rest()
    assert length > accelerator.counters.held_bytes["slots"] == 0
    accelerator.reserve_ring(length)
    torch.testing.assert_close(layers.step(x), run_eager(weights, x))
    accelerator.close()
    with pytest.raises(AcceleratorError, match="closed"):
        accelerator.begin_step()


def test_the_peak_is_of_steps_and_not_of_what_ran_before(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration reserves and gives back; a step's peak is what is reserved when it ends."""
    for reserved, peak in ((6000, 6000), (5000, 6000), (9000, 9000)):
        monkeypatch.setitem(fake_cuda.RESERVED, "current", reserved)
        accelerator.begin_step()
        accelerator.end_step()
        assert (accelerator.counters.step_peak_bytes, accelerator.counters.peak_bytes) == (reserved, peak)


@pytest.mark.usefixtures("runtime")
def test_what_is_free_is_read_once_torch_keeps_nothing_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(device: torch.device) -> tuple[int, int]:
        return (900 if "empty cache" in LOG else 500), 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    assert CudaAccelerator().memory_bytes == 900


def test_edges_between_the_streams(accelerator: CudaAccelerator) -> None:
    slot = accelerator.slot(0, (4,), torch.float32)
    fetched = accelerator.prefetch(Op("fetch"), torch.ones(4), slot, ())
    value = accelerator.wait(Op("wait"), fetched)
    down = accelerator.to_host(Op("down"), value)
    assert accelerator.wait_host(Op("arrived"), down).tolist() == [1] * 4
    assert down.source is None
    token = accelerator.release(Op("release"), fetched)
    accelerator.prefetch(Op("next"), torch.zeros(4), slot, (token,))
    assert LOG == [
        "on up",
        "compute waits up@0",
        "down waits compute@0",
        "on down",
        "host waits down@0",
        "up waits compute@1",
        "on up",
    ]


def test_a_step_asks_for_the_callers_stream_once(accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking takes longer than a launch; the next step may be on another stream."""
    streams = [fake_cuda.FakeStream(name="one"), fake_cuda.FakeStream(name="other")]
    asked: list[str] = []

    def current_stream(device: torch.device) -> fake_cuda.FakeStream:
        asked.append(streams[0].name)
        return streams[0]

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    for _ in range(2):
        accelerator.begin_step()
        before = len(asked)
        for _ in range(3):
            accelerator.launch(Op("a launch"), torch.relu, (torch.ones(2),))
            accelerator.wait_host(Op("it comes"), accelerator.to_host(Op("it goes down"), torch.ones(2)))
        assert len(asked) == before
        accelerator.end_step()
        streams.reverse()
    assert set(asked) == {"one", "other"}
    assert {"own waits one", "own waits other"} <= set(LOG), "a step comes behind what its caller has issued"
    assert "host waits own" in LOG


def test_a_prefetch_for_the_next_step(accelerator: CudaAccelerator) -> None:
    """The end of a step waits for compute, downloads and its own uploads; the next step waits for the copy itself."""
    slot, other = (accelerator.slot(i * 256, (4,), torch.float32) for i in range(2))
    accelerator.begin_step()
    own = accelerator.prefetch(Op("own"), torch.ones(4), other, ())
    token = accelerator.release(Op("release"), own)
    LOG.clear()
    source = torch.ones(4)
    ahead = accelerator.prefetch_ahead(Op("ahead"), source, slot, (token,))
    assert not accelerator.holds(ahead)
    with pytest.raises(ScheduleError, match=r"wait waits for ahead, which is a prefetch_ahead"):
        accelerator.wait(Op("wait"), ahead)
    accelerator.end_step()
    assert LOG == ["up waits own@0", "on up", "on own", "host waits own", "host waits down", "host waits up@0"]
    assert accelerator.holds(ahead)
    LOG.clear()
    accelerator.begin_step([ahead])
    assert accelerator.wait(Op("wait"), ahead).tolist() == [1] * 4
    behind_the_caller = [f"{name} waits compute" for name in ("own", "up", "down")]
    assert [*behind_the_caller, "on own", "own waits up@1"] == LOG
    assert accelerator.release(Op("release"), ahead).node == "release"
    assert not accelerator.holds(ahead)


@pytest.mark.parametrize("how", ["given up", "aborted", "ring"])
def test_a_prefetch_for_the_next_step_that_is_lost(accelerator: CudaAccelerator, how: str) -> None:
    accelerator.begin_step()
    ahead = accelerator.prefetch_ahead(Op("ahead"), torch.ones(4), accelerator.slot(0, (4,), torch.float32), ())
    if how != "aborted":
        accelerator.end_step()
    if how == "given up":
        accelerator.begin_step()
        accelerator.end_step()
    elif how == "ring":
        accelerator.reserve_ring(8192)
    assert not accelerator.holds(ahead)
    with pytest.raises(ScheduleError, match="begin_step takes over ahead"):
        accelerator.begin_step([ahead])
    accelerator.begin_step()
    accelerator.end_step()


def test_a_copy_for_the_next_step_is_over_before_its_source_is_freed(accelerator: CudaAccelerator) -> None:
    slot = accelerator.slot(0, (4,), torch.float32)
    for over in (False, True):
        source = torch.ones(4)
        accelerator.begin_step()
        ahead = accelerator.prefetch_ahead(Op("ahead"), source, slot, ())
        event = ahead.event.name  # type: ignore[union-attr]
        PENDING.update(set() if over else {event})
        accelerator.end_step()
        assert ahead.source is None
        assert len(accelerator._prefetches._guards) == (not over)
        LOG.clear()
        del source
        waited = [] if over else [f"host waits {event}"]
        assert waited == LOG
        PENDING.clear()
        accelerator.begin_step()
        accelerator.end_step()
        assert not accelerator._prefetches._guards


def test_several_values_go_down_as_one_transfer(accelerator: CudaAccelerator) -> None:
    down = accelerator.to_host(Op("down"), [torch.ones(2), torch.zeros(3)])
    assert [t.tolist() for t in accelerator.wait_host(Op("arrived"), down)] == [[1, 1], [0, 0, 0]]
    assert LOG == ["down waits compute@0", "on down", "host waits down@0"]
    with pytest.raises(ScheduleError, match="down"):
        accelerator.to_host(Op("down"), [torch.ones(2), None])


def test_small_activations_stay_off_the_copy_engine(accelerator: CudaAccelerator) -> None:
    (small,) = accelerator.wait(Op("wait"), accelerator.to_accelerator(Op("up"), [torch.ones(3).expand(2, 3)]))
    assert small.shape == (2, 3)
    sources = [torch.ones(VIEWED_UPLOAD_BYTES >> 2), torch.arange(6).view(2, 3).t(), torch.ones(0)]
    read = accelerator.wait(Op("wait"), accelerator.to_accelerator(Op("up"), sources))
    assert all(torch.equal(one, source) for one, source in zip(read, sources, strict=True))
    assert read[1].stride() == sources[1].stride()
    assert LOG == []
    assert len(accelerator._activations._kept) == len(sources)
    assert accelerator._activations._lending.lent == 1
    accelerator.wait(Op("wait"), accelerator.to_accelerator(Op("up"), [torch.ones((SMALL_UPLOAD_BYTES >> 2) + 1)]))
    assert LOG == ["on up", "compute waits up@0"]
    accelerator.end_step()
    assert not accelerator._activations._kept
    assert accelerator._activations._lending.lent == 0


@pytest.mark.parametrize(
    "source",
    [torch.tensor(7), torch.tensor([[True, False]]), torch.arange(6).view(2, 3).t(), torch.ones(6)[::2]],
)  # fmt: skip
def test_small_uploads_are_read_by_a_kernel(accelerator: CudaAccelerator, source: torch.Tensor) -> None:
    """What a step is called with (tokens, positions, masks) waits for no prefetch in the copy engine's queue."""
    value = accelerator.upload(Op("tokens"), source)
    assert torch.equal(value, source)
    assert value.stride() == source.stride()
    zeros = torch.zeros(16, dtype=source.dtype).as_strided(source.shape, source.stride())
    assert accelerator.upload(Op("tokens"), zeros, into=value) is value
    assert not value.any()
    assert accelerator._activations._filling.lent == 2
    accelerator.upload(Op("weights"), torch.ones((VIEWED_UPLOAD_BYTES >> 2) + 1))
    assert accelerator._activations._filling.lent == 2
    accelerator.end_step()
    assert accelerator._activations._filling.lent == 0


def test_what_a_step_sends_up_lies_where_it_did_however_much_is_new_to_it(accelerator: CudaAccelerator) -> None:
    """A mask that was looked up, a position that was not: recorded launches go on."""
    places = set()
    for new in range(3):
        for _ in range(new):
            accelerator.upload(Op("new"), torch.ones(2))
        (value,) = accelerator.wait(Op("wait"), accelerator.to_accelerator(Op("up"), [torch.ones(3)]))
        places.add(value.data_ptr())
        del value
        accelerator.end_step()
        accelerator.begin_step()
    assert len(places) == 1


def test_faults_that_cost_nothing_to_find(accelerator: CudaAccelerator) -> None:
    slot = accelerator.slot(0, (4,), torch.float32)
    fetched = accelerator.prefetch(Op("fetch"), torch.ones(4), slot, ())
    lost: Any = None
    with pytest.raises(ScheduleError, match="lost"):
        accelerator.wait(Op("lost"), lost)
    with pytest.raises(ScheduleError, match=r"arrived .* fetch"):
        accelerator.wait_host(Op("arrived"), fetched)
    with pytest.raises(ScheduleError, match="host_linear"):
        accelerator.host(Op("host_linear"), torch.neg, (fetched,), {})
    with pytest.raises(ScheduleError, match="strided"):
        accelerator.prefetch(Op("strided"), torch.ones(8)[::2], slot, ())
    accelerator.release(Op("release"), fetched)
    with pytest.raises(SlotInUseError, match=r"twice .* fetch.* release "):
        accelerator.release(Op("twice"), fetched)
    with pytest.raises(AcceleratorError, match="linear failed") as raised:
        accelerator.launch(Op("linear"), torch.matmul, (torch.ones(2, 3), torch.ones(2, 3)))
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_memory_and_uploads(accelerator: CudaAccelerator) -> None:
    value = accelerator.upload(Op("w", category="weights"), torch.ones(4))
    assert accelerator.upload(Op("w2", category="weights"), torch.zeros(4), into=value) is value
    assert accelerator.download(Op("out"), value).tolist() == [0] * 4
    assert accelerator.counters.held_bytes == {"slots": 4096, "weights": 16}
    with pytest.raises(AcceleratorMemoryError, match="staging ring"):
        accelerator.reserve_ring(1 << 31)
    with pytest.raises(ScheduleError, match=r"w3 overwrites"):
        accelerator.upload(Op("w3"), torch.zeros(5), into=value)


def pin(accelerator: CudaAccelerator, tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return accelerator.pin(storage, storage.data_ptr(), storage.nbytes())


def test_pinning_follows_return_codes(accelerator: CudaAccelerator, runtime: FakeRuntime) -> None:
    weight = torch.ones(64)
    assert pin(accelerator, weight) == 0
    assert pin(accelerator, weight[3:]) == 0
    assert runtime.ranges == {weight.data_ptr(): 256}
    assert CudaHostMemory(torch.device("cpu")).register(weight.data_ptr(), 8) == ALREADY_REGISTERED
    del weight
    assert runtime.ranges == {}


def test_a_refused_pin_clears_the_last_error(
    accelerator: CudaAccelerator, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.ranges[0] = 1 << 62  # everything is registered by somebody else
    launched: list[torch.device] = []
    zeros = torch.zeros

    def failing_kernel(size: int, device: torch.device) -> torch.Tensor:
        launched.append(device)
        if len(launched) == 1:
            raise RuntimeError("CUDA error: part or all of the requested memory range is already mapped")
        return zeros(size, device=device)

    monkeypatch.setattr(torch, "zeros", failing_kernel)
    assert pin(accelerator, torch.ones(4)) == ALREADY_REGISTERED
    assert launched == [accelerator.device]


def test_spans_on_the_hosts_clock(accelerator: CudaAccelerator) -> None:
    accelerator.trace(True)
    accelerator.launch(Op("neg"), torch.neg, (torch.ones(2),))
    accelerator.host(Op("host"), torch.neg, (torch.ones(2),), {})
    spans = {span.name: span for span in accelerator.trace(False)}
    assert {name: span.resource for name, span in spans.items()} == {"neg": "accelerator", "host": "host"}
    assert spans["neg"].end_s - spans["neg"].start_s == pytest.approx(1e-3)
    assert accelerator.trace(False) == []


def test_pinned_buffers_are_described_as_bytes() -> None:
    buffer = torch.ones(6, dtype=torch.bfloat16)
    view = _PinnedBytes(buffer)
    assert view.__cuda_array_interface__ == {
        "shape": (12,),
        "typestr": "|u1",
        "data": (buffer.data_ptr(), False),
        "strides": None,
        "version": 3,
    }


def test_what_the_context_and_others_use_is_told_apart(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 20, 20 << 20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 << 20)
    assert accelerator.beside_bytes == 3 << 20
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "fake")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=20 << 20))
    assert f"{format_bytes(3 << 20)} of it used by the CUDA context" in doctor._gpu().finding
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 16 << 20)  # read a moment later
    assert accelerator.beside_bytes == 0


def test_a_report_names_what_is_used_beside_the_budget() -> None:
    schedule = Schedule(
        title="t", tokens=(1, 1), split=0.0, rows=(), resident_bytes=0, streamed_bytes=0, host_bytes=0,
        predicted_step_s=0.0, floor_s=0.0, baselines={}, budget_bytes=0, budget={}, refusals=(), whole_graph=False,
    )  # fmt: skip
    assert "CUDA context" not in schedule.explain()
    schedule.beside_bytes = 3 << 20
    assert f"beside gpu_memory: {format_bytes(3 << 20)} of the device" in schedule.explain()


# ---- columns ---------------------------------------------------------------------------------------------------


def test_columns_go_up_as_a_copy_of_lines(accelerator: CudaAccelerator) -> None:
    weight = torch.arange(48.0).view(6, 8)
    slot, staged = accelerator.slot(0, (4, 3), torch.float32), accelerator.slot(256, (6, 3), torch.float32)
    rectangle = accelerator.prefetch(Op("rectangle"), weight[1:5, 2:5], slot, ())
    assert LOG == ["on up", "2-D copy of 4 lines of 12 bytes"]
    assert torch.equal(accelerator.wait(Op("wait"), rectangle), weight[1:5, 2:5])
    accelerator.reserve_pinned(1024)
    stage = accelerator.stage(Op("stage"), weight[:, 5:], accelerator.pinned_slot(0, (6, 3), torch.float32), ())
    up = accelerator.prefetch(Op("staged"), stage, staged, ())
    assert torch.equal(accelerator.wait(Op("wait"), up), weight[:, 5:])


def test_what_has_no_lines_is_refused(accelerator: CudaAccelerator) -> None:
    with pytest.raises(ScheduleError, match="rows must be contiguous"):
        accelerator.prefetch(Op("fetch"), torch.ones(4, 4).t()[:2], accelerator.slot(0, (2, 4), torch.float32), ())


def test_a_runtime_library_without_2d_copies_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    copies._copy_function.cache_clear()
    with pytest.raises(AcceleratorError, match=r"libcudart\.so\.99 has no cudaMemcpy2DAsync .*'pair_mlp': False"):
        copies.upload_lines(torch.empty(2, 2), torch.ones(2, 4)[:, :2], 0)
    copies._copy_function.cache_clear()
