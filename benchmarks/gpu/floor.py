"""Stage ``floor``: how fast link and host consume weights at the same time, by the host's threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.children import Notebook
from benchmarks.gpu.contact import best_kernel
from benchmarks.gpu.settings import Settings, device_of, require
from hetegen_compile.accelerators.cuda.pinning import SUCCESS, CudaHostMemory
from hetegen_compile.calibration.host import rotation_bytes
from hetegen_compile.calibration.kernels import Compute, cut_weights, in_place, make_arena
from hetegen_compile.calibration.timing import Effort

UPLOAD_BYTES = 2 << 30
WINDOW_S = 0.6
COLUMNS = (4096, 5120)
WEIGHT_BYTES = 64 << 20


def floor(settings: Settings, notebook: Notebook) -> None:
    """Note the rates alone and together; the floor of S bytes is S over their sum when both run."""
    device = device_of(settings)
    arena = make_arena(torch.bfloat16, max(rotation_bytes(Effort()), 1 << 30))
    weights = cut_weights(arena, WEIGHT_BYTES, COLUMNS)
    kernel = best_kernel(weights[0])
    notebook.note("kernel", kernel.name)
    compute = in_place(kernel)
    source = torch.ones(UPLOAD_BYTES, dtype=torch.uint8)
    memory = CudaHostMemory(device)
    require(memory.register(source.data_ptr(), UPLOAD_BYTES) == SUCCESS, "registering failed")
    link = Link(source, device)
    try:
        notebook.note("link_alone_bytes_per_s", link.alone())
        for threads in thread_counts(torch.get_num_threads()):
            torch.set_num_threads(threads)
            notebook.note(f"{threads} threads", together(link, compute, weights))
    finally:
        memory.unregister(source.data_ptr())


def thread_counts(most: int) -> list[int]:
    """All, all but one, all but two, and half of the threads."""
    return sorted({count for count in (most, most - 1, most - 2, most // 2) if count > 0}, reverse=True)


class Link:
    """Uploads of one registered buffer on a stream of their own."""

    def __init__(self, source: Tensor, device: torch.device) -> None:
        self._source, self._device = source, device
        self._target = torch.empty_like(source, device=device)
        self._stream = torch.cuda.Stream(device)
        self.bytes_per_s = 0.0

    def start(self, seconds: float) -> tuple[torch.cuda.Event, torch.cuda.Event, int]:
        """Queue uploads that last about so long; events around them, and their bytes."""
        count = max(1, round(seconds * self.bytes_per_s / self._source.nbytes)) if self.bytes_per_s else 1
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            start.record(self._stream)
            for _ in range(count):
                self._target.copy_(self._source, non_blocking=True)
            end.record(self._stream)
        return start, end, count * self._source.nbytes

    def alone(self) -> float:
        """Bytes per second while the host is idle."""
        self.start(0.0)
        torch.cuda.synchronize(self._device)
        start, end, nbytes = self.start(0.0)
        end.synchronize()
        self.bytes_per_s = nbytes / (start.elapsed_time(end) / 1e3)
        return self.bytes_per_s


def together(link: Link, compute: Compute, weights: Sequence[Tensor]) -> dict[str, Any]:
    """Rates of the host alone, and of both inside one window that the uploads fill."""
    tokens = {weight.shape[1]: torch.ones((1, weight.shape[1]), dtype=weight.dtype) for weight in weights}
    host_alone = _host_rate(compute, weights, tokens, None)
    start, end, nbytes = link.start(WINDOW_S)
    host = _host_rate(compute, weights, tokens, end)
    end.synchronize()
    up = nbytes / (start.elapsed_time(end) / 1e3)
    return {
        "host_alone_bytes_per_s": host_alone, "host_bytes_per_s": host, "link_bytes_per_s": up,
        "together_bytes_per_s": host + up, "host_remaining": host / host_alone, "link_remaining": up / link.bytes_per_s,
    }  # fmt: skip


def _host_rate(
    compute: Compute, weights: Sequence[Tensor], tokens: dict[int, Tensor], until: torch.cuda.Event | None
) -> float:
    """Bytes of weights per second, rotating, until the event has come (or the window is over)."""
    started, done, index = time.perf_counter(), 0, 0
    while index < 2 or not (until.query() if until else time.perf_counter() - started > WINDOW_S):
        weight = weights[index % len(weights)]
        compute(tokens[weight.shape[1]], weight)
        done += weight.nbytes
        index += 1
    return done / (time.perf_counter() - started)
