"""How much is read ahead: what pays, measured by trips."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from hetegen_compile.calibration import reading_ahead
from hetegen_compile.calibration.kernels import make_arena
from hetegen_compile.calibration.reading_ahead import Gain, choose, measure_ahead
from hetegen_compile.host_kernels import INT8PACK, LINEAR, TILED, HostKernel
from hetegen_compile.host_kernels.program import Call
from tests.calibration.tiny import TINY

EFFORT = replace(TINY, weight_bytes=(64, 1 << 18), columns=(256,))


def us(nbytes: int, spent: float, saved: float) -> Gain:
    return Gain(nbytes, spent * 1e-6, saved * 1e-6)


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ([us(2, 84, 68), us(4, 151, 121), us(8, 303, 201), us(16, 584, 365), us(32, 1173, 208)], 16),
        ([us(2, 84, 60), us(4, 151, 95), us(8, 303, 100)], 4),
        ([us(4, 135, 54), us(8, 285, 119), us(16, 590, 213), us(32, 1170, 257), us(64, 2350, -9)], 16),
        ([us(2, 84, 18), us(4, 151, 20), us(8, 303, -30)], 0),
        ([us(2, 84, -5), us(4, 151, -9)], 0),
        ([], 0),
    ],
    ids=["until caches are full", "as much by fewer", "the most, but dear", "too little", "a loss", "small weights"],
)  # fmt: skip
def test_the_fewest_bytes_that_save_the_most(gains: list[Gain], chosen: int) -> None:
    assert choose(gains) == chosen


def test_trips_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With each candidate that is not larger than the weights, by the threads that compute, beside copies."""
    read: list[int] = []
    trip, copies, found = Call.trip, threading.Semaphore(0), []

    def watched(self: Call, *arguments: object) -> int:
        found.append(torch.get_num_threads())
        code = trip(self, *arguments)  # type: ignore[arg-type]
        read.append(self.read_bytes)
        return code

    monkeypatch.setattr(Call, "trip", watched)
    monkeypatch.setattr(reading_ahead, "CANDIDATES", (1 << 16, 1 << 17, 1 << 30))
    figures = measure_ahead(make_arena(torch.bfloat16, 1 << 20), TILED, EFFORT, copies.release, 2)
    piece_bytes = 24 * 256 * 2
    assert set(read) == {0, (1 << 16) // piece_bytes * piece_bytes, (1 << 17) // piece_bytes * piece_bytes}
    assert set(found) == {2}
    assert copies.acquire(blocking=False)
    assert "64.00 KiB saves" in figures.source
    assert "128.00 KiB saves" in figures.source
    assert "GiB" not in figures.source


@pytest.mark.parametrize("kernel", [LINEAR, INT8PACK])
def test_torchs_kernels_read_nothing_ahead(kernel: HostKernel) -> None:
    figures = measure_ahead(make_arena(torch.bfloat16, 1 << 16), kernel, EFFORT, None, None)
    assert figures.nbytes == 0
    assert kernel.name in figures.source
