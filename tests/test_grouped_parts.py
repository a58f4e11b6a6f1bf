"""Parts of a grouped product are, put together, the product."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor

from hetegen_compile.grouped_parts import (
    add_groups,
    bounds_of,
    first_groups,
    grouped_rows,
    product_of,
    whole_grouped,
)
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
        known: list[Tensor] = []
        for lo, hi in pairwise(cuts):
            before = [one.clone() for one in known]
            known.append(grouped_rows(x, stack[lo:hi], where, known[-1] if known else None, lo, dim))
            assert all(map(torch.equal, known, before)), "it is a new tensor"
            assert known[-1].shape == (ROWS, OUT)
            assert known[-1].dtype == dtype
        torch.testing.assert_close(known[-1], expected)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("hi", [1, 4, 6])
def test_the_hosts_groups_and_the_others_are_a_sum(
    hi: int, ends: str, dim: int, product: tuple[str, torch.dtype]
) -> None:
    name, dtype = product
    x, stack, where = operands(ends, dim, dtype)
    host = first_groups(x, stack, where, hi, dim, name)
    others = [grouped_rows(x, stack[hi:], where, None, hi, dim)] if hi < GROUPS else []
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


def test_a_parts_own_rows_only() -> None:
    """They are written over what is known; nothing else of that is touched."""
    x, stack, ends = operands("some have none", 1, torch.float32)
    known = x.new_full((ROWS, OUT), 7.0)
    bounds = bounds_of(ends, 3, 2)
    assert bounds == [5, 5, 9]
    found = add_groups(x, stack[3:5], bounds, known, 1)
    assert found is known
    torch.testing.assert_close(found[5:9], by_hand(x, stack, ends, 1)[5:9])
    assert torch.equal(found[:5], torch.full((5, OUT), 7.0))
    assert torch.equal(found[9:], torch.full((ROWS - 9, OUT), 7.0))


def test_ends_that_do_not_fit_the_rows_are_no_error_of_a_part() -> None:
    x, stack, _ = operands("nothing", 1, torch.float32)
    found = add_groups(x, stack, [0, 5, 3, 3, 3, ROWS + 4, ROWS + 4], None, 1)
    torch.testing.assert_close(found[:3], x[:3] @ stack[0])
    torch.testing.assert_close(found[3:], x[3:] @ stack[4])
