"""Measure how much of a weight is worth reading before its activations are there.

Between two trips of the host's worker the accelerator works alone and main memory has room. What is read of the next
weight meanwhile comes out of the processors' caches later; beyond what they hold, it is read twice. How much that is
differs: caches are shared with other machines' guests, and a cache may keep or drop what is read once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from hetegen_compile.calibration.beside import computing_with, repeatedly
from hetegen_compile.calibration.kernels import cut_weights
from hetegen_compile.calibration.timing import Effort
from hetegen_compile.host_kernels import HostKernel, HostLinear
from hetegen_compile.host_kernels.program import Call, HostProgram, Place, Step, Wait
from hetegen_compile.host_kernels.vectorised import library
from hetegen_compile.options import format_bytes

logger = logging.getLogger("hetegen_compile")

CANDIDATES = tuple(megabytes << 20 for megabytes in (2, 4, 8, 16, 32, 64))
"""Bytes to read ahead; the gaps of a step, some hundred microseconds, have room for a few dozen MiB at most."""

_LEAST_GAIN = 0.25
"""Of the seconds that reading ahead takes: what saves less disturbs the link for next to nothing."""
_NEARLY = 0.9
"""Of the most that is saved: fewer bytes that save as much are taken."""
_CALLS = 5
"""Of each candidate, times the effort's repeats."""


class Gain(NamedTuple):
    """Of reading so many bytes ahead: the seconds that it takes, and those that the Linear then takes less."""

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
    weights = cut_weights(arena, max(effort.weight_bytes), effort.columns)
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
    """The fewest bytes that save nearly the most, 0 if that is too little."""
    most_s = max((one.saved_s for one in gains), default=0.0)
    best = next((one for one in gains if one.saved_s >= _NEARLY * most_s), None)
    return best.nbytes if best is not None and best.saved_s > _LEAST_GAIN * best.spent_s else 0


def _gains(weights: Sequence[Tensor], kernel: HostKernel, effort: Effort) -> tuple[list[Gain], float]:
    """Of each candidate, and the Linear's seconds behind none: medians of calls by turns."""
    sizes = (0, *(size for size in CANDIDATES if size <= max(weight.nbytes for weight in weights)))
    waiting = Wait(None, library().still_pending, 1)
    calls = [[linear_call(weight, kernel, size) for weight in weights] for size in sizes]
    spent_s: list[list[float]] = [[] for _ in sizes]
    linear_s: list[list[float]] = [[] for _ in sizes]
    turn = 0
    for _ in range(_CALLS * effort.repeats):
        for index, own in enumerate(calls):
            call, turn = own[turn % len(own)], turn + 1
            began_s = time.perf_counter()
            call.trip(waiting)
            linear_s[index].append(call.ended_s)
            spent_s[index].append(time.perf_counter() - began_s - call.ended_s)
    without, waited = median(linear_s[0]), median(spent_s[0])
    gains = [
        Gain(size, max(0.0, median(spent) - waited), without - median(linear))
        for size, spent, linear in zip(sizes[1:], spent_s[1:], linear_s[1:], strict=True)
    ]
    return gains, without


def linear_call(weight: Tensor, kernel: HostKernel, ahead_bytes: int) -> Call:
    """A Linear of one token with a weight [out, in], by a kernel of our own, that may read so much of it ahead."""
    linear = HostLinear(0, weight.shape[0], 0, ((math.inf, kernel),))
    program = HostProgram([Step(linear, (0, 1, None), (Place(0), Place(1), None), {})], 2, (2,), ahead_bytes)
    x = torch.full((1, weight.shape[1]), 0.5, dtype=weight.dtype, device="cpu")
    form = program.form((x, weight))
    assert form is not None, "kernels of our own take it"
    return Call(form, (x, weight), [torch.empty((1, weight.shape[0]), dtype=weight.dtype, device="cpu")])


__all__ = ["CANDIDATES", "AheadFigures", "Gain", "choose", "linear_call", "measure_ahead"]
