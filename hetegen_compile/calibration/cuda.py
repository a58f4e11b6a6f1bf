"""Measure the current CUDA device and the link to it, but for what gates cost (``gating``).

Run on an H200 (benchmarks/results/gpu_h200.md). Tests use stand-ins.

Work that the device times itself is queued behind a kernel that spins, so that what lies between two events
was issued before the first of them: the figures do not include the time that Python takes to issue it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hetegen_compile.accelerators import Accelerator, CudaAccelerator, Op
from hetegen_compile.accelerators.cuda.pinning import cuda_view
from hetegen_compile.calibration.host import copy_bytes
from hetegen_compile.calibration.timing import Effort, durations_s, median_s
from hetegen_compile.cost_model import AcceleratorProfile, LinkDirection, LinkProfile, RateCurve
from hetegen_compile.geometry import dtype_name
from hetegen_compile.passes.segment_calls import with_declared_strides
from hetegen_compile.steps.segments import inductor_compiler
from hetegen_compile.system import host_memory_bytes, last_level_cache_bytes

logger = logging.getLogger("hetegen_compile")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TRANSFER_BYTES = (16_000, 64_000, 250_000, 1_000_000, 4_000_000, 16_000_000, 64_000_000)

STEPS = len(DTYPES) + 2 * len(TRANSFER_BYTES) + 2
"""How often ``measure_cuda`` reports progress."""

_BATCH = 8
_SPIN_CYCLES = 1_000_000
_VIEW_BYTES = 16_384
_SMALLEST_BYTES = 64
_COLUMNS = 8192
_ISSUES, _ROUNDS = 8, 20


@dataclass(frozen=True)
class CudaSizes:
    """Sizes of what is measured (smaller in tests): GEMM's square, copies on the device, transfers."""

    square: int = 4096
    memory_bytes: int = 128 << 20
    transfer_bytes: tuple[int, ...] = TRANSFER_BYTES


@dataclass(frozen=True)
class AcceleratorFigures:
    """The parts of a profile that belong to the accelerator and the link."""

    accelerator: AcceleratorProfile
    link: LinkProfile
    synchronise_s: float
    fixed_s_per_split: float
    pin_bytes_per_s: float


class CudaMeter:
    """Measurements on one device, through the caller's current stream."""

    accelerator: Callable[[], Accelerator] = CudaAccelerator
    """Makes what issues as a step does."""

    def __init__(self, device: torch.device, effort: Effort, sizes: CudaSizes) -> None:
        self.device = device
        self.effort = replace(effort, budget_s=effort.budget_s / 2)
        self.sizes = sizes
        largest = max(*sizes.transfer_bytes, _VIEW_BYTES)
        self._on_device = torch.zeros(largest, dtype=torch.uint8, device=device)
        self._pinned = pinned_zeros(largest)
        self._pageable = torch.zeros(largest, dtype=torch.uint8, device="cpu")

    def queued_s(self, work: Callable[[], object], batch: int = _BATCH) -> float:
        """Median device seconds of ``work`` when ``batch`` of them are queued back to back."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        elapsed: list[float] = []

        def once(_: int) -> None:
            torch.cuda._sleep(_SPIN_CYCLES)
            start.record(torch.cuda.current_stream(self.device))
            for _ in range(batch):
                work()
            end.record(torch.cuda.current_stream(self.device))
            end.synchronize()
            elapsed.append(max(start.elapsed_time(end) / 1e3 / batch, 1e-9))

        durations_s(once, self.effort)
        return sorted(elapsed[1:])[len(elapsed[1:]) // 2]  # the first was the warm-up

    def blocking_s(self, work: Callable[[], object]) -> float:
        """Median seconds of the host from calling ``work`` until the device has finished it."""

        def once() -> None:
            work()
            torch.cuda.synchronize(self.device)

        return median_s(once, self.effort)

    def direction(self, *, up: bool, step: Callable[[str], None]) -> LinkDirection:
        """Rates by transfer size, pinned (queued) and pageable (blocking), and the latency."""
        pinned, pageable = [], []
        for nbytes in self.sizes.transfer_bytes:
            step(f"link {'up' if up else 'down'}, {nbytes} bytes")
            seconds = self.queued_s(self._copy(self._pinned, nbytes, up=up))
            pinned.append((float(nbytes), nbytes / seconds))
            seconds = self.blocking_s(self._copy(self._pageable, nbytes, up=up))
            pageable.append((float(nbytes), nbytes / seconds))
        latency_s = self.queued_s(self._copy(self._pinned, _SMALLEST_BYTES, up=up))
        return LinkDirection(RateCurve(tuple(pinned)), RateCurve(tuple(pageable)), latency_s)

    def gemm_flops_per_s(self, dtype: torch.dtype) -> float:
        """FLOP/s of the product of two square matrices."""
        size = self.sizes.square
        left = torch.full((size, size), 0.01, dtype=dtype, device=self.device)
        out = torch.empty_like(left)
        return 2.0 * size**3 / self.queued_s(lambda: torch.mm(left, left, out=out), batch=2)

    def memory_bytes_per_s(self) -> float:
        """Bytes read and written per second by a copy within the device's memory."""
        source = torch.zeros(self.sizes.memory_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * source.nbytes / self.queued_s(lambda: target.copy_(source))

    def launch_s(self) -> float:
        """Seconds from one launch to the next when one thread issues small kernels without a pause."""
        x = torch.zeros(1, device=self.device, dtype=torch.float32)
        launches = 200

        def launch() -> None:
            for _ in range(launches):
                x.add_(1)

        return self.blocking_s(launch) / launches

    def synchronise_s(self) -> float:
        """Seconds of recording an event behind a finished kernel and waiting for it."""
        event = torch.cuda.Event()

        def wait() -> None:
            event.record(torch.cuda.current_stream(self.device))
            event.synchronize()

        return median_s(wait, self.effort)

    def view_s(self) -> float:
        """Seconds of a kernel that reads a small pinned buffer over the link; 0 where views do not work."""
        out = torch.empty(_VIEW_BYTES, dtype=torch.uint8, device=self.device)
        try:
            view = cuda_view(self._pinned[:_VIEW_BYTES], self.device)
        except RuntimeError as error:
            logger.warning("pinned memory cannot be viewed from the device: %s", error)
            return 0.0
        return self.queued_s(lambda: out.copy_(view))

    def trip_s(self) -> float:
        """Seconds of one trip of a small activation: down, a host operation on it, its result up and used."""
        x = torch.ones((1, 64), dtype=torch.float32, device=self.device)
        weight = torch.ones((64, 64), dtype=torch.float32, device="cpu")
        down = self._pinned[:256].view(torch.float32).view(1, 64)
        event = torch.cuda.Event()

        def trip() -> None:
            down.copy_(x, non_blocking=True)
            event.record(torch.cuda.current_stream(self.device))
            event.synchronize()
            down.copy_(F.linear(down, weight))
            x.add_(down.to(self.device, non_blocking=True))

        return self.blocking_s(trip)

    def pin_bytes_per_s(self) -> float:
        """Bytes per second that one thread copies from pageable into pinned memory."""
        seconds = median_s(lambda: copy_bytes(self._pinned, self._pageable), self.effort)
        return self._pinned.nbytes / seconds

    def load(self) -> None:
        """Keep the link up busy for some milliseconds, without occupying a processor while it lasts.

        It reads more than the processor's caches hold, as weights are.
        """
        done = torch.cuda.Event()
        for part in self._more_than_caches.split(self._on_device.numel()):
            self._copy(part, part.numel(), up=True)()
        done.record(torch.cuda.current_stream(self.device))
        while not done.query():
            time.sleep(2e-4)

    @cached_property
    def _more_than_caches(self) -> Tensor:
        most = host_memory_bytes() // 16
        return pinned_zeros(max(min(4 * last_level_cache_bytes(), most), _BATCH * self._pinned.nbytes))

    def issue_s(self) -> float:
        """Seconds of the host thread for issuing a Linear of one token."""
        x = torch.ones((1, 64), dtype=torch.bfloat16, device=self.device)
        weight = torch.ones((64, 64), dtype=torch.bfloat16, device=self.device)
        return self._issuing_s(partial(F.linear, x, weight))

    def segment_issue_s(self) -> float:
        """Seconds of the host thread for issuing a small compiled segment; 0 where none can be compiled."""
        try:
            segment, examples = small_segment(self.device)
        except Exception as error:  # whatever Inductor raises: the figure is an estimate of Linears' then
            logger.warning("no segment can be compiled for %s: %s", self.device, error)
            return 0.0
        return self._issuing_s(partial(segment, *examples))

    def _issuing_s(self, function: Callable[[], object]) -> float:
        """Issued by an accelerator as in a step: behind a host Linear, which leaves nothing of Python in the caches.

        On a 16-core virtual machine with an H200 what took 15 us in a loop took 40 to 90 us in a step.
        """
        accelerator, op = self.accelerator(), Op("calibration")
        rows = self._pageable[: self._pageable.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
        weight, x = rows.view(torch.bfloat16), torch.ones((1, _COLUMNS // 2), dtype=torch.bfloat16, device="cpu")
        found: list[float] = []
        try:
            accelerator.begin_step()
            for _ in range(_ROUNDS):
                accelerator.host(op, F.linear, (x, weight), {})
                started = time.perf_counter()
                for _ in range(_ISSUES):
                    accelerator.launch(op, function, ())
                found.append((time.perf_counter() - started) / _ISSUES)
            accelerator.end_step()
        finally:
            accelerator.close()
        return median(found[1:])

    def _copy(self, host: Tensor, nbytes: int, *, up: bool) -> Callable[[], object]:
        source, target = host[:nbytes], self._on_device[:nbytes]
        if up:
            return lambda: target.copy_(source, non_blocking=True)
        return lambda: source.copy_(target, non_blocking=True)


def measure_cuda(meter: CudaMeter, step: Callable[[str], None]) -> AcceleratorFigures:
    """Measure the device and the link; ``step`` is called with the name of each figure before it is measured."""
    flops: dict[str, float] = {}
    for dtype in DTYPES:
        step(f"GPU arithmetic, {dtype_name(dtype)}")
        flops[dtype_name(dtype)] = meter.gemm_flops_per_s(dtype)
    up = meter.direction(up=True, step=step)
    down = meter.direction(up=False, step=step)
    step("GPU memory and launch")
    accelerator = AcceleratorProfile(
        name=torch.cuda.get_device_name(meter.device),
        flops_per_s=flops,
        memory_bytes_per_s=meter.memory_bytes_per_s(),
        launch_s=meter.launch_s(),
        memory_bytes=torch.cuda.get_device_properties(meter.device).total_memory,
        issue_s=meter.issue_s(),
        segment_issue_s=meter.segment_issue_s(),
    )
    step("waits, views and pinning")
    return AcceleratorFigures(
        accelerator=accelerator,
        link=LinkProfile(up, down, view_s=meter.view_s() or up.latency_s),
        synchronise_s=meter.synchronise_s(),
        fixed_s_per_split=meter.trip_s(),
        pin_bytes_per_s=meter.pin_bytes_per_s(),
    )


def small_segment(device: torch.device) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """One kernel that Inductor makes of what stands between two Linears, as steps call it, and its arguments."""
    graph = fx.symbolic_trace(lambda x, y: (F.rms_norm(x + F.silu(y), (64,)),))
    mode = FakeTensorMode()
    with mode:
        fakes = [torch.empty((1, 64), dtype=torch.bfloat16, device=device) for _ in range(2)]
    examples = tuple(torch.ones((1, 64), dtype=torch.bfloat16, device=device) for _ in range(2))
    return with_declared_strides(inductor_compiler(mode)(graph, fakes), fakes[:1]), examples


def pinned_zeros(nbytes: int) -> Tensor:
    """A pinned host buffer of bytes."""
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
