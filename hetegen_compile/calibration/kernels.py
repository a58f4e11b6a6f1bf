"""The ways in which torch computes a Linear on the host, and their rates.

The runtime computes with ``F.linear``; the others are timed to say what it leaves unused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.calibration.timing import Effort, durations_s

logger = logging.getLogger("hetegen_compile")


@dataclass(frozen=True)
class HostKernel:
    """One way to compute ``x @ weight.T``.

    Attributes:
        name: for reports.
        prepare: (weight, tokens) -> the weight as the kernel wants it, done once; RuntimeError: it cannot.
        run: (x, prepared weight) -> result.
    """

    name: str
    prepare: Callable[[Tensor, int], Tensor]
    run: Callable[[Tensor, Tensor], Tensor]


def _prepack(weight: Tensor, tokens: int) -> Tensor:
    """The weight in oneDNN's blocked layout, as Inductor's freezing makes it.

    Raises RuntimeError if this build of torch or this processor has no such kernel for the dtype.
    """
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    except AttributeError as error:
        raise RuntimeError("this build of torch has no oneDNN prepacking") from error
    return packed


def _prepacked(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


LINEAR = HostKernel("F.linear", lambda weight, tokens: weight, F.linear)

PREPACKED = HostKernel("oneDNN prepacked", _prepack, _prepacked)

FLOAT32_COPY = HostKernel(
    "F.linear on a float32 copy",
    lambda weight, tokens: weight.float(),
    lambda x, weight: F.linear(x.float(), weight).to(x.dtype),
)


def kernels_for(dtype: torch.dtype) -> tuple[HostKernel, ...]:
    """The kernels that may compute a Linear of this dtype; whether they can shows when they prepare."""
    return (LINEAR, PREPACKED) if dtype == torch.float32 else (LINEAR, PREPACKED, FLOAT32_COPY)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that profiles use: "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def make_weights(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, rotate_bytes: int
) -> tuple[Tensor, ...]:
    """Weights of the (out, in) ``shapes`` in turn, as many whole turns as fill ``rotate_bytes``.

    A weight used over and over would be read from the cache, which holds no model's weights.
    """
    turn_bytes = sum(rows * columns for rows, columns in shapes) * dtype.itemsize
    turns = max(1, math.ceil(rotate_bytes / turn_bytes))
    return tuple(torch.full(shape, 0.01, dtype=dtype, device="cpu") for _ in range(turns) for shape in shapes)


def kernel_rate(kernel: HostKernel, weights: Sequence[Tensor], tokens: int, effort: Effort) -> float:
    """Median of ``kernel_rates``."""
    return median(kernel_rates(kernel, weights, tokens, effort))


def kernel_rates(kernel: HostKernel, weights: Sequence[Tensor], tokens: int, effort: Effort) -> list[float]:
    """Bytes of ``weights`` (as given, not as prepared) per second at a number of tokens, call by call.

    Raises RuntimeError if the kernel cannot compute them.
    """
    prepared = [kernel.prepare(weight, tokens) for weight in weights]
    inputs = {
        width: torch.full((tokens, width), 0.5, dtype=weights[0].dtype, device="cpu")
        for width in {weight.shape[1] for weight in weights}
    }

    def call(index: int) -> None:
        which = index % len(weights)
        kernel.run(inputs[weights[which].shape[1]], prepared[which])

    durations = durations_s(call, effort)
    return [weights[index % len(weights)].nbytes / time_s for index, time_s in enumerate(durations)]


def compare_kernels(
    kernels: Iterable[HostKernel], weights: Sequence[Tensor], tokens: int, effort: Effort
) -> dict[str, float]:
    """Bytes of weights per second by the kernel's name; kernels that cannot compute them are left out."""
    rates: dict[str, float] = {}
    for kernel in kernels:
        try:
            rates[kernel.name] = kernel_rate(kernel, weights, tokens, effort)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.info("%s: not for %s here: %s", kernel.name, dtype_name(weights[0].dtype), reason)
    return rates


def describe_fastest(rates: Mapping[str, float]) -> str:
    """The fastest kernel, beside ``F.linear`` where that is another."""
    best = max(rates, key=lambda name: rates[name])
    text = f"{best} {rates[best] / 1e9:.3g} GB/s"
    if best == LINEAR.name or LINEAR.name not in rates:
        return text
    return f"{text} (F.linear {rates[LINEAR.name] / 1e9:.3g})"
