"""Host programs for the tests: parts of Linears with all that they read, and what stands between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.host_kernels import VECTORISED, HostKernel, HostLinear
from hetegen_compile.host_kernels.program import HostProgram, Place, Step

FUNCTIONS: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, Any]]] = {
    "relu": (torch.relu, {}),
    "silu": (F.silu, {}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "mul": (torch.mul, {}),
}
"""By its native name, a function of torch and its keywords."""

UNIT = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""How far a pointwise result may be from torch's: a unit of its type, and what torch's ways differ by among themselves
(oneDNN's ``gelu``; the C library's functions for elements that fill no vector)."""
ATOL = 2e-6


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers in -1 to 1, the same for the same seed."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)


@dataclass(frozen=True)
class Part:
    """A host part with its weight's rows and its bias; ``whole``: the weight [out, in] that it is a part of."""

    host: HostLinear
    rows: Tensor
    bias: Tensor
    whole: Tensor

    def exact(self, x: Tensor) -> Tensor:
        """What it computes, in float64."""
        x, weight, bias = x.double(), self.whole.double(), self.bias.double()
        taken = slice(self.host.lo, self.host.hi)
        if self.host.dim == self.host.axis:
            return F.linear(x, weight[taken], bias[taken])
        return F.linear(x[..., taken], weight[:, taken], bias)


def part(
    width: int,
    columns: int,
    *,
    dim: int = 0,
    axis: int = 0,
    dtype: torch.dtype = torch.float32,
    kernel: HostKernel = VECTORISED,
    lo: int = 3,
    seed: int = 0,
) -> Part:
    """A part of a Linear: x [..., width] -> [..., columns], which leaves out rows or columns on both sides."""
    sums = dim != axis
    lo = min(lo, width - 1) if sums else lo
    hi = max(lo + 1, width - 2) if sums else lo + columns
    whole = random(columns if sums else hi + 2, width, seed=seed).div(math.sqrt(width)).to(dtype)
    stored = whole if dim == 0 else whole.t().clone(memory_format=torch.contiguous_format)
    host = HostLinear(lo, hi, dim, ((math.inf, kernel),), axis)
    return Part(host, stored.narrow(axis, lo, hi - lo), random(whole.shape[0], dtype=dtype, seed=seed + 1), whole)


def linear(host: HostLinear, x: int, rows: int, bias: int | None = None) -> Step:
    """A step that computes a part."""
    places = (Place(x), Place(rows), None if bias is None else Place(bias))
    return Step(host, places, places, {})


def pointwise(name: str, *operands: int) -> Step:
    """A step that is a function of torch."""
    function, kwargs = FUNCTIONS[name]
    places = tuple(map(Place, operands))
    return Step(function, places, places, kwargs, name)


def one(host: Part) -> tuple[HostProgram, tuple[Tensor, Tensor]]:
    """A program of one Linear, and what it is given behind x."""
    return HostProgram([linear(host.host, 0, 1, 2)], 3, (3,)), (host.rows, host.bias)


def mlp(up: Part, name: str, down: Part) -> tuple[HostProgram, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Two Linears with a function between them, and what it is given behind x; only the last result is asked for."""
    steps = [linear(up.host, 0, 1, 2), pointwise(name, 5, *((5,) if name == "mul" else ())), linear(down.host, 6, 3, 4)]
    return HostProgram(steps, 5, (7,)), (up.rows, up.bias, down.rows, down.bias)


def native(program: HostProgram, *arguments: Tensor | None) -> list[Tensor]:
    """Its results, which no function of torch computed."""
    assert program.form(arguments) is not None
    with mock.patch.object(HostProgram, "plain", side_effect=AssertionError("this was to be native")):
        return program(*arguments)


def assert_native_as_plain(program: HostProgram, *arguments: Tensor | None) -> None:
    """Every native step is what its function makes of the native results before it.

    Linears, ``relu`` and ``mul`` to the bit. What is computed on the way is the same whether it is a result or not.
    """
    places = range(program.arguments, program.arguments + len(program.steps))
    values = [*arguments, *native(HostProgram(program.steps, program.arguments, places), *arguments)]
    for place, step in zip(places, program.steps, strict=True):
        expected = step.function(*(values[one] if isinstance(one, Place) else one for one in step.args), **step.kwargs)
        assert_as_torch(step.pointwise, values[place], expected)
    found = native(program, *arguments)
    assert_equal(found, [values[place] for place in program.results])


def assert_as_torch(name: str, found: Tensor | None, expected: Tensor) -> None:
    """A step's result is its function's: to the bit, or to a unit where torch itself has several ways."""
    exact = name in ("", "relu", "mul")
    rtol, atol = (0.0, 0.0) if exact else (UNIT[expected.dtype], ATOL)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, check_stride=True, equal_nan=True)


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor | None]) -> None:
    """The same numbers to the bit, in tensors of the same geometry."""
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0, check_stride=True)
