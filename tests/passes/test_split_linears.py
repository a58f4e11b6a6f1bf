"""Every Linear becomes parts and a join, as its plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hetegen_compile.ir import HOST_LINEAR, JOIN, LINEAR, PARTIAL_LINEAR, info
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.split_linears import split_linears
from tests.passes.graphs import (
    Case,
    again,
    on_host,
    planned,
    property_test,
    quarters,
    resident,
    streamed,
)

W = nn.Parameter(torch.randn(16, 8))
V = nn.Parameter(torch.randn(16, 8))
B_OF_W = nn.Parameter(torch.randn(16))
B_OF_V = nn.Parameter(torch.randn(8))


def out_in(x: Tensor) -> Tensor:
    return nn.functional.linear(x, W, B_OF_W)


def in_out(x: Tensor) -> Tensor:
    return torch.addmm(B_OF_V, x, V)


def split(function: Callable[[Tensor], Tensor], x: Tensor, plan: Callable[[int], LinearPlan]) -> Case:
    found = planned(function, x, plan=plan)
    found.apply(split_linears)
    assert found.nodes(LINEAR) == []
    return found


def test_all_three_places() -> None:
    assert split(out_in, torch.randn(3, 8), quarters).text == """\
t1 = mirror(x)
t2 = prefetch(W, [4, 8], 0, -1, [])
t3 = wait(t2)
t4 = partial_linear(t1, t3, B_OF_W, 4, 8, 0)
t5 = release(t2)
t6 = prefetch(W, [8, 12], 0, -1, [])
t7 = wait(t6)
t8 = partial_linear(t1, t7, B_OF_W, 8, 12, 0)
t9 = release(t6)
t10 = resident(W, 12, 16)
t11 = partial_linear(t1, t10, B_OF_W, 12, 16, 0)
t12 = host_linear(t1, W, B_OF_W, 0, 4, 0)
t13 = join([t12, t4, t8, t11], 0)
return (t13,)"""  # fmt: skip


def test_resident_rows_come_behind_the_chunks_that_the_ring_holds() -> None:
    """The others are on their way still; the parts are joined in the order of their rows."""
    found = planned(out_in, torch.randn(3, 8), plan=quarters)
    assert found.context.residency is not None
    found.context = replace(found.context, residency=replace(found.context.residency, ring_bytes=256))  # a chunk
    found.apply(split_linears)
    parts = found.nodes(PARTIAL_LINEAR)
    assert [tuple(part.args[3:5]) for part in parts] == [(4, 8), (12, 16), (8, 12)]
    (join,) = found.nodes(JOIN)
    assert join.args[0] == [*found.nodes(HOST_LINEAR), parts[0], parts[2], parts[1]]


def test_partial_sums_get_the_bias_once() -> None:
    assert split(in_out, torch.randn(3, 16), quarters).text == """\
t1 = mirror(x)
t2 = prefetch(V, [4, 8], 0, -1, [])
t3 = wait(t2)
t4 = partial_linear(t1, t3, B_OF_V, 4, 8, 1)
t5 = release(t2)
t6 = prefetch(V, [8, 12], 0, -1, [])
t7 = wait(t6)
t8 = partial_linear(t1, t7, None, 8, 12, 1)
t9 = release(t6)
t10 = resident(V, 12, 16)
t11 = partial_linear(t1, t10, None, 12, 16, 1)
t12 = host_linear(t1, V, None, 0, 4, 1)
t13 = join([t12, t4, t8, t11], 1)
return (t13,)"""  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (on_host, "t2 = host_linear(t1, {w}, {b}, 0, 16, {d})\nt3 = join([t2], {d})\nreturn (t3,)"),
        (
            resident,
            "t2 = resident({w}, 0, 16)\nt3 = partial_linear(t1, t2, {b}, 0, 16, {d})\nt4 = join([t3], {d})\n"
            "return (t4,)",
        ),
        (
            streamed,
            "t2 = prefetch({w}, [0, 16], 0, -1, [])\nt3 = wait(t2)\nt4 = partial_linear(t1, t3, {b}, 0, 16, {d})\n"
            "t5 = release(t2)\nt6 = join([t4], {d})\nreturn (t6,)",
        ),
    ],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_one_place_has_one_part(plan: Callable[[int], LinearPlan], expected: str, dim: int) -> None:
    found = split(in_out if dim else out_in, torch.randn(3, 16 if dim else 8), plan)
    weight, bias = ("V", "B_OF_V") if dim else ("W", "B_OF_W")
    assert found.text == "t1 = mirror(x)\n" + expected.format(w=weight, b=bias, d=dim)


@pytest.mark.parametrize("function", [out_in, in_out])
def test_notes_of_the_parts_add_up_to_the_whole(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 8 if function is out_in else 16)
    before = planned(function, x, plan=quarters)
    (linear,) = before.nodes(LINEAR)
    whole = info(linear)
    before.apply(split_linears)
    parts = before.nodes(PARTIAL_LINEAR) + before.nodes(HOST_LINEAR)
    assert sum(info(part).flops for part in parts) == whole.flops
    (join,) = before.nodes(JOIN)
    assert info(join).value is whole.value
    assert {info(node).position for node in [*parts, join]} == {whole.position}
    assert [info(part).side for part in parts] == ["accelerator"] * 3 + ["host"]
    for part in parts:
        width = part.args[4] - part.args[3] if function is out_in else 8
        assert tuple(info(part).value.shape) == (3, width)


# ---- numerics ----------------------------------------------------------------------------------------------


@st.composite
def tilings(draw: st.DrawFn) -> LinearPlan:
    """Any division of 16 rows in which at least two places have some."""
    cuts = sorted(draw(st.sets(st.integers(1, 15), min_size=1, max_size=5)))
    host = draw(st.sampled_from([0, cuts[0]]))
    bounds = [0, *cuts, 16]
    ranges = [r for r in zip(bounds, bounds[1:], strict=False) if r[0] >= host]
    last_is_resident = draw(st.booleans())
    kept = ranges.pop() if last_is_resident else None
    return LinearPlan(16, host, tuple(ranges), kept)


@pytest.fixture(scope="module")
def uncut() -> dict[int, Case]:
    return {0: planned(out_in, torch.randn(3, 8)), 1: planned(in_out, torch.randn(3, 16))}


@property_test
@given(tilings(), st.sampled_from([0, 1]))
def test_any_tiling_is_equal_to_the_whole(uncut: dict[int, Case], plan: LinearPlan, dim: int) -> None:
    found = again(uncut[dim])
    splits = dict.fromkeys(found.context.splits or {}, plan)
    found.context = replace(found.context, splits=splits)
    found.apply(split_linears)
    parts = found.nodes(PARTIAL_LINEAR) + found.nodes(HOST_LINEAR)
    assert len(parts) == len(plan.streamed) + (plan.host > 0) + (plan.resident is not None) > 1
    x = next(value for value in found.inputs if not isinstance(value, nn.Parameter))
    torch.testing.assert_close(found.outputs()[0], in_out(x) if dim else out_in(x))


def test_partial_sums_of_bfloat16_are_added_in_float32() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(512, 64, dtype=torch.bfloat16))
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    sixteenths = LinearPlan(512, 32, tuple((lo, lo + 32) for lo in range(32, 512, 32)), None)
    found = split(lambda x: x @ weight, x, lambda rows: sixteenths)
    exact = x.double() @ weight.double()
    parts = [x.double()[:, lo : lo + 32] @ weight.double()[lo : lo + 32] for lo in range(0, 512, 32)]
    rounded = torch.stack(parts).abs().sum(0).max() * 2**-9 + exact.abs() * 2**-8
    assert found.outputs()[0].dtype == torch.bfloat16
    assert bool(((found.outputs()[0].double() - exact).abs() <= rounded).all())
