"""Accelerator nodes become segments cut at every Linear; host copies, twins and write-backs stand beside them."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn

from hetegen_compile.ir import info
from tests.passes.graphs import Case, assert_equal_to_eager, ir_text, on_host, planned, streamed

A, B, C = (nn.Linear(64, 64) for _ in range(3))
TABLE = nn.Embedding(100, 64)


def siblings(x: Tensor) -> Any:
    a = A(x).view(1, 4, 16)
    b = B(x).view(1, 4, 16)
    return C((a * b).view(1, 64))


def write_between(x: Tensor) -> Any:
    y = A(x)
    z = B(y)
    y.add_(1)
    return C(y) + z


def write_first(x: Tensor) -> Any:
    y = A(x)
    y.add_(1)
    return C(y) + y


def static_cache(x: Tensor, at: Tensor, cache: Tensor) -> Any:
    cache.index_copy_(0, at, A(x))
    return B(cache)


def grown_cache(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    keys = torch.cat([past, A(x)])
    return B(keys), keys


def lookup(ids: Tensor) -> tuple[Tensor, Tensor]:
    return A(TABLE(ids)), ids + 1


def computed_write(x: Tensor, y: Tensor) -> Any:
    x.mul_(y)
    return A(x)


X = torch.randn(1, 64)
FUNCTIONS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "siblings": (siblings, (X,)),
    "write first": (write_first, (X,)),
    "static cache": (static_cache, (X, torch.tensor([2]), torch.randn(6, 64))),
    "grown cache": (grown_cache, (X, torch.randn(6, 64))),
    "lookup": (lookup, (torch.tensor([2]),)),
    "computed write": (computed_write, (X, torch.randn(64))),
    "chunk": (lambda x: B(torch.cat([part.relu() for part in A(x).chunk(2, -1)], -1)), (X,)),
    "deep": (lambda x: C(B(A(x).relu()).relu() + A(x)), (X,)),
}


def segments(found: Case) -> dict[str, fx.GraphModule]:
    calls = found.module.graph.find_nodes(op="call_module")
    found_modules = {str(n.target): found.module.get_submodule(str(n.target)) for n in calls}
    return {name: part for name, part in found_modules.items() if isinstance(part, fx.GraphModule)}


def test_siblings_open_one_level_and_what_is_between_linears_is_a_segment() -> None:
    found = planned(siblings, X)
    assert found.text == """\
t1 = mirror(x)
t2 = hetegen.linear(t1, A.weight, A.bias, 0)
t3 = hetegen.linear(t1, B.weight, B.bias, 0)
t4 = segment_1(t2, t3)
t5 = t4[0]
t6 = hetegen.linear(t5, C.weight, C.bias, 0)
return (t6,)"""  # fmt: skip
    assert ir_text(segments(found)["segment_1"].graph) == """\
t1 = in_0.view(1, 4, 16)
t2 = in_1.view(1, 4, 16)
t3 = mul(t1, t2)
t4 = t3.view(1, 64)
return (t4,)"""  # fmt: skip


def test_a_write_stays_between_its_readers() -> None:
    assert planned(write_between, X).text == """\
t1 = mirror(x)
t2 = hetegen.linear(t1, A.weight, A.bias, 0)
t3 = hetegen.linear(t2, B.weight, B.bias, 0)
t4 = segment_2(t2)
t5 = hetegen.linear(t2, C.weight, C.bias, 0)
t6 = segment_3(t5, t3)
t7 = t6[0]
return (t7,)"""  # fmt: skip


def test_a_cache_that_is_returned_is_made_twice_and_its_twin_is_named() -> None:
    assert planned(grown_cache, X, torch.randn(6, 64)).text == """\
t1 = mirror(x)
t2 = mirror(past)
t3 = hetegen.linear(t1, A.weight, A.bias, 0)
t4 = segment_1(t2, t3)
t5 = t4[0]
t6 = hetegen.linear(t5, B.weight, B.bias, 0)
t7 = cat([past, t3])
t8 = twin(t7, t5)
return (t6, t7)"""  # fmt: skip


def test_host_nodes_that_feed_the_accelerator_come_first_and_others_last() -> None:
    assert planned(lookup, torch.tensor([2])).text == """\
t1 = embedding(ids, TABLE.weight, None, None, 2.0, False, False)
t2 = hetegen.linear(t1, A.weight, A.bias, 0)
t3 = add(ids, 1)
return (t2, t3)"""  # fmt: skip


def test_what_only_the_accelerator_wrote_is_written_back_at_the_end() -> None:
    assert planned(computed_write, X.clone(), torch.randn(64)).text == """\
t1 = mirror(x)
t2 = mirror(y)
t3 = segment_0(t1, t2)
t4 = hetegen.linear(t1, A.weight, A.bias, 0)
t5 = write_back(x, t1)
return (t4,)"""  # fmt: skip


def test_if_everything_fits_the_graph_is_one_segment() -> None:
    found = planned(siblings, X, whole_graph=True)
    assert [line for line in found.text.splitlines() if "mirror" not in line] == [
        "t8 = segment_0(t1, t2, t3, t4, t5, t6, t7)",
        "t9 = t8[0]",
        "return (t9,)",
    ]
    assert ir_text(segments(found)["segment_0"].graph).count("whole_linear") == 3
    torch.testing.assert_close(found.outputs()[0], siblings(X))


def test_a_graph_of_host_nodes_has_no_segment() -> None:
    found = planned(lambda ids: ids + 1, torch.tensor([2]))
    assert found.text == "t1 = add(ids, 1)\nreturn (t1,)"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_plan_changes_a_segment(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    texts = set()
    for plan in (streamed, on_host):
        found = planned(function, *inputs, plan=plan)
        texts.add((found.text, *(ir_text(part.graph) for part in segments(found).values())))
    assert len(texts) == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numerics(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    own, eager = ([x.clone() for x in inputs] for _ in range(2))
    actual = planned(function, *own).outputs()
    with torch.no_grad():
        expected = function(*eager)
    torch.testing.assert_close(tuple(actual), expected if isinstance(expected, tuple) else (expected,))
    torch.testing.assert_close(own, eager)
    assert_equal_to_eager(function, *inputs)


# ---- what a segment's node tells ------------------------------------------------------------------------------


def test_notes_of_a_segment_are_those_of_its_nodes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"up": nn.Linear(64, 64), "act": nn.ReLU(), "norm": nn.LayerNorm(64)})

        def forward(self, x: Tensor) -> Any:
            y = self.block["norm"](self.block["act"](self.block["up"](x)))
            return y @ y.t()

    found = planned(Model(), torch.randn(2, 64))
    (call,) = found.module.graph.find_nodes(op="call_module")
    notes = info(call)
    assert notes.side == "accelerator"
    assert notes.flops == 2 * 2 * 2 * 64
    assert notes.traffic_bytes == sympy.Integer(4 * (2 * 64 + 64 + 64 + 2 * 2))  # its inputs and its outputs
    assert [tuple(value.shape) for value in notes.value] == [(2, 2)]
    assert notes.module in ("", "block")
    assert notes.writes == frozenset()


def test_a_segments_writes_are_those_that_others_see() -> None:
    found = planned(static_cache, X, torch.tensor([2]), torch.randn(6, 64))
    (call,) = found.module.graph.find_nodes(op="call_module")
    (cache,) = [n for n in found.module.graph.find_nodes(op="placeholder") if info(n).value.shape == (6, 64)]
    assert info(call).writes == info(cache).storages
    inside = planned(lambda x: B((A(x) + 1).mul_(2)), X)
    (call,) = inside.module.graph.find_nodes(op="call_module")
    assert info(call).writes == frozenset()


# ---- reads and writes of the host ----------------------------------------------------------------------------


def test_a_host_copy_is_made_before_the_hosts_write() -> None:
    def function(ids: Tensor) -> tuple[Tensor, Tensor]:
        old = ids.clone()
        ids.add_(1)
        return A(TABLE(ids)), old

    assert_equal_to_eager(function, torch.tensor([2]))


def test_a_host_read_comes_after_the_hosts_write_of_a_later_level() -> None:
    def function(token: Tensor, x: Tensor) -> Any:
        token.copy_(A(x).argmax(-1))
        return B(TABLE(token))

    assert_equal_to_eager(function, torch.tensor([2]), X)


def test_a_segment_is_given_the_symbols_of_its_inputs_sizes() -> None:
    """Where all it reads has ``s + 1`` rows, ``s`` is one more input: Inductor cannot solve for it."""

    def function(x: Tensor, past: Tensor) -> Any:
        keys = torch.cat([past, A(x)])
        return C(B(keys.mean(0, keepdim=True)) + keys)

    past = torch.randn(5, 64)
    torch._dynamo.mark_dynamic(past, 0)
    last = segments(planned(function, X, past))["segment_2"]
    values = [info(node).value for node in last.graph.find_nodes(op="placeholder")]
    (size,) = [value for value in values if isinstance(value, torch.SymInt)]
    (keys,) = [value for value in values if isinstance(value, Tensor) and not isinstance(value.shape[0], int)]
    assert keys.shape[0].node.expr == size.node.expr + 1
