"""Measure how much of a weight is worth reading before its activations are there.

Between two trips of the host's worker the accelerator works alone and main memory has room. What is read of the next
weight meanwhile comes out of the processors' caches later; beyond what they hold, it is read twice. How much that is
differs: caches are shared with other machines' guests, and a cache may keep or drop what is read once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from hetegen_compile.calibration.beside import computing_with, repeatedly
from hetegen_compile.calibration.kernels import as_program, cut_weights
from hetegen_compile.calibration.timing import Effort
from hetegen_compile.host_kernels import HostKernel
from hetegen_compile.host_kernels.program import Call, Wait
from hetegen_compile.host_kernels.vectorised import library
from hetegen_compile.options import format_bytes

logger = logging.getLogger("hetegen_compile")

CANDIDATES = tuple(megabytes << 20 for megabytes in (2, 4, 8, 16, 32, 64))
"""Bytes to read ahead; the gaps of a step, some hundred microseconds, have room for a few dozen MiB at most."""

_LEAST_GAIN = 0.25
"""Of the seconds that reading ahead takes: what saves less disturbs the link for next to nothing."""
_NEARLY = 0.9
"""Of the most that is saved: fewer bytes that save as much are taken."""
_CALLS = 20
"""Of each candidate, times the effort's repeats: two seconds where a Linear takes two milliseconds."""


class Gain(NamedTuple):
    """Of reading so many bytes ahead: the seconds that it takes, and those that the Linear then takes less, which are
    no more."""

    nbytes: int
    spent_s: float
    saved_s: float


@dataclass(frozen=True)
class AheadFigures:
    """What is read ahead at most (0: nothing), and how that was found, as text."""

    nbytes: int
    source: str


def measure_ahead(
    arena: Tensor, kernel: HostKernel, effort: Effort, copy: Callable[[], object] | None, threads: int | None
) -> AheadFigures:
    """Time Linears of one token behind reading ahead.

    Args:
        arena: memory that weights are cut from.
        kernel: computes them; only programs of our own kernels read ahead.
        effort: how much is measured.
        copy: what goes on beside it, by itself; None: nothing.
        threads: that compute; None: all.
    """
    if kernel.reading is None or not library().programs:
        return AheadFigures(0, f"nothing: '{kernel.name}' reads nothing ahead")
    weights = cut_weights(arena, max(effort.weight_bytes), effort.columns[:1])  # all take as long
    with nullcontext() if copy is None else repeatedly(copy, effort.clock), computing_with(threads):
        gains, linear_s = _gains(weights, kernel, effort)
    chosen = choose(gains)
    found = ", ".join(
        f"{format_bytes(one.nbytes)} saves {one.saved_s * 1e6:.0f} us of {one.spent_s * 1e6:.0f}" for one in gains
    )
    source = f"measured: read before a Linear of one token and {linear_s * 1e6:.0f} us: {found}"
    logger.info("%s are read ahead; %s", format_bytes(chosen), source)
    return AheadFigures(chosen, source)


def choose(gains: Sequence[Gain]) -> int:
    """Of those that save enough, the fewest bytes that save nearly the most; 0 if there are none."""
    worth = [one for one in gains if one.saved_s > _LEAST_GAIN * one.spent_s]
    most_s = max((one.saved_s for one in worth), default=0.0)
    return next((one.nbytes for one in worth if one.saved_s >= _NEARLY * most_s), 0)


def _gains(weights: Sequence[Tensor], kernel: HostKernel, effort: Effort) -> tuple[list[Gain], float]:
    """Of each candidate of which something is read, and the Linear's seconds behind none.

    Medians over rounds through all of them, of what a round's Linear takes less than that round's behind none.
    """
    sizes = (0, *(size for size in CANDIDATES if size <= weights[0].nbytes))
    calls = [[linear_call(weight, kernel, size) for weight in weights] for size in sizes]
    timed: list[list[_Timed]] = [[] for _ in sizes]
    turn = 0
    for _ in range(_CALLS * effort.repeats):
        for own, found in zip(calls, timed, strict=True):
            found.append(_timed(own[turn % len(own)]))
            turn += 1
    without, *behind = timed
    gains = []
    for size, found in zip(sizes[1:], behind, strict=True):
        spent_s = median(one.spent_s for one in found) - median(one.spent_s for one in without)
        saved_s = median(none.linear_s - one.linear_s for none, one in zip(without, found, strict=True))
        if max(one.read_bytes for one in found) and spent_s > 0:
            gains.append(Gain(size, spent_s, min(saved_s, spent_s)))
    return gains, median(one.linear_s for one in without)


class _Timed(NamedTuple):
    """A trip: until it computes, while it computes, and what it read meanwhile."""

    spent_s: float
    linear_s: float
    read_bytes: int


def _timed(call: Call) -> _Timed:
    began_s = time.perf_counter()
    call.trip(Wait(None, library().still_pending, 1))
    return _Timed(time.perf_counter() - began_s - call.ended_s, call.ended_s, call.read_bytes)


def linear_call(weight: Tensor, kernel: HostKernel, ahead_bytes: int) -> Call:
    """A Linear of one token with a weight [out, in], by a kernel of our own, that may read so much of it ahead."""
    x = torch.full((1, weight.shape[1]), 0.5, dtype=weight.dtype, device="cpu")
    form = as_program(kernel, weight, ahead_bytes).form((x, weight))
    assert form is not None, "kernels of our own take it"
    return Call(form, (x, weight), [torch.empty((1, weight.shape[0]), dtype=weight.dtype, device="cpu")])


__all__ = ["CANDIDATES", "AheadFigures", "Gain", "choose", "linear_call", "measure_ahead"]
