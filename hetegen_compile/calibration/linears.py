"""Measure host Linears: which kernel is fastest at each number of tokens, and its rate by tokens and weight size."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from hetegen_compile.calibration.kernels import (
    call_durations_s,
    copying_kernels,
    copying_rate,
    cut_weights,
    in_place,
)
from hetegen_compile.calibration.timing import Effort
from hetegen_compile.cost_model import HardwareProfile, KernelChoice, RateCurve, RateTable
from hetegen_compile.geometry import dtype_name
from hetegen_compile.host_kernels import KERNELS, HostKernel, kernels_for
from hetegen_compile.options import format_bytes

logger = logging.getLogger("hetegen_compile")

Point = tuple[int, int]
"""(number of tokens, bytes of the weight)."""

Rates = Mapping[Point, float]

_GOLDEN = 0.618
"""Multiples of it are spread evenly over 0 to 1."""
_HOPELESS = 4.0
"""A kernel that takes so many times the fastest's seconds in its own fastest calls is not timed in further rounds."""
_LARGER, _MOST_OF_LARGER, _LEAST_S = 4.0, 0.5, 1e-3
"""Weights take at most this share of the seconds of weights that are so many times larger, where it is a millisecond or
more: else something else ran meanwhile (threads that wait for a processor take as long whatever they compute)."""


@dataclass(frozen=True)
class LinearFigures:
    """Rates and kernels of one dtype, and how the kernels compare at one token and more, as text."""

    table: RateTable
    kernels: KernelChoice
    comparison: str


def points(effort: Effort) -> list[Point]:
    """Where Linears are timed: few tokens at every size, many tokens (bound by arithmetic) at one size only."""
    return [
        (tokens, nbytes)
        for nbytes in effort.weight_bytes
        for tokens in effort.tokens
        if tokens <= effort.sized_tokens or nbytes == effort.arithmetic_bytes
    ]


def linear_steps(dtypes: Sequence[torch.dtype], effort: Effort) -> int:
    """How often ``measure_linears`` reports progress for all these dtypes."""
    copies = sum(len(copying_kernels(dtype)) for dtype in dtypes) * len(effort.kernel_tokens)
    return len(dtypes) * effort.repeats * len(points(effort)) + copies


def measure_linears(arena: Tensor, effort: Effort, launch_s: float, step: Callable[[str], None]) -> LinearFigures:
    """Time all kernels for the arena's dtype; ``launch_s`` is taken off each call, as the cost model adds it."""
    usable = usable_kernels(arena.dtype)
    for what_then in ("host Linears are timed once more", "stop what else runs and run hetegen calibrate again"):
        rates = _kernel_rates(usable, arena, effort, launch_s, step)
        table, choice = _chosen(rates, effort)
        disturbed = contradiction(table)
        if not disturbed:
            break
        logger.warning("other load disturbed this measurement (%s); %s", disturbed, what_then)
    return LinearFigures(table, choice, _compare(rates, arena, effort, step))


def seems_disturbed(profile: HardwareProfile) -> str:
    """Why the host's rates seem to have been measured beside other work, "" if they do not."""
    tables = profile.host.linear_bytes_per_s.items()
    return next((f"{dtype}: {what}" for dtype, table in tables if (what := contradiction(table))), "")


def contradiction(table: RateTable) -> str:
    """Two sizes that cannot both be right if nothing else ran meanwhile, in words; "" if there are none."""
    for (nbytes, curve), (larger, other) in itertools.pairwise(table.curves):
        for tokens, rate in curve.points:
            seconds, larger_s = nbytes / rate, larger / other.at(tokens)
            if larger >= _LARGER * nbytes and seconds >= _LEAST_S and seconds > _MOST_OF_LARGER * larger_s:
                return (
                    f"a host Linear of {format_bytes(int(nbytes))} took {seconds * 1e3:.3g} ms and one of "
                    f"{format_bytes(int(larger))} {larger_s * 1e3:.3g} ms ({tokens:g} token(s))"
                )
    return ""


def _chosen(rates: Mapping[str, Rates], effort: Effort) -> tuple[RateTable, KernelChoice]:
    """The fastest kernel by tokens, and its rates by tokens and size."""
    best = {tokens: _fastest(rates, tokens) for tokens in effort.tokens}
    table = RateTable(
        tuple((float(nbytes), RateCurve(tuple(_curve(rates, best, nbytes, effort)))) for nbytes in effort.weight_bytes)
    )
    return table, KernelChoice(tuple((float(tokens), name) for tokens, name in best.items()))


def usable_kernels(dtype: torch.dtype) -> tuple[HostKernel, ...]:
    """The kernels that this machine can run for a dtype; the others with a line in the log."""
    sample = torch.zeros((1, 64), dtype=dtype, device="cpu")
    refusals = {kernel.name: kernel.refusal(sample) for kernel in kernels_for(dtype)}
    for name, reason in refusals.items():
        if reason is not None:
            logger.warning("host kernel '%s' is not measured for %s: %s", name, dtype_name(dtype), reason)
    return tuple(KERNELS[name] for name, reason in refusals.items() if reason is None)


def _kernel_rates(
    kernels: Sequence[HostKernel], arena: Tensor, effort: Effort, launch_s: float, step: Callable[[str], None]
) -> dict[str, dict[Point, float]]:
    """Medians over rounds through all points and kernels: a burst of other load hits no point alone.

    Behind the first round only through the kernels that may be the fastest of a number of tokens.
    """
    each = replace(effort, budget_s=effort.linear_budget_s, repeats=1)
    weights = {nbytes: cut_weights(arena, nbytes, effort.columns) for nbytes in effort.weight_bytes}
    samples: dict[str, dict[Point, list[float]]] = {kernel.name: {} for kernel in kernels}
    starts = (number * _GOLDEN % 1.0 for number in itertools.count())
    timed: Mapping[int, Sequence[HostKernel]] = dict.fromkeys(effort.tokens, kernels)
    for number in range(1, effort.repeats + 1):
        for tokens, nbytes in points(effort):
            step(f"host Linear, {dtype_name(arena.dtype)}, {tokens} token(s), {format_bytes(nbytes)}, round {number}")
            for kernel in timed[tokens]:
                calls = call_durations_s(in_place(kernel), weights[nbytes], tokens, each, start=next(starts))
                found = samples[kernel.name].setdefault((tokens, nbytes), [])
                found += [size / _net_s(seconds, launch_s) for size, seconds in calls]
        fastest = {name: {point: max(found) for point, found in by.items()} for name, by in samples.items()}
        timed = {tokens: _promising(kernels, fastest, tokens) for tokens in effort.tokens}
    return {name: {point: median(found) for point, found in by.items()} for name, by in samples.items()}


def _promising(kernels: Sequence[HostKernel], rates: Mapping[str, Rates], tokens: int) -> list[HostKernel]:
    most = _HOPELESS * _seconds(rates[_fastest(rates, tokens)], tokens)
    return [kernel for kernel in kernels if _seconds(rates[kernel.name], tokens) < most]


def _net_s(seconds: float, launch_s: float) -> float:
    """A call's time without the launch, which is at most half of it."""
    return seconds - min(launch_s, seconds / 2)


def _fastest(rates: Mapping[str, Rates], tokens: int) -> str:
    """The kernel with the shortest time for one weight of each size, to which the largest ones come."""
    return min(rates, key=lambda name: _seconds(rates[name], tokens))


def _seconds(rates: Rates, tokens: int) -> float:
    return sum(nbytes / rate for (count, nbytes), rate in rates.items() if count == tokens)


def _curve(
    rates: Mapping[str, Rates], best: Mapping[int, str], nbytes: int, effort: Effort
) -> list[tuple[float, float]]:
    """The rates of the chosen kernels at one size; where it was not measured, those of the size that was."""
    curve = []
    for tokens in effort.tokens:
        found = rates[best[tokens]]
        rate = found.get((tokens, nbytes), found.get((tokens, effort.arithmetic_bytes)))
        assert rate is not None  # ``points`` has one of them
        curve.append((float(tokens), rate))
    return curve


def _compare(rates: Mapping[str, Rates], arena: Tensor, effort: Effort, step: Callable[[str], None]) -> str:
    """Rates of the largest weights by kernel, and of the kernels that would need a second copy of the weights."""
    largest = max(effort.weight_bytes)
    weights = cut_weights(arena, largest, effort.columns)
    texts = []
    for tokens in effort.kernel_tokens:
        found: dict[str, float | None] = {name: by[tokens, largest] for name, by in rates.items()}
        for kernel in copying_kernels(arena.dtype):
            step(f"{kernel.name}, {dtype_name(arena.dtype)}, {tokens} token(s)")
            found[f"{kernel.name} (needs a copy)"] = copying_rate(kernel, weights, tokens, effort)
        listed = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in found.items() if rate is not None)
        texts.append(f"{tokens} token(s): {listed}")
    text = "; ".join(texts)
    logger.info("host kernels, %s, GB/s: %s", dtype_name(arena.dtype), text)
    return text
