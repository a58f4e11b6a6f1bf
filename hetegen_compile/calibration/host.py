"""Measure the processor and its memory: Linears, arithmetic, copies, launches, contention."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.calibration.beside import computing_with, repeatedly
from hetegen_compile.calibration.kernels import cut_weights, in_place, kernel_rate, make_arena
from hetegen_compile.calibration.linears import LinearFigures, linear_steps, measure_linears
from hetegen_compile.calibration.reading_ahead import AheadFigures, measure_ahead
from hetegen_compile.calibration.timing import Effort, median_s
from hetegen_compile.cost_model import HostProfile, RateTable
from hetegen_compile.geometry import dtype_name
from hetegen_compile.host_kernels import KERNELS
from hetegen_compile.system import cpu_model, host_memory_bytes, last_level_cache_bytes

logger = logging.getLogger("hetegen_compile")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)

_AHEAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of the weights that are read ahead: the first whose kernel can. How many bytes caches hold is the same of each."""

MIN_ROTATE_BYTES = 128 << 20

_CACHES, _FEW_CACHES = 16, 4

_LAUNCHES = 100


class Remaining(NamedTuple):
    """Shares in (0, 1] of their rates that remain to large one-token Linears and to copies while both are at work."""

    linears: float
    copies: float


@dataclass(frozen=True)
class HostFigures:
    """The host's profile; per dtype how its kernels compare, as text; the copies' ``Remaining``; what is read ahead."""

    profile: HostProfile
    comparison: Mapping[str, str]
    copies: float
    ahead: AheadFigures


def host_steps(effort: Effort) -> int:
    """How often ``measure_host`` reports progress."""
    floating = sum(dtype.is_floating_point for dtype in DTYPES)
    return linear_steps(DTYPES, effort) + 2 * floating + 3


def measure_host(
    effort: Effort, copy: Callable[[], object] | None, step: Callable[[str], None], threads: int | None = None
) -> HostFigures:
    """Measure the host.

    Args:
        effort: how much is measured.
        copy: moves some data over the link, which competes for main memory; None: a copy within main memory.
        step: called with the name of each figure before it is measured.
        threads: that compute beside copies; None: all.
    """
    rotate_bytes = rotation_bytes(effort)
    copied_bytes = max(rotate_bytes // 4, min(rotate_bytes, MIN_ROTATE_BYTES))
    uploads, copy = copy, copy or memory_copy(copied_bytes)
    memory = make_arena(torch.uint8, rotate_bytes)
    step("host launch")
    fixed_s = launch_s(effort)
    linears: dict[str, LinearFigures] = {}
    flops: dict[str, float] = {}
    shares: list[Remaining] = []
    for dtype in DTYPES:
        name = dtype_name(dtype)
        arena = memory.view(dtype)
        linears[name] = measure_linears(arena, effort, fixed_s, step)
        flops[name] = _linear_flops(linears[name].table, dtype)
        if dtype.is_floating_point:
            step(f"host arithmetic, {name}")
            flops[name] = max(flops[name], arithmetic_rate(dtype, effort))
            step(f"host Linear during copies, {name}")
            shares.append(remaining(arena, linears[name], copy, effort, threads))
    step("reading ahead")
    kernels = {dtype: KERNELS[linears[dtype_name(dtype)].kernels.at(1)] for dtype in _AHEAD_DTYPES}
    dtype = next((one for one, kernel in kernels.items() if kernel.reading is not None), _AHEAD_DTYPES[0])
    ahead = measure_ahead(memory.view(dtype), kernels[dtype], effort, uploads, threads)
    del memory, arena
    step("host memory")
    profile = HostProfile(
        name=cpu_model(),
        cores=torch.get_num_threads(),
        flops_per_s=flops,
        memory_bytes_per_s=memory_bytes_per_s(copied_bytes, effort),
        linear_bytes_per_s={name: figures.table for name, figures in linears.items()},
        launch_s=fixed_s,
        contention=median(share.linears for share in shares),
        memory_bytes=host_memory_bytes(),
        linear_kernels={name: figures.kernels for name, figures in linears.items()},
        ahead_bytes=ahead.nbytes,
    )
    comparison = {name: figures.comparison for name, figures in linears.items()}
    return HostFigures(profile, comparison, median(share.copies for share in shares), ahead)


def rotation_bytes(effort: Effort) -> int:
    """Bytes of weights to rotate over: 16 times the last-level cache, at most 1/16 of main memory.

    Caches that do not drop the oldest line first keep a part of anything that is not much larger: weights of 1.5 times
    a cache of 300 MiB were read at twice the speed of main memory, and of 4 times at 1.2 times what a step then got.
    """
    if effort.rotate_bytes is not None:
        return effort.rotate_bytes
    cache_bytes, least = last_level_cache_bytes(), max(MIN_ROTATE_BYTES, 2 * max(effort.weight_bytes))
    wanted, most = max(_CACHES * cache_bytes, least), host_memory_bytes() // 16
    if most < max(_FEW_CACHES * cache_bytes, least):
        logger.warning("weights rotate over %d MiB only (1/16 of main memory): rates may be the cache's", most >> 20)
    return min(wanted, most)


def arithmetic_rate(dtype: torch.dtype, effort: Effort) -> float:
    """FLOP/s of a square Linear on as many tokens."""
    x = torch.full((effort.square, effort.square), 0.01, dtype=dtype, device="cpu")
    weight = x.clone()
    return 2.0 * effort.square**3 / median_s(lambda: F.linear(x, weight), effort)


def memory_bytes_per_s(nbytes: int, effort: Effort) -> float:
    """Bytes read and written per second by a copy of ``nbytes`` with all threads."""
    source = torch.ones(nbytes, dtype=torch.uint8, device="cpu")
    target = torch.empty_like(source)
    return 2.0 * nbytes / median_s(lambda: target.copy_(source), effort)


def launch_s(effort: Effort) -> float:
    """Seconds of one host operation on next to no data."""
    x = torch.ones((1, 16), dtype=torch.float32, device="cpu")
    weight = torch.ones((16, 16), dtype=torch.float32, device="cpu")

    def launch() -> None:
        for _ in range(_LAUNCHES):
            F.linear(x, weight)

    return median_s(launch, effort) / _LAUNCHES


def remaining(
    arena: Tensor, figures: LinearFigures, copy: Callable[[], object], effort: Effort, threads: int | None = None
) -> Remaining:
    """What is left of the rates of large one-token Linears, by ``threads`` of those that they had alone (None: by all),
    and of ``copy`` in another thread while both are at work.

    Medians over pairs of quiet and busy measurements that follow each other, so that other load on the machine, which
    changes slowly, hits both.
    """
    each = replace(effort, budget_s=effort.budget_s / 2)
    compute = in_place(KERNELS[figures.kernels.at(1)])
    weights = cut_weights(arena, max(effort.weight_bytes), effort.columns)
    linears, copies = [], []
    for _ in range(effort.repeats):
        quiet, copy_s = kernel_rate(compute, weights, 1, each), median_s(copy, each)
        with repeatedly(copy, effort.clock) as rounds_s, computing_with(threads):
            linears.append(kernel_rate(compute, weights, 1, each) / quiet)
            while not rounds_s:  # a copy takes longer than what is computed
                kernel_rate(compute, weights, 1, each)
            copies.append(copy_s / median(rounds_s))
    return Remaining(min(1.0, median(linears)), min(1.0, median(copies)))


def memory_copy(nbytes: int) -> Callable[[], object]:
    """A copy of ``nbytes`` from one buffer in main memory to another, by one thread and without the GIL."""
    source = torch.ones(nbytes, dtype=torch.uint8, device="cpu")
    target = torch.ones(nbytes, dtype=torch.uint8, device="cpu")
    return lambda: copy_bytes(target, source)


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy a contiguous host tensor's bytes by the calling thread alone (``copy_`` uses all of them)."""
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


def _linear_flops(table: RateTable, dtype: torch.dtype) -> float:
    """The largest FLOP/s of the measured Linears: the arithmetic bound must not lie below a measurement."""
    return max(2.0 * tokens * rate / dtype.itemsize for _, curve in table.curves for tokens, rate in curve.points)
