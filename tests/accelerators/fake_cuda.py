"""Just enough of torch.cuda, on host memory and without asynchrony, to run CudaAccelerator and see its edges.

It says nothing about a GPU: it finds wrong calls and missing event waits, not wrong assumptions about CUDA.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.accelerators.cuda import (
    accelerator,
    activations,
    copies,
    gates,
    lending,
    pinning,
    prefetches,
    replays,
)
from hetegen_compile.accelerators.geometry import empty_result, empty_twin
from hetegen_compile.passes.tensors import tensors_in

LOG: list[str] = []
PENDING: set[str] = set()
ALREADY_REGISTERED = 712
RESERVED = {"current": 123_456}
"""What torch's allocator says to have reserved at the end of a step."""


class FakeEvent:
    """Knows who recorded it; waiting for one never recorded fails, unlike CUDA."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.name = ""
        self.recorded_s = 0.0

    def record(self, stream: FakeStream) -> None:
        self.name = f"{stream.name}@{next(stream.ticks)}"
        self.recorded_s = next(CLOCK) * 1.0

    def synchronize(self) -> None:
        assert self.name, "waits for an event that was never recorded"
        LOG.append(f"host waits {self.name}")

    def query(self) -> bool:
        """Whether it is over; here the test says so."""
        return self.name not in PENDING

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.recorded_s - self.recorded_s


LONGEST_GATE_S = 20.0
CLOCK = itertools.count()


class FakeStream:
    """Logs what it waits for."""

    cuda_stream = 17
    names = itertools.cycle(["up", "down", "own"])

    def __init__(self, device: torch.device | None = None, name: str = "") -> None:
        self.name = name or next(self.names)
        self.ticks = itertools.count()

    def wait_event(self, event: FakeEvent) -> None:
        assert event.name, "waits for an event that was never recorded"
        LOG.append(f"{self.name} waits {event.name}")

    def wait_stream(self, other: FakeStream) -> None:
        LOG.append(f"{self.name} waits {other.name}")

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        LOG.append(f"host waits {self.name}")


class FakeRuntime:
    """Registers whole ranges; refuses a range that starts inside a registered one."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if any(start <= address < start + size for start, size in self.ranges.items()):
            return ALREADY_REGISTERED
        self.ranges[address] = nbytes
        return pinning.SUCCESS

    def cudaHostUnregister(self, address: int) -> int:
        del self.ranges[address]
        return pinning.SUCCESS


class FakeGraph:
    """Runs what it records, as CUDA does not: its first replay does nothing, each further one all of it again."""

    recording: FakeGraph | None = None

    def __init__(self) -> None:
        self.launched: list[tuple[Any, Any, Any]] = []
        self._fresh = True

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == (POOL, "thread_local")
        FakeGraph.recording = self

    def capture_end(self) -> None:
        FakeGraph.recording = None
        LOG.append(f"recorded {len(self.launched)} launches")

    def replay(self) -> None:
        LOG.append("replayed")
        for function, args, result in () if self._fresh else self.launched:
            for old, new in zip(tensors_in(result), tensors_in(function(*args)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self._fresh = False


def _launch(self: accelerator.CudaAccelerator, op: Op, function: Any, args: Any, **options: Any) -> Any:
    result = _LAUNCH(self, op, function, args, **options)
    if FakeGraph.recording is not None:
        FakeGraph.recording.launched.append((function, args, result))
    return result


def _copy_results(places: Any, results: Any) -> None:
    """A copy within a chain, as a launch without results."""
    _COPY_RESULTS(places, results)
    if FakeGraph.recording is not None:
        FakeGraph.recording.launched.append((_COPY_RESULTS, (places, results), None))


_LAUNCH = accelerator.CudaAccelerator.launch
_COPY_RESULTS = replays.copy_results

POOL = (0, 1)


def memcpy_2d(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int, stream: int
) -> int:
    """``cudaMemcpy2DAsync`` between host addresses, line by line."""
    assert (kind, stream) == (copies.HOST_TO_DEVICE, FakeStream.cuda_stream)
    LOG.append(f"2-D copy of {height} lines of {width} bytes")
    for line in range(height):
        ctypes.memmove(target + line * target_pitch, source + line * source_pitch, width)
    return 0


def wait_value_32(stream: int, address: int, number: int, flags: int) -> int:
    """``cuStreamWaitValue32``: nothing runs later here, so the issuing thread waits for what it issues next."""
    assert (stream, flags) == (FakeStream.cuda_stream, 0)
    seen = ctypes.c_uint32.from_address(address)
    LOG.append(f"gate {number} closed" if _behind(number, seen.value) else f"gate {number} is open")
    end_s = time.monotonic() + LONGEST_GATE_S
    while _behind(number, seen.value):
        assert time.monotonic() < end_s, f"gate {number} has not opened"
        time.sleep(1e-4)
    return 0


def _behind(number: int, seen: int) -> bool:
    return ctypes.c_int32(number - seen).value > 0


def install(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """Put the fake in the place of torch.cuda's parts that CudaAccelerator uses."""
    LOG.clear()
    PENDING.clear()
    compute, runtime = FakeStream(name="compute"), FakeRuntime()
    FakeStream.names = itertools.cycle(["up", "down", "own"])

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        LOG.append(f"on {stream.name}")
        yield

    parts = SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=lambda device: (1 << 30, 1 << 31),
        memory_reserved=lambda device: 0,
        get_per_process_memory_fraction=lambda device: 1.0,
        memory_stats_as_nested_dict=lambda device: {"reserved_bytes": {"all": RESERVED}},
        get_device_capability=lambda device: (9, 0),
        empty_cache=lambda: LOG.append("empty cache"),
        synchronize=lambda device: LOG.append("host waits all"),
        current_stream=lambda device: compute,
        cudart=lambda: runtime,
        set_device=lambda device: None,
        current_device=lambda: None,
        CUDAGraph=FakeGraph,
        graph_pool_handle=lambda: POOL,
        stream=on,
        set_stream=lambda stream: None if stream is compute else LOG.append(f"on {stream.name}"),
        Stream=FakeStream,
        Event=FakeEvent,
    )
    for name, part in vars(parts).items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(accelerator, "_current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(gates, "_wait_function", lambda: wait_value_32)
    monkeypatch.setattr(accelerator, "why_no_gates", lambda: "")
    monkeypatch.setattr(accelerator.CudaAccelerator, "launch", _launch)
    monkeypatch.setattr(replays, "copy_results", _copy_results)
    for module in (accelerator, activations, gates, lending, prefetches, replays):
        monkeypatch.setattr(module, "empty_twin", lambda tensor, device, pinned=False: empty_twin(tensor, device))
    for module in (accelerator, activations):
        monkeypatch.setattr(module, "empty_result", lambda value, pinned=False: empty_result(value))
    monkeypatch.setattr(copies, "_copy_function", lambda: memcpy_2d)
    for module in (activations, lending):
        monkeypatch.setattr(module, "cuda_view", lambda buffer, device: buffer)
    return runtime
