"""Launches behind a closed gate: the device waits for a number in pinned memory that the host writes later.

A step could issue what depends on the host's part while that is computed. What a gate costs, how soon the device goes
on when it opens, and what the driver does not do before it has opened decide whether that pays and what it must avoid.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.settings import require
from hetegen_compile.accelerators.cuda.gates import Gates

LINKS = 12
"""Launches behind one gate: about a layer's."""

_REPEATS = 20
_CLOSED_S = 0.05


class _Gate:
    """The newest of the gates of one stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._gates = Gates()
        self._stream = stream
        self._number = 0

    def close(self) -> None:
        """What is issued from here on waits."""
        self._number = self._gates.number()
        self._gates.close(self._number, self._stream)

    def open(self) -> None:
        """Let go of what waits."""
        self._gates.open(self._number)


def gates(device: torch.device) -> dict[str, dict[str, float]]:
    """The figures on a stream of one's own and on the current one, which steps use: as a rule the default stream."""
    streams = {"own stream": torch.cuda.Stream(device), "current stream": torch.cuda.current_stream(device)}
    return {name: _on(stream, device) for name, stream in streams.items()}


def _on(stream: torch.cuda.Stream, device: torch.device) -> dict[str, float]:
    """Seconds of issuing a gate, and from its opening, or from the first launch, until a layer's launches are done."""
    gate = _Gate(stream)
    x = torch.ones((1, 4096), dtype=torch.bfloat16, device=device)
    weight = torch.ones((4096, 4096), dtype=torch.bfloat16, device=device)

    def layer() -> None:
        for _ in range(LINKS):
            F.linear(x, weight)

    with torch.cuda.stream(stream), torch.no_grad():
        layer()
        torch.cuda.synchronize(device)
        return {
            "issue of a gate": _median(lambda: _timed(gate.close, gate.open)),
            "launches issued when the host is ready": _median(lambda: _from_now(layer, stream)),
            "launches issued behind a gate": _median(lambda: _from_opening(gate, layer, stream)),
            "cudaMalloc behind a closed gate": _while_closed(gate, _malloc),
            "pinned allocation behind a closed gate": _while_closed(gate, _pinned),
            "cudaFree behind a closed gate": _while_closed(gate, _free),
        }


def _median(work: Callable[[], float]) -> float:
    return statistics.median(work() for _ in range(_REPEATS))


def _timed(work: Callable[[], None], after: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    after()
    return seconds


def _from_now(layer: Callable[[], None], stream: torch.cuda.Stream) -> float:
    started = time.perf_counter()
    layer()
    stream.synchronize()
    return time.perf_counter() - started


def _from_opening(gate: _Gate, layer: Callable[[], None], stream: torch.cuda.Stream) -> float:
    gate.close()
    try:
        layer()
    finally:
        started = time.perf_counter()
        gate.open()
    stream.synchronize()
    return time.perf_counter() - started


def _while_closed(gate: _Gate, work: Callable[[], None]) -> float:
    """Seconds of ``work`` while a gate is closed that another thread opens after ``_CLOSED_S``."""
    work()
    gate.close()
    timer = threading.Timer(_CLOSED_S, gate.open)
    timer.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    timer.join()
    torch.cuda.synchronize()
    return seconds


def _malloc() -> None:
    pointer = ctypes.c_void_p()
    cuda = ctypes.CDLL("libcuda.so.1")
    code = cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(64 << 20))
    require(code == 0, f"cuMemAlloc failed with error {code}")
    _kept.append(pointer)


def _free() -> None:
    """Waits for the device, so it takes as long as the gate is closed; it must not take longer."""
    if _kept and isinstance(_kept[0], ctypes.c_void_p):
        ctypes.CDLL("libcuda.so.1").cuMemFree_v2(ctypes.c_uint64(_kept.pop(0).value or 0))


def _pinned() -> None:
    _kept.append(torch.empty(32 << 20, dtype=torch.uint8, pin_memory=True))


_kept: list[Any] = []
