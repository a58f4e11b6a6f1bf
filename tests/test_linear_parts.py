"""Putting parts of a Linear together on the accelerator: few operations are issued for it, and nothing is lost."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hetegen_compile.linear_parts import behind_usual_strides, join_parts, pad_parts, rows_function, usual_strides

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Launches(TorchDispatchMode):
    """The ATen operations that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def in_float32(parts: list[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_partial_sums_are_added_in_float32_and_rounded_once(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    parts = [(torch.randn(1, 3, 4096) * 10.0 ** torch.randint(-3, 4, (4096,))).to(dtype) for _ in range(count)]
    before = [part.clone() for part in parts]
    assert torch.equal(join_parts(parts, 1), in_float32(parts))
    assert all(map(torch.equal, parts, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_partial_sums_and_columns_side_by_side_are_one_operation(dtype: torch.dtype) -> None:
    parts = [torch.randn(1, 1, 64).to(dtype) for _ in range(2)]
    for dim, name in ((0, "cat"), (1, "add")):
        with Launches() as launches:
            join_parts(parts, dim)
        assert launches.names == [name]


@pytest.mark.parametrize(
    ("starts", "widths"), [([0], [64]), ([64], [192]), ([64], [64]), ([64, 128], [64, 128]), ([0, 128], [64, 64])]
)
def test_columns_are_at_their_places_and_the_others_are_zero(starts: list[int], widths: list[int]) -> None:
    parts = [torch.randn(2, 1, width) for width in widths]
    expected = torch.zeros(2, 1, 256)
    for part, start, width in zip(parts, starts, widths, strict=True):
        expected[..., start : start + width] = part
    x = torch.randn(2, 1, 8)
    with Launches() as launches:
        padded = pad_parts(x, parts, starts, 256)
    assert torch.equal(padded, expected)
    assert len(parts) > 1 or launches.names == ["constant_pad_nd"]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dim", "axis"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_part_is_some_columns_of_the_linear_or_a_partial_sum(dim: int, axis: int, biased: bool) -> None:
    """A weight [out, in] or [in, out]; where nothing is to be done around ``F.linear``, it is that alone."""
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 48), torch.randn(48) if biased else None
    x = torch.randn(2, 48)
    out_in = weight if dim == 0 else weight.t()
    function = rows_function(16, 32, dim, axis, biased=biased)
    if axis == dim:
        expected = torch.nn.functional.linear(x, out_in, bias)[:, 16:32]
    else:
        expected = torch.nn.functional.linear(x[:, 16:32], out_in[:, 16:32], bias)
    torch.testing.assert_close(function(x, weight.narrow(axis, 16, 16), bias), expected)
    assert isinstance(function, functools.partial)
    assert (function.func is torch.nn.functional.linear) == (dim == axis == 0 and not biased)


def test_one_tokens_strides_are_made_usual_without_a_copy() -> None:
    """As attention leaves them: transposed, and so of another stride where there is one token."""
    base = torch.arange(64.0)
    odd = base.as_strided((1, 1, 64), (64, 8, 1))
    assert odd.is_contiguous()
    assert usual_strides(odd).stride() == (64, 64, 1)
    assert usual_strides(odd).data_ptr() == base.data_ptr()
    gaps = torch.zeros(4, 8)[:, :6]
    assert usual_strides(gaps) is gaps
    seen: list[tuple[int, ...]] = []
    behind_usual_strides(lambda x, rows, bias: seen.append(x.stride()))(odd, None, None)  # type: ignore[arg-type, return-value]
    assert seen == [(64, 64, 1)]
