"""A worker's trip as one native call: wait for what comes down, compute, open the gate behind the results.

Between two trips of a worker the accelerator works alone, so whatever Python does in there is lost: to be told that an
event is over, to look at promises, to fill a buffer. With the interpreter's lock asked for half a dozen times, that was
as long as a third of the host's own work on an H200. A native call has all of it prepared by the issuing thread.

The memory would stand still meanwhile: what the program reads first is read ahead, as far as the profile says that it
is still in the processors' caches when it is computed with (``calibration.reading_ahead``).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from hetegen_compile.accelerators.cuda.gates import Gates, cuda_library
from hetegen_compile.host_kernels.program import NO_WAIT, Call, Wait

_NOT_READY = 600
"""``CUDA_ERROR_NOT_READY``: what ``cuEventQuery`` returns of an event that is not over."""


class NativeTrip:
    """Prepared: what the call reads and writes lies still until it has run. ``event`` is that of the download."""

    def __init__(self, event: torch.cuda.Event, call: Call, gates: Gates, number: int) -> None:
        self._event = event
        self._prepared = call
        self._gates = gates
        self._number = number

    @property
    def computed_s(self) -> float:
        """Seconds that it has computed, once it has run."""
        return self._prepared.ended_s

    @property
    def read_bytes(self) -> int:
        """Of weights that it has read ahead, once it has run."""
        return self._prepared.read_bytes

    def run(self) -> None:
        """On the worker. An error of the event is raised as torch raises it; nothing is computed then."""
        handle, waiting = _handle(self._event), driver_wait()
        if not (handle and waiting.wait) or self._travel(waiting, handle):
            self._event.synchronize()
            self._travel(NO_WAIT, None)

    def _travel(self, waiting: Wait, handle: int | None) -> int:
        return self._prepared.trip(waiting, handle, self._gates.address, self._number)


def _handle(event: torch.cuda.Event) -> int:
    """The driver's handle of a recorded event."""
    return int(getattr(event, "cuda_event", 0) or 0)


@cache
def driver_wait() -> Wait:
    """The driver's ``cuEventSynchronize`` and ``cuEventQuery``; nothing without a driver that has them."""
    try:
        driver = cuda_library()
        functions = driver.cuEventSynchronize, driver.cuEventQuery
    except (OSError, AttributeError):
        return NO_WAIT
    wait, pending = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    return Wait(wait, pending, _NOT_READY)


__all__ = ["NativeTrip", "driver_wait"]
