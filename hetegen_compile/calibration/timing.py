"""How calibration takes time: repeated short calls within a budget, and their median."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

MAX_REPEATS = 1000


@dataclass(frozen=True)
class Effort:
    """How much is measured; the defaults keep a calibration without a GPU under a minute.

    Attributes:
        tokens: numbers of tokens at which host Linears are timed, ascending.
        sized_tokens: up to this number they are timed at every size of ``weight_bytes``.
        weight_bytes: sizes of the weights, ascending.
        arithmetic_bytes: the one of them at which more tokens are timed.
        columns: in features of the weights, used in turn.
        kernel_tokens: numbers of tokens at which kernels that copy weights are timed too; some of ``tokens``.
        rotate_bytes: weights to rotate over; None: 16 times the last-level cache, at least 128 MiB.
        square: tokens, in and out features of the Linear that measures arithmetic.
        linear_budget_s: seconds for one kernel at one point in one round.
        budget_s: seconds for another figure, once it has been repeated often enough.
        repeats: rounds, and calls that a median needs at least.
        clock: monotonic seconds.
    """

    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    sized_tokens: int = 16
    weight_bytes: tuple[int, ...] = (1 << 17, 1 << 20, 1 << 23, 1 << 26)
    arithmetic_bytes: int = 1 << 23
    columns: tuple[int, ...] = (4096, 2048, 8192)
    kernel_tokens: tuple[int, ...] = (1, 4)
    rotate_bytes: int | None = None
    square: int = 1024
    linear_budget_s: float = 0.02
    budget_s: float = 0.3
    repeats: int = 3
    clock: Callable[[], float] = time.perf_counter


def durations_s(call: Callable[[int], object], effort: Effort) -> list[float]:
    """Seconds of ``call(0)``, ``call(1)``, ...: at least ``repeats`` of them, then until the budget is spent.

    One ``call(0)`` before them is not counted. No duration is 0, so that rates stay finite.
    """
    call(0)
    durations: list[float] = []
    end_s = effort.clock() + effort.budget_s
    while len(durations) < effort.repeats or (effort.clock() < end_s and len(durations) < MAX_REPEATS):
        start_s = effort.clock()
        call(len(durations))
        durations.append(max(effort.clock() - start_s, 1e-9))
    return durations


def median_s(call: Callable[[], object], effort: Effort) -> float:
    """Median seconds of one call."""
    return median(durations_s(lambda _: call(), effort))


@contextmanager
def plain_torch() -> Iterator[None]:
    """Real tensors, no gradients, no autocast: the first call measures in the middle of a compilation."""
    with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield
