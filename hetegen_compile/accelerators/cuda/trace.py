"""Spans of CUDA streams from pairs of timing events, on the host's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.rows import Span


class CudaTracer:
    """Records spans while enabled; events are resolved when the spans are collected."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.enabled = False
        self._origin: torch.cuda.Event | None = None
        self._origin_s = 0.0
        self._pending: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []
        self._spans: list[Span] = []

    @contextmanager
    def stream_span(self, name: str, resource: str, stream: torch.cuda.Stream) -> Iterator[None]:
        """Time what is issued to ``stream`` inside the block."""
        if not self.enabled:
            yield
            return
        start, end = _timing_event(), _timing_event()
        start.record(stream)
        yield
        end.record(stream)
        self._pending.append((name, resource, start, end))

    @contextmanager
    def host_span(self, op: Op, resource: str = "host") -> Iterator[None]:
        """Time what a thread of the host does inside the block."""
        start_s = time.perf_counter()
        yield
        if self.enabled:
            self._spans += op.spans(resource, start_s, time.perf_counter())

    def collect(self, enabled: bool) -> list[Span]:
        """Switch recording on or off; the spans so far, by their start (synchronises the device)."""
        torch.cuda.synchronize(self._device)
        spans = self._spans + [self._resolve(*pending) for pending in self._pending]
        self._spans, self._pending = [], []
        self.enabled = enabled
        if enabled:
            self._origin = _timing_event()
            self._origin.record(torch.cuda.current_stream(self._device))
            self._origin.synchronize()
            self._origin_s = time.perf_counter()
        return sorted(spans, key=lambda span: span.start_s)

    def _resolve(self, name: str, resource: str, start: torch.cuda.Event, end: torch.cuda.Event) -> Span:
        assert self._origin is not None, "spans are recorded only after tracing was switched on"
        start_s = self._origin_s + self._origin.elapsed_time(start) * 1e-3
        return Span(name, resource, start_s, start_s + start.elapsed_time(end) * 1e-3)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
