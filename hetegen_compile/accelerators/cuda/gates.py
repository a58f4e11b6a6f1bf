"""Gates: a stream waits for a number in pinned memory, which the host writes later.

So work can be issued before what it reads is there. A launch behind a closed gate costs what it always costs; when the
gate opens the device goes on by itself. Gates are opened in the order of their numbers, and each number opens all
gates before it. On an H200 closing one took 3.8 us, and neither ``cuMemAlloc`` nor a pinned allocation waited for
a closed one.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import torch

from hetegen_compile.accelerators.geometry import empty_twin
from hetegen_compile.errors import AcceleratorError

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_WAIT_UNTIL_GREATER_OR_EQUAL = 0
_WRAP = 1 << 32
_ORDERED_STORES = ("x86_64", "amd64")
"""Machines on which other devices see a thread's stores in their order: the result, then the number."""


class Gates:
    """The gates of one device, numbered from 1 on; 32 bits that wrap around, which the device compares as such."""

    def __init__(self) -> None:
        geometry = torch.empty(1, dtype=torch.int32, device="meta")
        self._pinned = empty_twin(geometry, torch.device("cpu"), pinned=True)
        self._pinned.zero_()
        self._seen = ctypes.c_uint32.from_address(self._pinned.data_ptr())
        self._last = 0

    @property
    def address(self) -> int:
        """Where the number lies that opens gates: 32 bits."""
        return self._pinned.data_ptr()

    def number(self) -> int:
        """A new gate."""
        self._last = (self._last + 1) % _WRAP
        return self._last

    def close(self, number: int, stream: torch.cuda.Stream) -> None:
        """What is issued to ``stream`` from here on waits until that gate opens (or has opened)."""
        address = self._pinned.data_ptr()
        code = _wait_function()(stream.cuda_stream, address, number, _WAIT_UNTIL_GREATER_OR_EQUAL)
        if code:
            raise AcceleratorError(
                f"the driver refused to wait for a number in memory (error {code}): set options={{'issue_ahead': "
                "False}, which needs no such waits"
            )

    def open(self, number: int) -> None:
        """Let go of what waits for this gate, or for one before it."""
        self._seen.value = number


@cache
def why_no_gates() -> str:
    """Why gates cannot be used on this machine, or ""."""
    if platform.machine().lower() not in _ORDERED_STORES:
        return f"a {platform.machine()} processor may show its stores to the device in another order"
    try:
        _wait_function()
    except (OSError, AttributeError) as error:
        return f"the driver has no cuStreamWaitValue32 ({error})"
    return ""


@cache
def _wait_function() -> Any:
    """``cuStreamWaitValue32`` of the driver, whose stream is that of the calling thread's context."""
    function = cuda_library().cuStreamWaitValue32_v2
    function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function


def cuda_library() -> ctypes.CDLL:
    """The driver's library; OSError without one."""
    errors = []
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
    raise OSError("; ".join(errors))


__all__ = ["Gates", "cuda_library", "why_no_gates"]
