"""Which functions have a native form, and that it is torch's formula."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hetegen_compile.host_kernels.program import POINTWISE, HostProgram, pointwise_name
from hetegen_compile.host_kernels.vectorised import DTYPES
from tests.host_kernels.programs import FUNCTIONS, assert_as_torch, native, pointwise

GRAPH = fx.Graph()
X, Y = GRAPH.placeholder("x"), GRAPH.placeholder("y")
VECTORS = 64 * 24
"""Elements that fill pairs of vectors of any processor: torch computes others by other functions."""

names = pytest.mark.parametrize("name", POINTWISE)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def without_onednn() -> Iterator[None]:
    """Its ``gelu`` is another one."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)


def computed(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(native, torch's)."""
    operands = (x, y) if name == "mul" else (x,)
    program = HostProgram([pointwise(name, *range(len(operands)))], len(operands), (len(operands),))
    (found,), (expected,) = native(program, *operands), program.plain(operands)
    return found, expected


@names
@dtypes
@pytest.mark.usefixtures("without_onednn")
def test_a_function_is_torchs(name: str, dtype: torch.dtype) -> None:
    """16 bits to the bit; float32 as its compiler puts products and sums together."""
    x, y = (4 * torch.randn(VECTORS, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found, expected = computed(name, x.to(dtype), y.to(dtype))
    if dtype == torch.float32:
        assert_as_torch(name, found, expected)
    else:
        assert torch.equal(found, expected)


@names
@dtypes
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 31, 33, 63, 65, 127])
def test_of_any_length(name: str, dtype: torch.dtype, length: int) -> None:
    x, y = (4 * torch.randn(length, generator=torch.Generator().manual_seed(seed)) for seed in (length, 1))
    assert_as_torch(name, *computed(name, x.to(dtype), y.to(dtype)))


@names
@dtypes
@pytest.mark.usefixtures("without_onednn")
def test_nan_infinities_and_zeros(name: str, dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]).to(dtype)
    x = special.repeat(VECTORS // 8)
    found, expected = computed(name, x, x.roll(4))
    assert torch.equal(found.isnan(), expected.isnan())
    assert_as_torch(name, found, expected)
    assert found[0].isnan()


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "name"),
    [
        (torch.relu, (X,), {}, "relu"),
        (F.relu, (X,), {}, "relu"),
        (F.relu, (X,), {"inplace": False}, "relu"),
        (F.relu, (X, False), {}, "relu"),
        (F.relu, (X, True), {}, ""),
        (F.relu, (X,), {"inplace": True}, ""),
        (F.silu, (X,), {}, "silu"),
        (F.silu, (X,), {"inplace": False}, "silu"),
        (F.silu, (X, True), {}, ""),
        (F.silu, (X,), {"inplace": True}, ""),
        (F.gelu, (X,), {}, "gelu"),
        (F.gelu, (X,), {"approximate": "none"}, "gelu"),
        (F.gelu, (X,), {"approximate": "tanh"}, "gelu_tanh"),
        (F.gelu, (X,), {"approximate": "of tomorrow"}, ""),
        (torch.mul, (X, Y), {}, "mul"),
        (operator.mul, (X, Y), {}, "mul"),
        (torch.mul, (X, Y), {"out": X}, ""),
        (torch.mul, (X,), {"other": Y}, ""),
        (torch.relu, (X,), {"out": X}, ""),
        (F.gelu, (X,), {"out": X}, ""),
        (F.silu, (X, False, 1), {}, ""),
        (torch.relu_, (X,), {}, ""),
        (operator.imul, (X, Y), {}, ""),
        (torch.sigmoid, (X,), {}, ""),
        ("relu", (X,), {}, ""),
        ([], (X,), {}, ""),
    ],
)
def test_what_has_a_native_form(
    target: Callable[..., Any] | str | list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> None:
    assert pointwise_name(target, args, kwargs) == name


@names
def test_each_name_is_some_functions(name: str) -> None:
    function, kwargs = FUNCTIONS[name]
    assert pointwise_name(function, (X, Y) if name == "mul" else (X,), kwargs) == name
