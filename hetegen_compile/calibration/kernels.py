"""Time kernels for host Linears: rotating over more weights than the caches hold, in bytes of weights per second."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.calibration.timing import Effort, durations_s
from hetegen_compile.errors import first_line
from hetegen_compile.geometry import dtype_name
from hetegen_compile.host_kernels import HostKernel, HostLinear
from hetegen_compile.host_kernels.program import HostProgram, Place, Step

logger = logging.getLogger("hetegen_compile")

Compute = Callable[[Tensor, Tensor], object]
"""(x, weight) -> x @ weight.T, whatever form of the weight it wants."""


@dataclass(frozen=True)
class CopyingKernel:
    """A kernel that wants a copy of the weight in another form, which the runtime never makes: only timed.

    Attributes:
        name: for reports.
        prepare: (weight, tokens) -> the copy; RuntimeError: this build of torch or this processor has no such kernel.
        run: (x, copy) -> result.
    """

    name: str
    prepare: Callable[[Tensor, int], Tensor]
    run: Compute


def _prepack(weight: Tensor, tokens: int) -> Tensor:
    """The weight in oneDNN's blocked layout, as Inductor's freezing makes it."""
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    except AttributeError as error:
        raise RuntimeError("this build of torch has no oneDNN prepacking") from error
    return packed


def _prepacked(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


PREPACKED = CopyingKernel("oneDNN prepacked", _prepack, _prepacked)

FLOAT32_COPY = CopyingKernel(
    "F.linear on a float32 copy",
    lambda weight, tokens: weight.float(),
    lambda x, weight: F.linear(x.float(), weight).to(x.dtype),
)


def copying_kernels(dtype: torch.dtype) -> tuple[CopyingKernel, ...]:
    """The kernels with copies that may compute a Linear of this dtype; whether they can shows when they prepare."""
    if not dtype.is_floating_point:
        return ()
    return (PREPACKED,) if dtype == torch.float32 else (PREPACKED, FLOAT32_COPY)


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations that meet weights of ``dtype``: integers are met by bfloat16."""
    return dtype if dtype.is_floating_point else torch.bfloat16


_ANY_DTYPE = 0x3C
"""A byte that repeated is a small number in every dtype: 0.01 in float32 and bfloat16, 1.06 in float16, 60 in int8."""

_WORD_BYTES = 8


def make_arena(dtype: torch.dtype, nbytes: int) -> Tensor:
    """One range of memory that weights are cut from; views of it as other dtypes hold small numbers, too."""
    memory = torch.full((-(-nbytes // _WORD_BYTES) * _WORD_BYTES,), _ANY_DTYPE, dtype=torch.uint8, device="cpu")
    return memory.view(dtype)


def cut_weights(arena: Tensor, nbytes: int, columns: Sequence[int]) -> tuple[Tensor, ...]:
    """Weights [out, in] of about ``nbytes`` each that tile the arena, in features from ``columns`` in turn.

    A weight used over and over would be read from the cache, which holds no model's weights.
    """
    weights: list[Tensor] = []
    start = 0
    while True:
        width = columns[len(weights) % len(columns)]
        rows = max(1, nbytes // arena.itemsize // width)
        if start + rows * width > arena.numel():
            return tuple(weights)
        weights.append(arena[start : start + rows * width].view(rows, width))
        start += rows * width


def in_place(kernel: HostKernel) -> Compute:
    """A kernel of the registry as a whole Linear without bias."""
    return lambda x, weight: kernel.run(x, weight, None, 0, weight.shape[0], 0)


def as_program(kernel: HostKernel, rows: Tensor, ahead_bytes: int = 0) -> HostProgram:
    """A whole Linear without bias as a host program of (x, rows)."""
    linear = HostLinear(0, rows.shape[0], 0, ((math.inf, kernel),))
    return HostProgram([Step(linear, (0, 1, None), (Place(0), Place(1), None), {})], 2, (2,), ahead_bytes)


def call_durations_s(
    compute: Compute,
    weights: Sequence[Tensor],
    tokens: int,
    effort: Effort,
    forms: Sequence[Tensor] | None = None,
    start: float = 0.0,
) -> list[tuple[int, float]]:
    """(bytes of the weight, seconds) call by call, rotating over ``weights``; ``forms`` are what is computed with.

    ``start``: the share of the weights that lies before the first. A budget may be over before all are read, and what
    was read last may be in the cache: measurements that follow each other start elsewhere.
    """
    dtype = activation_dtype(weights[0].dtype)
    widths = {weight.shape[1] for weight in weights}
    inputs = {width: torch.full((tokens, width), 0.5, dtype=dtype, device="cpu") for width in widths}

    first = int(start * len(weights))

    def call(index: int) -> None:
        which = (first + index) % len(weights)
        compute(inputs[weights[which].shape[1]], (forms or weights)[which])

    durations = durations_s(call, effort)
    return [(weights[(first + index) % len(weights)].nbytes, seconds) for index, seconds in enumerate(durations)]


def kernel_rate(compute: Compute, weights: Sequence[Tensor], tokens: int, effort: Effort) -> float:
    """Median bytes of weights per second of whole calls."""
    return median(nbytes / seconds for nbytes, seconds in call_durations_s(compute, weights, tokens, effort))


def copying_rate(kernel: CopyingKernel, weights: Sequence[Tensor], tokens: int, effort: Effort) -> float | None:
    """The rate of a kernel with copies, in bytes of the given weights; None, with a line in the log: it cannot."""
    try:
        forms = [kernel.prepare(weight, tokens) for weight in weights]
        calls = call_durations_s(kernel.run, weights, tokens, effort, forms)
    except RuntimeError as error:
        logger.info("%s: not for %s here: %s", kernel.name, dtype_name(weights[0].dtype), first_line(error))
        return None
    return median(nbytes / seconds for nbytes, seconds in calls)
