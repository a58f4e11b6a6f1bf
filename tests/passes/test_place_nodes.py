"""Sides of nodes: caches on both, numbers and tables on the host, what is computed and written copied back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hetegen_compile.backend import make_backend
from hetegen_compile.ir import LINEAR, TO_HOST, info
from hetegen_compile.passes.context import HostOnlyGraphError
from hetegen_compile.passes.place_nodes import place_nodes
from hetegen_compile.steps.segments import plain_compiler
from tests.passes.graphs import Case, assert_equal_to_eager, case, ir_text, planned, scheduled
from tests.passes.test_group_segments import segments

A, B = nn.Linear(64, 64), nn.Linear(64, 64)
TABLE = nn.Embedding(100, 64)


def placed(function: Any, *inputs: Any, **changes: Any) -> Case:
    return case(function, *inputs, **changes, split=0.5).run(place_nodes)


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
t7 = hetegen.linear(t6, B.weight, B.bias, 0)"""  # fmt: skip


def test_a_write_into_a_cache_is_on_both_sides() -> None:
    found = placed(static_cache, torch.randn(1, 64), torch.tensor([3]), torch.randn(6, 64))
    assert with_sides(found) == """\
t1 = hetegen.linear(x, A.weight, A.bias, 0)
t2 = cache.index_copy_(0, at, t1)  # both
t3 = cache.t()  # accelerator
t4 = matmul(x, t3)  # accelerator
t5 = softmax(t4, -1)  # accelerator
t6 = matmul(t5, cache)  # accelerator
t7 = hetegen.linear(t6, B.weight, B.bias, 0)"""  # fmt: skip
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
t4 = hetegen.linear(t3, A.weight, A.bias, 0)"""  # fmt: skip


def test_integers_that_are_returned_and_read_are_on_both_sides() -> None:
    def function(x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        following = at + 1
        return B(A(x) * following), following

    assert "t1 = add(at, 1)  # both" in with_sides(placed(function, torch.randn(1, 64), torch.tensor([3])))


def test_a_table_that_is_smaller_than_what_is_looked_up_is_on_the_accelerator() -> None:
    assert with_sides(placed(integer_chain, torch.arange(100))).count("# accelerator") == 3
    assert with_sides(placed(integer_chain, torch.arange(99))).count("# host") == 3


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


def test_what_is_cheaper_to_download_than_to_repeat_is_not_repeated() -> None:
    found = placed(lambda x: A(x)[0], torch.randn(10, 64))
    assert with_sides(found).endswith("t2 = t1[0]  # accelerator")


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
    assert_equal_to_eager(function, *inputs)


def test_a_cache_costs_the_new_rows_and_not_the_cache() -> None:
    found = scheduled(cat_cache, torch.randn(1, 64), torch.randn(600, 64))
    down = [info(n).value for n in found.nodes(TO_HOST)]
    assert all(value.shape[0] == 1 for values in down for value in values)


# ---- autocast regions ------------------------------------------------------------------------------------------


def products_in_bfloat16(x: Tensor) -> tuple[Tensor, Tensor]:
    y = A(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = y @ y.t()
        mixed = scores @ (y * 2)
    return B(mixed.float()), scores


def test_an_autocast_region_without_a_linear_is_whole_and_on_the_accelerator() -> None:
    assert with_sides(placed(products_in_bfloat16, torch.randn(3, 64))).splitlines()[1:8] == [
        "t2 = _enter_autocast(cpu, torch.bfloat16, True, None)  # accelerator",
        "t3 = t1.t()  # accelerator",
        "t4 = matmul(t1, t3)  # accelerator",
        "t5 = mul(t1, 2)  # accelerator",
        "t6 = matmul(t4, t5)  # accelerator",
        "t7 = _exit_autocast(t2)  # accelerator",
        "t8 = t6.float()  # accelerator",
    ]


def test_an_autocast_region_is_in_one_segment() -> None:
    found = planned(products_in_bfloat16, torch.randn(3, 64))
    texts = [ir_text(part.graph) for part in segments(found).values()]
    assert [("_enter_autocast" in text, "_exit_autocast" in text) for text in texts] == [(True, True)]
    assert "autocast" not in found.text


def of_two_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    y = A(x)
    z = B(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = y @ y.t()
        mixed = scores @ (z * 2)
    return B(mixed.float()), scores


def of_a_lookup(ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = TABLE(ids)
        scores = x @ x.t()
    return A(scores.float() @ x), scores


def over_a_cache(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    y = A(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys = torch.cat([past, y])
        mixed = (y @ keys.t()) @ keys
    return B(mixed.float()), keys


def around_a_write(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = A(x)
    z = B(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = y @ y.t()
        y.add_(1)
        after = y @ y.t()
    return B(y) + z, before, after


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (of_two_levels, (torch.randn(3, 64),)),
        (of_a_lookup, (torch.tensor([1, 2, 3]),)),
        (over_a_cache, (torch.randn(3, 64), torch.randn(6, 64))),
        (around_a_write, (torch.randn(3, 64),)),
    ],
)
def test_numerics_of_autocast_regions(function: Any, inputs: tuple[Tensor, ...]) -> None:
    found = assert_equal_to_eager(function, *inputs)
    texts = [ir_text(part.graph) for part in segments(found).values()]
    pairs = [(text.count("_enter_autocast"), text.count("_exit_autocast")) for text in texts]
    assert [pair for pair in pairs if pair != (0, 0)] == [(1, 1)]
    assert "autocast" not in found.text


def test_numerics_under_an_autocast_region() -> None:
    x = torch.randn(3, 64)
    found = assert_equal_to_eager(products_in_bfloat16, x)
    with torch.no_grad():
        _, scores = found.outputs()
        y = A(x)
    assert scores.dtype == torch.bfloat16
    assert not torch.equal(scores.float(), y @ y.t())  # or the region changes nothing


def picked_by_a_mask(x: Tensor) -> Any:
    rows, columns = torch.where(x > 0)
    return B(A(x)[rows].sum(0) + columns.sum())


def test_items_of_a_list_on_the_host_are_taken_there_and_cross_by_themselves() -> None:
    dynamo = {"capture_dynamic_output_shape_ops": True}
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    items = re.findall(r"= t\d+\[[01]\]  # (\w+)", with_sides(placed(picked_by_a_mask, x, dynamo=dynamo)))
    assert len(items) >= 2
    assert set(items) == {"host"}
    assert_equal_to_eager(picked_by_a_mask, x, dynamo=dynamo)


# ---- graphs that have to run on the host as they are ------------------------------------------------------------


def noise_in_a_new_tensor(x: Tensor) -> Any:
    noise = torch.zeros(1, 64)
    noise.normal_()
    return A(x + noise)


def noise_in_a_linears_result(x: Tensor) -> Any:
    y = A(x)
    y.normal_()
    return B(y)


def draw_from_a_written_input(x: Tensor) -> Any:
    x.clamp_(0, 1)
    return A(torch.bernoulli(x))


def item_of_a_written_input(x: Tensor, step: Tensor) -> Any:
    step.add_(1.0)
    return A(x) * step.item()


def linear_under_autocast(x: Tensor) -> tuple[Tensor, Tensor]:
    z = B(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return A(x), z  # bfloat16 and float32


def noise_under_autocast(x: Tensor) -> Any:
    y = A(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.dropout(y @ y.t(), 0.5, training=True)


def test_a_linear_under_autocast_is_not_split_and_keeps_its_dtype() -> None:
    x = torch.randn(1, 64)
    found = placed(linear_under_autocast, x)
    assert len(found.nodes(LINEAR)) == 1
    assert [r for r in found.reasons() if "autocast" in r] == [
        "it is inside an autocast region of the forward, which is not cut"
    ]
    assert_equal_to_eager(linear_under_autocast, x)


def noise_in_a_result(x: Tensor) -> Any:
    y = F.dropout(A(x), 0.5, True, True)
    return y, y[0]


HOST_ONLY: dict[str, tuple[Any, tuple[Tensor, ...], str]] = {
    "noise in a new tensor": (
        noise_in_a_new_tensor, (torch.randn(1, 64),), "normal_ writes on the host what the accelerator computes with",
    ),
    "noise in a Linear's result": (
        noise_in_a_linears_result, (torch.randn(1, 64),),
        "normal_ writes on the host what the accelerator computes with",
    ),
    "draw from a written input": (
        draw_from_a_written_input, (5 * torch.randn(1, 64),),
        "clamp_ writes on the accelerator what bernoulli reads on the host",
    ),
    "item() of a written input": (
        item_of_a_written_input, (torch.randn(1, 64), torch.tensor(3.0)),
        "add_ writes on the accelerator what item reads on the host",
    ),
    "noise written into a result": (
        noise_in_a_result, (torch.randn(2, 64),), "y writes on the host what the accelerator computes with",
    ),
    "noise under autocast": (
        noise_under_autocast, (torch.randn(1, 64),),
        "dropout has to run on the host and is inside an autocast region of the forward",
    ),
}  # fmt: skip
SCALARS = {"capture_scalar_outputs": True}


@pytest.mark.parametrize("name", HOST_ONLY)
def test_what_no_transfer_keeps_in_step_runs_on_the_host_and_says_why(name: str) -> None:
    function, inputs, reason = HOST_ONLY[name]
    with pytest.raises(HostOnlyGraphError, match=f"^{re.escape(reason)}$"):
        placed(function, *inputs, dynamo=SCALARS)


@pytest.mark.parametrize("name", HOST_ONLY)
def test_a_graph_on_the_host_is_eager_and_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function, inputs, reason = HOST_ONLY[name]
    own, eager = ([x.clone() for x in inputs] for _ in range(2))
    torch._dynamo.reset()
    options: dict[str, Any] = {"accelerator": "emulated", "hardware": "cpu-emulated", "split": 0.5}
    backend = make_backend(plain_compiler)
    compiled: Any = torch.compile(function, backend=backend, fullgraph=True, options=options)
    with torch.no_grad(), torch._dynamo.config.patch(SCALARS), caplog.at_level("WARNING", "hetegen_compile"):
        torch.manual_seed(0)
        actual = compiled(*own)
        torch.manual_seed(0)
        torch.testing.assert_close(actual, function(*eager), rtol=0, atol=0)
    torch.testing.assert_close(own, eager, rtol=0, atol=0)
    assert [f"the whole graph runs on the host in eager mode: {reason}"] == caplog.messages
