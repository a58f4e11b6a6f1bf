"""Sides of nodes: caches on both, numbers and tables on the host, what is computed and written copied back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hetegen_compile.ir import LINEAR, TO_HOST, info
from hetegen_compile.passes import place_nodes
from tests.passes.graphs import Case, assert_equal_to_eager, case, scheduled

A, B = nn.Linear(64, 64), nn.Linear(64, 64)
TABLE = nn.Embedding(100, 64)
BUDGET = 2**20  # in which TABLE is large enough to stay on the host


def placed(function: Any, *inputs: Any, **changes: Any) -> Case:
    return case(function, *inputs, **changes, budget_bytes=BUDGET, split=0.5).run(place_nodes)


def with_sides(found: Case) -> str:
    """The graph with the side of each node behind it."""
    placement = found.context.placement
    assert placement is not None
    lines = []
    nodes = [node for node in found.module.graph.nodes if node.op not in ("placeholder", "output")]
    for node, line in zip(nodes, found.text.splitlines(), strict=False):
        host, accelerator = node in placement.host, node in placement.accelerator
        side = {(1, 1): "both", (1, 0): "host", (0, 1): "accelerator", (0, 0): "nowhere"}[host, accelerator]
        lines.append(line if node.target == LINEAR else f"{line}  # {side}")
    return "\n".join(lines)


def cat_cache(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    keys = torch.cat([past, A(x)])
    return B(torch.softmax(x @ keys.t(), -1) @ keys), keys


def static_cache(x: Tensor, at: Tensor, cache: Tensor) -> Any:
    cache.index_copy_(0, at, A(x))
    return B(torch.softmax(x @ cache.t(), -1) @ cache)


def computed_write(x: Tensor, y: Tensor) -> Any:
    x.mul_(y)
    return A(x)


def integer_chain(ids: Tensor) -> Any:
    return A(TABLE((ids + 1) % 7))


def test_a_cache_that_grows_is_on_both_sides() -> None:
    assert with_sides(placed(cat_cache, torch.randn(1, 64), torch.randn(6, 64))) == """\
t1 = hetegen.linear(x, A.weight, A.bias, 0)
t2 = cat([past, t1])  # both
t3 = t2.t()  # accelerator
t4 = matmul(x, t3)  # accelerator
t5 = softmax(t4, -1)  # accelerator
t6 = matmul(t5, t2)  # accelerator
t7 = hetegen.linear(t6, B.weight, B.bias, 0)"""


def test_a_write_into_a_cache_is_on_both_sides() -> None:
    found = placed(static_cache, torch.randn(1, 64), torch.tensor([3]), torch.randn(6, 64))
    assert with_sides(found) == """\
t1 = hetegen.linear(x, A.weight, A.bias, 0)
t2 = cache.index_copy_(0, at, t1)  # both
t3 = cache.t()  # accelerator
t4 = matmul(x, t3)  # accelerator
t5 = softmax(t4, -1)  # accelerator
t6 = matmul(t5, cache)  # accelerator
t7 = hetegen.linear(t6, B.weight, B.bias, 0)"""
    assert found.context.placement is not None
    assert found.context.placement.written_back == {}
    assert not any("copied back" in reason for reason in found.reasons())


def test_a_sliding_cache_is_on_both_sides() -> None:
    def function(x: Tensor, cache: Tensor) -> Any:
        cache.copy_(cache.roll(-1, 0))
        cache[-1:] = A(x)
        return B(cache)

    found = placed(function, torch.randn(1, 64), torch.randn(6, 64))
    assert with_sides(found).count("# both") == 3
    assert found.refusals == []


def test_a_computed_write_to_an_input_is_copied_back_and_says_why() -> None:
    found = placed(computed_write, torch.randn(1, 64), torch.randn(64))
    assert with_sides(found).startswith("t1 = x.mul_(y)  # accelerator\n")
    assert found.context.placement is not None
    assert list(found.context.placement.written_back.values()) == ["mul_ writes it with mul_, which is computed"]
    assert found.reasons() == [
        "copied back whole after each step: mul_ writes it with mul_, which is computed"
    ]  # fmt: skip
    assert found.refusals[0].where == "x"


def test_integer_arithmetic_for_a_table_on_the_host_stays_there() -> None:
    assert with_sides(placed(integer_chain, torch.tensor([3, 5]))) == """\
t1 = add(ids, 1)  # host
t2 = mod(t1, 7)  # host
t3 = embedding(t2, TABLE.weight, None, None, 2.0, False, False)  # host
t4 = hetegen.linear(t3, A.weight, A.bias, 0)"""


def test_integers_that_are_returned_and_read_are_on_both_sides() -> None:
    def function(x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        following = at + 1
        return B(A(x) * following), following

    assert "t1 = add(at, 1)  # both" in with_sides(placed(function, torch.randn(1, 64), torch.tensor([3])))


def test_a_small_table_is_looked_up_on_the_accelerator() -> None:
    found = case(integer_chain, torch.tensor([3, 5]), budget_bytes=2**30, split=0.5).run(place_nodes)
    assert with_sides(found).count("# accelerator") == 3


@pytest.mark.parametrize(
    "draw", [lambda y: F.dropout(y, 0.5, training=True), lambda y: y + torch.rand(64), torch.bernoulli]
)
def test_random_numbers_are_drawn_on_the_host(draw: Any) -> None:
    found = placed(lambda x: B(draw(torch.sigmoid(A(x)))), torch.randn(1, 64))
    random = [line for line in with_sides(found).splitlines() if any(w in line for w in ("dropout", "rand", "bern"))]
    assert len(random) == 1
    assert random[0].endswith("# host")


def test_item_and_arithmetic_on_sizes_are_on_the_host() -> None:
    config = {"capture_scalar_outputs": True}
    found = placed(lambda x: B(A(x) * (A(x).sum().item() + 1)), torch.randn(1, 64), dynamo=config)
    sides = with_sides(found)
    assert "t4 = t3.item()  # host" in sides
    assert "t5 = add(t4, 1)  # host" in sides
    assert "t3 = t2.sum()  # accelerator" in sides


def test_what_is_cheaper_to_repeat_than_to_download_is_repeated() -> None:
    found = placed(lambda x: A(x).expand(10, 64).contiguous(), torch.randn(1, 64))
    assert with_sides(found).endswith("# host")  # one row comes down, not ten


def test_what_only_the_host_needs_is_not_on_the_accelerator() -> None:
    found = placed(lambda x, past: (A(x), torch.cat([past, past])), torch.randn(1, 64), torch.randn(2, 64))
    assert "t2 = cat([past, past])  # host" in with_sides(found)


def test_every_node_that_something_reads_is_somewhere() -> None:
    for function, inputs in EQUAL.values():
        assert "# nowhere" not in with_sides(placed(function, *inputs))


EQUAL: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "cat": (cat_cache, (torch.randn(1, 64), torch.randn(6, 64))),
    "index_copy_": (static_cache, (torch.randn(1, 64), torch.tensor([3]), torch.randn(6, 64))),
    "written back": (computed_write, (torch.randn(1, 64), torch.randn(64))),
    "integers": (integer_chain, (torch.tensor([3, 5]),)),
    "random": (lambda x: B(F.dropout(A(x), 0.5, training=True)), (torch.randn(1, 64),)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_numerics(name: str) -> None:
    function, inputs = EQUAL[name]
    assert_equal_to_eager(function, *inputs, budget_bytes=BUDGET)


def test_a_cache_costs_the_new_rows_and_not_the_cache() -> None:
    found = scheduled(cat_cache, torch.randn(1, 64), torch.randn(600, 64))
    down = [info(n).value for n in found.nodes(TO_HOST)]
    assert all(value.shape[0] == 1 for values in down for value in values)


# ---- defects ---------------------------------------------------------------------------------------------------


@pytest.mark.xfail(
    strict=True,
    reason="_leaf_bytes takes the smaller of leaves and value, so repeating is 'cheaper' unless there are writes",
)
def test_what_is_cheaper_to_download_than_to_repeat_is_not_repeated() -> None:
    found = placed(lambda x: A(x)[0], torch.randn(10, 64))
    assert with_sides(found).endswith("t2 = t1[0]  # accelerator")


@pytest.mark.xfail(strict=True, reason="a random write in place runs on the host; the accelerator's copy never sees it")
def test_random_numbers_written_into_a_new_tensor() -> None:
    def function(x: Tensor) -> Any:
        noise = torch.zeros(1, 64)
        noise.normal_()
        return A(x + noise)

    assert_equal_to_eager(function, torch.randn(1, 64))


@pytest.mark.xfail(strict=True, reason="a random write in place runs on the host's download of the accelerator's value")
def test_random_numbers_written_into_a_linears_result() -> None:
    def function(x: Tensor) -> Any:
        y = A(x)
        y.normal_()
        return B(y)

    assert_equal_to_eager(function, torch.randn(1, 64))


@pytest.mark.xfail(
    strict=True, raises=(AssertionError, RuntimeError),
    reason="a host-only node reads an input from host memory, where the accelerator's computed write has not come yet",
)  # fmt: skip
def test_a_host_node_reads_an_input_after_its_computed_write() -> None:
    def function(x: Tensor) -> Any:
        x.clamp_(0, 1)
        return A(torch.bernoulli(x))

    assert_equal_to_eager(function, 5 * torch.randn(1, 64))


@pytest.mark.xfail(strict=True, reason="item() reads the host's copy of an input that the accelerator wrote")
def test_item_of_an_input_after_its_computed_write() -> None:
    def function(x: Tensor, step: Tensor) -> Any:
        step.add_(1.0)
        return A(x) * step.item()

    assert_equal_to_eager(function, torch.randn(1, 64), torch.tensor(3.0), dynamo={"capture_scalar_outputs": True})


@pytest.mark.xfail(strict=True, reason="the caller gets the host's lookup, the accelerator wrote its own copy")
def test_a_value_of_the_host_that_is_written_by_arithmetic() -> None:
    def function(ids: Tensor) -> tuple[Tensor, Tensor]:
        x = TABLE(ids)
        x.mul_(8.0)
        return A(x), x

    assert_equal_to_eager(function, torch.tensor([3, 5]), budget_bytes=BUDGET)


@pytest.mark.xfail(strict=True, reason="autocast's enter and exit go to the host's side; parts run without it")
def test_autocast_inside_the_forward() -> None:
    def function(x: Tensor) -> Any:
        z = B(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return A(x), z  # bfloat16 and float32

    assert_equal_to_eager(function, torch.randn(1, 64))
