"""A worker's trip as one native call: wait for what comes down, compute, open the gate behind the results.

Between two trips of a worker the accelerator works alone, so whatever Python does in there is lost: to be told that an
event is over, to look at promises, to fill a buffer. With the interpreter's lock asked for half a dozen times, that was
as long as a third of the host's own work on an H200. A native call has all of it prepared by the issuing thread.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from hetegen_compile.accelerators.cuda.gates import Gates, cuda_library
from hetegen_compile.host_kernels.program import Call
from hetegen_compile.host_kernels.vectorised import library


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

    def run(self) -> None:
        """On the worker. An error of the event is raised as torch raises it; nothing is computed then."""
        handle, wait = _handle(self._event), wait_address()
        if not (handle and wait) or self._call(wait, handle):
            self._event.synchronize()
            self._call(None, None)

    def _call(self, wait: int | None, handle: int | None) -> int:
        failed: int = library().run_trip(wait, handle, self._prepared.address, self._gates.address, self._number)
        return failed


def _handle(event: torch.cuda.Event) -> int:
    """The driver's handle of a recorded event."""
    return int(getattr(event, "cuda_event", 0) or 0)


@cache
def wait_address() -> int | None:
    """Where the driver's ``cuEventSynchronize`` lies; None without a driver that has it."""
    try:
        return ctypes.cast(cuda_library().cuEventSynchronize, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


__all__ = ["NativeTrip", "wait_address"]
