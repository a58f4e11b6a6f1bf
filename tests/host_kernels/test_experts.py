"""Products with experts on the host: what torch's grouped product computes, by the host's kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.host_kernels import HostExperts, bind_experts, kernels, vectorised
from hetegen_compile.host_kernels.vectorised import Reading
from tests.host_kernels.test_kernels import TOLERANCE

GROUPS, IN, OUT = 5, 100, 77

dtypes = pytest.mark.parametrize("dtype", vectorised.DTYPES)
layouts = pytest.mark.parametrize("out_in", [True, False], ids=["[out, in]", "[in, out]"])


def plain(x: Tensor, matrices: Tensor, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    raise AssertionError("left to torch")


def stack(dtype: torch.dtype, *, out_in: bool) -> Tensor:
    """Matrices [groups, in, out] that lie as weights do, with gaps between them and between their rows."""
    torch.manual_seed(0)
    rows, columns = (OUT, IN) if out_in else (IN, OUT)
    wide = torch.randn(GROUPS, rows + 3, columns + 12).to(dtype)[:, :rows, :columns]
    return wide.transpose(1, 2) if out_in else wide


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
@pytest.mark.parametrize("name", ["vectorised", "vectorised, tiled", "vectorised, tiled through L2"])
@pytest.mark.parametrize(
    "counts",
    [
        [1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [2, 0, 2, 2, 0], [1, 2, 0, 0, 2], [2, 1, 0, 3, 9],
        [0, 0, 6, 0, 0], [0] * 5,
    ],
    ids=str,
)  # fmt: skip
def test_each_groups_tokens_meet_its_matrix(dtype: torch.dtype, out_in: bool, name: str, counts: list[int]) -> None:
    matrices, ends = stack(dtype, out_in=out_in), ends_of(counts)
    x = torch.randn(sum(counts) + 2, IN).to(dtype)  # the last two tokens are nobody's
    experts = bound(matrices, (1.0, name))
    assert experts is not None
    found, exact = experts(x, matrices, offs=ends), expected(x, matrices, ends)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    assert not found[sum(counts) :].any()


@layouts
@pytest.mark.parametrize(
    "wide",
    [
        torch.randn(4, IN + 5)[:, :IN],
        torch.randn(IN, 4).t(),
        torch.randn(4, 2 * IN)[:, ::2],
        torch.randn(1, IN).expand(4, IN),
    ],
    ids=["gaps", "transposed", "every other", "one for all"],
)
def test_activations_may_lie_in_any_way(out_in: bool, wide: Tensor) -> None:
    matrices, ends = stack(torch.float32, out_in=out_in), ends_of([1, 0, 2, 1, 0])
    experts = bound(matrices, (1.0, "vectorised"))
    assert experts is not None
    torch.testing.assert_close(
        experts(wide, matrices, ends).double(), expected(wide, matrices, ends), rtol=1e-5, atol=1e-4
    )


def test_offsets_with_gaps_between_them_are_read_before_they_go() -> None:
    matrices, x = stack(torch.float32, out_in=True), torch.randn(3, IN)
    experts = bound(matrices, (1.0, "vectorised"))
    assert experts is not None
    for ends in (ends_of([1, 0, 2, 0, 0]).repeat_interleave(2)[::2], torch.tensor([3], dtype=torch.int32).expand(5)):
        assert not ends.is_contiguous()
        result = experts(x, matrices, ends)
        torch.testing.assert_close(result.double(), expected(x, matrices, ends), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("vectorised", Reading.ROWS),
        ("vectorised, tiled", Reading.TILES),
        ("vectorised, tiled through L2", Reading.TILES_THROUGH_L2),
    ],
)
def test_each_kernel_reads_in_its_own_way(name: str, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Reading] = []

    class Spied:
        def __getitem__(self, key: Reading) -> vectorised.ReadingFunctions:
            asked.append(key)
            return reads[key]

    matrices = stack(torch.float32, out_in=True)
    experts = bound(matrices, (1.0, name))
    assert experts is not None
    reads = vectorised.library().reads
    monkeypatch.setattr(vectorised.library(), "reads", Spied())
    experts(torch.randn(1, IN), matrices, ends_of([0, 0, 1, 0, 0]))
    kernels.KERNELS[name].run(torch.randn(1, IN), torch.randn(8, IN), None, 0, 8, 0)
    kernels.KERNELS[name].run(torch.randn(1, 8), torch.randn(8, IN), None, 0, 8, 1)
    assert asked == [reading] * 3


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
        return vectorised.vectorised_groups(Reading.ROWS, x, matrices, ends)

    monkeypatch.setitem(kernels.KERNELS, "vectorised", replace(kernels.VECTORISED, groups=spied))
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

        return replace(kernel, run=run)

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
        {"x": torch.zeros(3, IN + 1)},
        {"x": torch.zeros(3, IN, device="meta")},
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


def test_matrices_that_are_contiguous_in_neither_direction_are_refused_with_a_reason() -> None:
    reasons: list[str] = []
    scattered, choice = torch.zeros(2, 8, 16, 2)[..., 0], {"float32": KernelChoice(((1.0, "vectorised"),))}
    assert bind_experts(plain, choice, scattered, reasons.append) is None
    assert reasons == ["computed by torch: the experts' matrices are contiguous in neither direction"]


def test_a_kernel_that_cannot_be_used_leaves_each_expert_to_f_linear_with_a_reason() -> None:
    reasons: list[str] = []
    matrices, ends = stack(torch.float32, out_in=True), ends_of([1, 0, 2, 0, 0])
    choice = {"float32": KernelChoice(((1.0, "of tomorrow"),))}
    experts = bind_experts(plain, choice, matrices, reasons.append)
    assert experts is not None
    x = torch.randn(3, IN)
    torch.testing.assert_close(experts(x, matrices, ends).double(), expected(x, matrices, ends), rtol=1e-5, atol=1e-4)
    (reason,) = reasons
    assert "F.linear" in reason
    assert "'of tomorrow'" in reason


@pytest.mark.parametrize(
    "other",
    [stack(torch.float32, out_in=False), torch.zeros(GROUPS, IN, OUT, 2)[..., 0], torch.zeros(GROUPS, 0, OUT)],
    ids=["[in, out]", "scattered", "nothing in"],
)
def test_matrices_that_lie_otherwise_than_bound_are_left_to_torch(other: Tensor) -> None:
    experts = bound(stack(torch.float32, out_in=True), (1.0, "vectorised"))
    assert experts is not None
    with pytest.raises(AssertionError, match="left to torch"):
        experts(torch.zeros(3, other.shape[1]), other, ends_of([1, 1, 1, 0, 0]))
