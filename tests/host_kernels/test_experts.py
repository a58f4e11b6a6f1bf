"""Products with experts on the host: what torch's grouped product computes, by the host's kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.host_kernels import HostExperts, bind_experts, kernels, vectorised
from tests.host_kernels.test_kernels import TOLERANCE

GROUPS, IN, OUT = 5, 100, 77

dtypes = pytest.mark.parametrize("dtype", vectorised.DTYPES)
layouts = pytest.mark.parametrize("out_in", [True, False], ids=["[out, in]", "[in, out]"])


def plain(x: Tensor, matrices: Tensor, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    raise AssertionError("left to torch")


def stack(dtype: torch.dtype, *, out_in: bool) -> Tensor:
    """Matrices [groups, in, out] whose rows lie as a weight's do, with gaps between them."""
    torch.manual_seed(0)
    wide = torch.randn(GROUPS, OUT, IN + 12) if out_in else torch.randn(GROUPS, IN, OUT + 12)
    wide = wide.to(dtype)
    return wide[..., :IN].transpose(1, 2) if out_in else wide[..., :OUT]


def bound(matrices: Tensor, *points: tuple[float, str]) -> HostExperts | None:
    name = str(matrices.dtype).removeprefix("torch.")
    return bind_experts(plain, {name: KernelChoice(points)}, matrices)


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def expected(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], matrices.shape[2], dtype=torch.double)
    for index, (start, end) in enumerate(pairwise((0, *ends.tolist()))):
        out[start:end] = x[start:end].double() @ matrices[index].double()
    return out


@dtypes
@layouts
@pytest.mark.parametrize("name", ["vectorised", "vectorised, tiled"])
@pytest.mark.parametrize(
    "counts",
    [[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [2, 0, 2, 2, 0], [2, 1, 0, 3, 9], [0, 0, 6, 0, 0], [0] * 5],
    ids=str,
)
def test_each_groups_tokens_meet_its_matrix(dtype: torch.dtype, out_in: bool, name: str, counts: list[int]) -> None:
    matrices, ends = stack(dtype, out_in=out_in), ends_of(counts)
    x = torch.randn(sum(counts) + 2, IN).to(dtype)  # the last two tokens are nobody's
    experts = bound(matrices, (1.0, name))
    assert experts is not None
    found, exact = experts(x, matrices, offs=ends), expected(x, matrices, ends)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    assert not found[sum(counts) :].any()


@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads_give_the_same_bits(threads: int) -> None:
    matrices, ends = torch.randn(3, 512, 640).transpose(1, 2), torch.tensor([1, 1, 3], dtype=torch.int32)
    x = torch.randn(3, 640)
    experts = bound(matrices, (1.0, "vectorised"))
    assert experts is not None
    alone = experts(x, matrices, ends)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(experts(x, matrices, ends), alone)
    finally:
        torch.set_num_threads(before)


def test_one_call_serves_all_groups_and_reads_only_those_with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def spied(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        calls.append(tuple(ends.tolist()))
        return vectorised.vectorised_groups(x, matrices, ends)

    monkeypatch.setitem(
        kernels.KERNELS,
        "vectorised",
        kernels.HostKernel("vectorised", vectorised.DTYPES, vectorised.vectorised_rows, lambda: None, groups=spied),
    )
    matrices = stack(torch.float32, out_in=True)
    matrices[1] = matrices[4] = torch.nan
    experts = bound(matrices, (1.0, "vectorised"))
    assert experts is not None
    assert not experts(torch.randn(2, IN), matrices, offs=ends_of([1, 0, 1, 0, 0])).isnan().any()
    assert calls == [(1, 1, 2, 2, 2)]


def test_each_group_has_the_kernel_of_its_tokens_where_the_largest_one_is_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, int]] = []

    def spied(kernel: kernels.HostKernel) -> kernels.HostKernel:
        def run(x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int) -> Tensor:
            seen.append((kernel.name, x.shape[0]))
            return kernel.run(x, rows, bias, lo, hi, dim)

        return kernels.HostKernel(kernel.name, kernel.dtypes, run, lambda: None, groups=kernel.groups)

    for kernel in (kernels.LINEAR, kernels.VECTORISED):
        monkeypatch.setitem(kernels.KERNELS, kernel.name, spied(kernel))
    matrices, ends = stack(torch.float32, out_in=True), ends_of([1, 0, 40, 0, 2])
    x = torch.randn(43, IN)
    experts = bound(matrices, (1.0, "vectorised"), (64.0, "F.linear"))
    assert experts is not None
    torch.testing.assert_close(experts(x, matrices, ends).double(), expected(x, matrices, ends), rtol=1e-5, atol=1e-4)
    assert seen == [("vectorised", 1), ("F.linear", 40), ("vectorised", 2)]


@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.zeros(OUT)},
        {"out_dtype": torch.float32},
        {"x": torch.zeros(3, IN, dtype=torch.double)},
        {"x": torch.zeros(GROUPS, 3, IN)},
        {"offs": torch.tensor([1, 2, 3, 3, 3])},
        {"offs": torch.tensor([1, 2, 3], dtype=torch.int32)},
        {"offs": torch.tensor([1, 3, 2, 3, 3], dtype=torch.int32)},
        {"offs": torch.tensor([1, 2, 3, 3, 4], dtype=torch.int32)},
        {"offs": None},
    ],
    ids=lambda change: f"{next(iter(change))}",
)
def test_what_the_kernels_do_not_serve_is_left_to_torch(change: dict[str, Any]) -> None:
    matrices = stack(torch.float32, out_in=True)
    experts = bound(matrices, (1.0, "vectorised"))
    assert experts is not None
    given: dict[str, Any] = {"x": torch.zeros(3, IN), "offs": ends_of([1, 1, 1, 0, 0])} | change
    with pytest.raises(AssertionError, match="left to torch"):
        experts(given.pop("x"), matrices, **given)


def test_autocast_is_left_to_torch() -> None:
    matrices = stack(torch.float32, out_in=True)
    experts = bound(matrices, (1.0, "vectorised"))
    assert experts is not None
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(AssertionError, match="left to torch"):
        experts(torch.zeros(3, IN), matrices, ends_of([1, 1, 1, 0, 0]))


def test_without_a_kernel_of_ours_the_operation_stays() -> None:
    matrices = stack(torch.float32, out_in=True)
    assert bound(matrices, (1.0, "F.linear")) is None
    assert bind_experts(plain, {}, matrices) is None
    assert bound(torch.zeros(2, 8, 16, 2)[..., 0], (1.0, "vectorised")) is None, "no dimension is contiguous"
