"""Copies that share a link: small ones behind large ones, both directions at once, copies against reading kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.settings import require
from hetegen_compile.accelerators.cuda.copies import upload_lines
from hetegen_compile.accelerators.cuda.pinning import SUCCESS, CudaHostMemory, cuda_view

QUEUED_BYTES = 64 << 20
CHUNK_BYTES = 16 << 20
BOTH_BYTES = 1 << 30
SMALL_BYTES = 16 << 10
SIZES = (1 << 10, 1 << 13, 1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 20, 1 << 22)
"""Bytes of activations: ``ir.SMALL_UPLOAD_BYTES`` should be where a copy overtakes a kernel that reads host memory."""

ROWS, COLUMNS = 4096, 4096
"""Of the matrix that columns are copied from."""

_REPEATS = 20


def uploads_behind_a_queue(device: torch.device) -> dict[str, float]:
    """Seconds until a small activation is on the device while 64 MB of prefetches are queued, by the way it takes."""
    large = _pinned(CHUNK_BYTES)
    target = torch.empty_like(large, device=device)
    small = _pinned(SMALL_BYTES)
    seen, landed = cuda_view(small, device), torch.empty(SMALL_BYTES, dtype=torch.uint8, device=device)
    up, other, compute = torch.cuda.Stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device)
    ways: dict[str, tuple[torch.cuda.Stream, Tensor]] = {
        "copy on the prefetches' stream": (up, small),
        "copy on a stream of its own": (other, small),
        "kernel that reads the pinned buffer": (compute, seen),
    }
    found = {}
    for name, (stream, source) in ways.items():
        for queued in (0, QUEUED_BYTES // CHUNK_BYTES):
            seconds = [
                _behind(stream, lambda source=source: _read(landed, source), up, target, large, queued)  # type: ignore[misc]
                for _ in range(_REPEATS)
            ]
            found[f"{name}, {'64 MB queued' if queued else 'idle link'}"] = statistics.median(seconds)
    return found


def _read(landed: Tensor, source: Tensor) -> None:
    """A copy if the source is on the host; a kernel if it is a view, which an addition cannot do by DMA."""
    if source.is_cuda:
        torch.add(source, 1, out=landed)
    else:
        landed.copy_(source, non_blocking=True)


def _behind(
    stream: torch.cuda.Stream,
    work: Callable[[], None],
    up: torch.cuda.Stream,
    target: Tensor,
    large: Tensor,
    queued: int,
) -> float:
    torch.cuda.synchronize(target.device)
    with torch.cuda.stream(up):
        for _ in range(queued):
            target.copy_(large, non_blocking=True)
    started = time.perf_counter()
    with torch.cuda.stream(stream):
        work()
        event = stream.record_event()
    event.synchronize()
    return time.perf_counter() - started


def both_ways(device: torch.device) -> dict[str, float]:
    """Bytes per second up, down, and of each while the other runs."""
    up_host, down_host = _pinned(BOTH_BYTES), _pinned(BOTH_BYTES)
    up_device, down_device = (torch.empty_like(up_host, device=device) for _ in range(2))

    def up() -> None:
        up_device.copy_(up_host, non_blocking=True)

    def down() -> None:
        down_host.copy_(down_device, non_blocking=True)

    (alone_up,), (alone_down,) = _streams(device, [up]), _streams(device, [down])
    both_up, both_down = _streams(device, [up, down])
    rates = {"up": alone_up, "down": alone_down, "up while down": both_up, "down while up": both_down}
    return {name: BOTH_BYTES / seconds for name, seconds in rates.items()}


def _streams(device: torch.device, works: list[Callable[[], None]]) -> list[float]:
    """Device seconds of each work, on streams of their own at the same time."""
    for work in works:
        work()
    torch.cuda.synchronize(device)
    timed = []
    for work in works:
        stream = torch.cuda.Stream(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record(stream)
            work()
            end.record(stream)
        timed.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in timed]


def reads_by_size(device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds until an activation of a size can be used: a copy and a kernel, or a kernel that reads the host."""
    found = {}
    for nbytes in SIZES:
        host = _pinned(nbytes)
        seen, copied = cuda_view(host, device), torch.empty(nbytes, dtype=torch.uint8, device=device)
        out = torch.empty_like(copied)

        def copy(host: Tensor = host, copied: Tensor = copied, out: Tensor = out) -> None:
            copied.copy_(host, non_blocking=True)
            torch.add(copied, 1, out=out)

        def read(seen: Tensor = seen, out: Tensor = out) -> None:
            torch.add(seen, 1, out=out)

        found[str(nbytes)] = {"copied_s": _until_done(copy, device), "read_s": _until_done(read, device)}
    return found


def columns_by_width(device: torch.device) -> dict[str, dict[str, float]]:
    """Bytes per second of 2-D copies of columns of a registered matrix, by their number; the copies must be right."""
    matrix = torch.arange(ROWS * COLUMNS, dtype=torch.int32).view(ROWS, COLUMNS)
    memory, stream = CudaHostMemory(device), torch.cuda.Stream(device)
    require(memory.register(matrix.data_ptr(), matrix.nbytes) == SUCCESS, "registering failed")
    found = {}
    try:
        for width in (16, 64, 256, 1024, COLUMNS):
            source = matrix[:, COLUMNS - width :]
            target = torch.empty((ROWS, width), dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)
            seconds = _lines(target, source, stream)
            started = time.perf_counter()
            upload_lines(target, source, stream.cuda_stream)
            returned_s = time.perf_counter() - started
            stream.synchronize()
            require(torch.equal(target.cpu(), source), f"{width} columns arrived wrong")
            found[str(width * 4)] = {"bytes_per_s": target.nbytes / seconds, "returned_s": returned_s}
    finally:
        memory.unregister(matrix.data_ptr())
    return found


def _lines(target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> float:
    """Device seconds of a copy, the second of two."""
    for _ in range(2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        upload_lines(target, source, stream.cuda_stream)
        end.record(stream)
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _until_done(work: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _pinned(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
