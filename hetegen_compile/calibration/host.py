"""Measure the processor and its memory: Linears, arithmetic, copies, launches, contention."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.calibration.kernels import (
    LINEAR,
    compare_kernels,
    describe_fastest,
    dtype_name,
    kernel_rate,
    kernel_rates,
    kernels_for,
    make_weights,
)
from hetegen_compile.calibration.machine import cpu_model, host_memory_bytes, last_level_cache_bytes
from hetegen_compile.calibration.timing import Effort, median_s
from hetegen_compile.cost_model import HostProfile, RateCurve

logger = logging.getLogger("hetegen_compile")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MIN_ROTATE_BYTES = 128 << 20

_LAUNCHES = 100


@dataclass(frozen=True)
class HostFigures:
    """The host's profile, and per dtype which kernel was fastest at which number of tokens, as text."""

    profile: HostProfile
    fastest: Mapping[str, str]


def host_steps(effort: Effort) -> int:
    """How often ``measure_host`` reports progress."""
    return len(DTYPES) * (effort.repeats * len(effort.tokens) + len(effort.kernel_tokens) + 2) + 2


def measure_host(
    effort: Effort, copy: Callable[[], object] | None, step: Callable[[str], None]
) -> HostFigures:
    """Measure the host.

    Args:
        effort: how much is measured.
        copy: moves some data over the link, which competes for main memory; None: a copy within main memory.
        step: called with the name of each figure before it is measured.
    """
    rotate_bytes = rotation_bytes(effort)
    copy = copy or memory_copy(rotate_bytes)
    flops: dict[str, float] = {}
    curves: dict[str, RateCurve] = {}
    fastest: dict[str, str] = {}
    shares: list[float] = []
    for dtype in DTYPES:
        name = dtype_name(dtype)
        weights = make_weights(effort.shapes, dtype, rotate_bytes)
        curves[name] = _linear_curve(weights, effort, step)
        step(f"host arithmetic, {name}")
        flops[name] = max(arithmetic_rate(dtype, effort), _linear_flops(curves[name], dtype))
        step(f"host Linear during copies, {name}")
        shares.append(remaining_share(weights, copy, effort))
        fastest[name] = _fastest(weights, effort, step)
    step("host memory")
    memory_rate = memory_bytes_per_s(rotate_bytes, effort)
    step("host launch")
    profile = HostProfile(
        name=cpu_model(),
        cores=torch.get_num_threads(),
        flops_per_s=flops,
        memory_bytes_per_s=memory_rate,
        linear_bytes_per_s=curves,
        launch_s=launch_s(effort),
        contention=median(shares),
        memory_bytes=host_memory_bytes(),
    )
    return HostFigures(profile, fastest)


def rotation_bytes(effort: Effort) -> int:
    """Bytes of weights to rotate over: 1.5 times the last-level cache, at most 1/16 of main memory."""
    if effort.rotate_bytes is not None:
        return effort.rotate_bytes
    wanted = max(last_level_cache_bytes() * 3 // 2, MIN_ROTATE_BYTES)
    most = host_memory_bytes() // 16
    if wanted > most:
        logger.warning(
            "weights rotate over %d MiB only (1/16 of main memory): rates may be the cache's", most >> 20
        )
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


def remaining_share(weights: tuple[Tensor, ...], copy: Callable[[], object], effort: Effort) -> float:
    """Share in (0, 1] of the rate of a one-token Linear that remains while ``copy`` runs in another thread.

    Median over pairs of a quiet and a busy measurement that follow each other, so that other load on the
    machine, which changes slowly, hits both.
    """
    each = replace(effort, budget_s=effort.budget_s / 2)
    ratios = []
    for _ in range(effort.repeats):
        quiet = kernel_rate(LINEAR, weights, 1, each)
        with repeatedly(copy):
            ratios.append(kernel_rate(LINEAR, weights, 1, each) / quiet)
    return min(1.0, median(ratios))


@contextmanager
def repeatedly(work: Callable[[], object]) -> Iterator[None]:
    """Run ``work`` again and again in another thread, begun before the block and ended after it.

    What ``work`` raises is raised here, after the block.
    """
    begun, stop = threading.Event(), threading.Event()

    def loop() -> None:
        begun.set()
        while not stop.is_set():
            work()

    with ThreadPoolExecutor(1, "hetegen-calibrate") as executor:
        ended = executor.submit(loop)
        begun.wait()
        try:
            yield
        finally:
            stop.set()
    ended.result()


def memory_copy(nbytes: int) -> Callable[[], object]:
    """A copy of ``nbytes`` from one buffer in main memory to another, by one thread and without the GIL."""
    source = torch.ones(nbytes, dtype=torch.uint8, device="cpu")
    target = torch.ones(nbytes, dtype=torch.uint8, device="cpu")
    return lambda: copy_bytes(target, source)


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy a contiguous host tensor's bytes by the calling thread alone (``copy_`` uses all of them)."""
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


def _linear_curve(weights: tuple[Tensor, ...], effort: Effort, step: Callable[[str], None]) -> RateCurve:
    """Medians over rounds through all numbers of tokens: a burst of other load hits no point alone."""
    each = replace(effort, budget_s=effort.budget_s / effort.repeats, repeats=1)
    rates: dict[int, list[float]] = {tokens: [] for tokens in effort.tokens}
    for number in range(1, effort.repeats + 1):
        for tokens in effort.tokens:
            step(f"host Linear, {dtype_name(weights[0].dtype)}, {tokens} token(s), round {number}")
            rates[tokens] += kernel_rates(LINEAR, weights, tokens, each)
    return RateCurve(tuple((float(tokens), median(rates[tokens])) for tokens in effort.tokens))


def _linear_flops(curve: RateCurve, dtype: torch.dtype) -> float:
    """The largest FLOP/s of the measured Linears: the arithmetic bound must not lie below a measurement."""
    return max(2.0 * tokens * rate / dtype.itemsize for tokens, rate in curve.points)


def _fastest(weights: tuple[Tensor, ...], effort: Effort, step: Callable[[str], None]) -> str:
    name = dtype_name(weights[0].dtype)
    texts = []
    for tokens in effort.kernel_tokens:
        step(f"host kernels, {name}, {tokens} token(s)")
        rates = compare_kernels(kernels_for(weights[0].dtype), weights, tokens, effort)
        texts.append(f"{tokens} token(s): {describe_fastest(rates)}")
    text = "; ".join(texts)
    logger.info("fastest host kernel, %s: %s", name, text)
    return text
