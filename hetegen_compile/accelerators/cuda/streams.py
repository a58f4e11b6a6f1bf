"""The streams of a CUDA device: what is issued to them, how it is traced, and errors that name its node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.accelerators.cuda.trace import CudaTracer
from hetegen_compile.errors import AcceleratorError, AcceleratorMemoryError


class CudaStreams:
    """``compute``, ``up`` and ``down`` are the accelerator's own. In a step ``compute`` is the current one, behind what
    the caller's had been given; between steps ``compute`` is the caller's.

    The default stream, as a rule the caller's, cannot be recorded. Asking torch for the current stream takes longer
    than most of what is issued to it, so a step asks once.

    ``uploaded`` is the event of the last copy up that the step under way needs itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.up = torch.cuda.Stream(device)
        self.down = torch.cuda.Stream(device)
        self._own = torch.cuda.Stream(device)
        self.tracer = CudaTracer(device)
        self.uploaded: torch.cuda.Event | None = None
        self._callers: torch.cuda.Stream | None = None
        self._callers_device = 0

    @property
    def compute(self) -> torch.cuda.Stream:
        """The accelerator's own in a step, else the caller's current stream."""
        return torch.cuda.current_stream(self.device) if self._callers is None else self._own

    def begin_step(self) -> None:
        """Order a step after everything before it."""
        self._callers_device = torch.cuda.current_device()
        self._callers = torch.cuda.current_stream(self.device)
        for stream in (self._own, self.up, self.down):
            stream.wait_stream(self._callers)
        torch.cuda.set_stream(self._own)

    def end_step(self) -> None:
        """The caller's stream is the current one again, and its device, which setting a stream sets as well."""
        if self._callers is not None:
            torch.cuda.set_stream(self._callers)
            self._callers = None
            if self._callers_device != self.device.index:
                torch.cuda.set_device(self._callers_device)

    def synchronize_step(self) -> None:
        """Block until everything but prefetches for the next step is over."""
        with self.work(Op("end_step")):
            self.compute.synchronize()
            self.down.synchronize()
            if self.uploaded is not None:
                self.uploaded.synchronize()

    def synchronize(self) -> None:
        """Block until everything is over."""
        with self.work(Op("synchronize")):
            for stream in (self.up, self.compute, self.down):
                stream.synchronize()

    def on(self, stream: torch.cuda.Stream, resource: str, op: Op) -> AbstractContextManager[None]:
        """Issue copies to ``up`` or ``down``."""
        if self.tracer.enabled:
            return self._on_traced(stream, resource, op)
        return _Current(stream, self.compute)

    @contextmanager
    def _on_traced(self, stream: torch.cuda.Stream, resource: str, op: Op) -> Iterator[None]:
        with _Current(stream, self.compute), self.tracer.stream_span(op.name, resource, stream):
            yield

    @contextmanager
    def work(self, op: Op) -> Iterator[None]:
        """Errors of torch and CUDA name the node at which they were met."""
        try:
            yield
        except AcceleratorError:
            raise
        except RuntimeError as error:
            raise self.failure(op, error) from error

    def failure(self, op: Op, error: RuntimeError) -> AcceleratorError:
        """An error of torch or CUDA as one of ours that names the node."""
        if isinstance(error, torch.OutOfMemoryError):
            return AcceleratorMemoryError(f"{op.name} found no memory on {self.device}: {error}")
        return AcceleratorError(f"{op.name} failed on {self.device}: {error}")


class _Current:
    """``stream`` is torch's current one inside the block, ``before`` behind it.

    ``torch.cuda.stream`` asks for the device and its current stream, which both are known here; on an H200 that took
    16 us, as much as a launch, and a step issues hundreds of copies.
    """

    def __init__(self, stream: torch.cuda.Stream, before: torch.cuda.Stream) -> None:
        self._stream = stream
        self._before = before
        self._modes = copying()

    def __enter__(self) -> None:
        self._modes.__enter__()
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *raised: Any) -> None:
        torch.cuda.set_stream(self._before)
        self._modes.__exit__(*raised)


def copying() -> AbstractContextManager[object]:
    """Copies record no graph and make ordinary tensors, whatever mode the caller is in."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return _copying()
    return _COPYING_ALREADY


@contextmanager
def _copying() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


_COPYING_ALREADY = nullcontext()
