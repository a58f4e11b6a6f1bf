"""Parts of a grouped product are, put together, the product."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor

from hetegen_compile.grouped_parts import first_groups, grouped_rows, product_of, whole_grouped
from hetegen_compile.linear_parts import join_parts

GROUPS, IN, OUT, ROWS = 6, 16, 24, 20
ENDS = {
    "some have none": [0, 0, 5, 5, 9, 20],
    "all in the first": [20] * 6,
    "all in the last": [0, 0, 0, 0, 0, 20],
    "rows of no group": [1, 4, 9, 11, 15, 17],
    "nothing": [0] * 6,
}
CUTS = ((0, 6), (0, 3, 6), (0, 1, 2, 3, 4, 5, 6), (0, 5, 6))


@pytest.fixture(
    params=[("_grouped_mm", torch.bfloat16), ("grouped_mm_fallback", torch.float32)], ids=lambda one: one[0]
)
def product(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """A grouped product's name and a dtype that it is used with."""
    found: tuple[str, torch.dtype] = request.param
    return found


def operands(ends: str, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shape = (GROUPS, IN, OUT) if dim else (GROUPS, OUT, IN)
    stack = torch.randn(shape).to(dtype)
    return torch.randn(ROWS, IN).to(dtype), stack, torch.tensor(ENDS[ends], dtype=torch.int32)


def by_hand(x: Tensor, stack: Tensor, ends: Tensor, dim: int) -> Tensor:
    made = x.new_zeros((ROWS, OUT))
    for group, (start, end) in enumerate(pairwise((0, *ends.tolist()))):
        made[start:end] = x[start:end] @ (stack[group] if dim else stack[group].t())
    return made


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ends", ENDS)
def test_parts_that_follow_each_other(ends: str, dim: int, product: tuple[str, torch.dtype]) -> None:
    name, dtype = product
    x, stack, where = operands(ends, dim, dtype)
    expected = by_hand(x, stack, where, dim)
    last = int(where[-1])
    torch.testing.assert_close(whole_grouped(x, stack, where, dim, name)[:last], expected[:last])
    for cuts in CUTS:
        known = None
        for lo, hi in pairwise(cuts):
            known = grouped_rows(x, stack[lo:hi], where, known, lo, dim, name)
            assert known.shape == (ROWS, OUT)
            assert known.dtype == dtype
        assert known is not None
        torch.testing.assert_close(known, expected)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("hi", [1, 4, 6])
def test_the_hosts_groups_and_the_others_are_a_sum(
    hi: int, ends: str, dim: int, product: tuple[str, torch.dtype]
) -> None:
    name, dtype = product
    x, stack, where = operands(ends, dim, dtype)
    host = first_groups(x, stack, where, hi, dim, name)
    others = [grouped_rows(x, stack[hi:], where, None, hi, dim, name)] if hi < GROUPS else []
    torch.testing.assert_close(join_parts([host, *others], 1), by_hand(x, stack, where, dim))


def test_what_the_operation_leaves_behind_the_last_group_is_not_seen() -> None:
    """A GPU's kernel does not write there: whatever the memory held before."""

    def dirty(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
        made = product_of("grouped_mm_fallback")(x, matrices, offs=offs)
        made[int(offs[-1]) :] = torch.nan
        return made

    x, stack, ends = operands("rows of no group", 1, torch.float32)
    made = first_groups(x, stack, ends, 3, 1, dirty)
    torch.testing.assert_close(made[: ends[2]], by_hand(x, stack, ends, 1)[: ends[2]])
    assert not made[ends[2] :].any()


def test_a_parts_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part computes of other rows never reaches the result, not even as a factor of zero."""
    x, stack, ends = operands("some have none", 1, torch.float32)
    known = grouped_rows(x, stack[:3], ends, None, 0, 1, "grouped_mm_fallback")

    def dirty(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
        made = x.new_full((ROWS, OUT), torch.nan)
        made[: int(offs[-1])] = 7.0
        return made

    monkeypatch.setattr("hetegen_compile.grouped_parts.product_of", lambda name: dirty)
    found = grouped_rows(x, stack[3:5], ends, known, 3, 1, "dirty")
    assert torch.equal(found[:5], known[:5])
    assert torch.equal(found[5:9], torch.full((4, OUT), 7.0))
    assert torch.equal(found[9:], known[9:])
