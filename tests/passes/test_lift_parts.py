"""Parts of weights as inputs: which are lifted, which are not, and what the graph computes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.capture import capture
from hetegen_compile.passes.lift_parts import WeightPart, lift_parts, with_parts
from hetegen_compile.passes.normalise_linears import normalise_linears
from tests.passes.graphs import context_for, dynamo_graph, run_until

N = 8
X = torch.randn(3, N)
PACKED, PACKED_BIAS = nn.Parameter(torch.randn(3 * N, N)), nn.Parameter(torch.randn(3 * N))
COLUMN_MAJOR = nn.Parameter(torch.randn(N, 2 * N).t())
STACK = nn.Parameter(torch.randn(3, N, N))
FLAT = nn.Parameter(torch.randn(N * N))
PLAIN = nn.Parameter(torch.randn(N, N))

Form = Callable[[Tensor], Any]


def weights_of(module: fx.GraphModule, inputs: Sequence[Any]) -> list[str]:
    placeholders = module.graph.find_nodes(op="placeholder")
    return [n.name for n, value in zip(placeholders, inputs, strict=True) if isinstance(value, nn.Parameter)]


def lifted(form: Form) -> tuple[fx.GraphModule, Sequence[Any], tuple[WeightPart, ...]]:
    module, inputs = dynamo_graph(form, X)
    mode = capture(module, inputs)
    module, parts = lift_parts(module, inputs, weights_of(module, inputs), mode)
    return module, with_parts(inputs, parts), parts


def linears(module: fx.GraphModule, inputs: Sequence[Any]) -> list[fx.Node]:
    run_until(normalise_linears, module, context_for(module, inputs))
    return module.graph.find_nodes(op="call_function", target=LINEAR)


def both_parts(x: Tensor) -> Tensor:
    first, second, _ = PACKED.chunk(3)
    return F.linear(x, first, PACKED_BIAS[:N]) + F.linear(x, second, PACKED_BIAS[N : 2 * N])


LIFTED: dict[str, tuple[Form, list[WeightPart]]] = {
    "chunk": (both_parts, [
        WeightPart(0, (N, N), (N, 1), 0), WeightPart(1, (N,), (1,), 0),
        WeightPart(0, (N, N), (N, 1), N * N), WeightPart(1, (N,), (1,), N),
    ]),
    "slice": (lambda x: F.linear(x, PACKED[N : N + 2]), [WeightPart(0, (2, N), (N, 1), N * N)]),
    "column-major": (lambda x: F.linear(x, COLUMN_MAJOR), [WeightPart(0, (N, 2 * N), (2 * N, 1), 0)]),
    "transposed twice": (lambda x: x @ COLUMN_MAJOR.t(), [WeightPart(0, (N, 2 * N), (2 * N, 1), 0)]),
    "matrix of a stack": (lambda x: x @ STACK[1], [WeightPart(0, (N, N), (N, 1), N * N)]),
    "unbind": (lambda x: x @ STACK.unbind()[2].t(), [WeightPart(0, (N, N), (N, 1), 2 * N * N)]),
    "view": (lambda x: F.linear(x, FLAT.view(N, N)), [WeightPart(0, (N, N), (N, 1), 0)]),
    "twice": (lambda x: F.linear(F.linear(x, PACKED[:N]), PACKED[:N]), [WeightPart(0, (N, N), (N, 1), 0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", LIFTED)
def test_a_contiguous_part_becomes_an_input_and_a_linear(name: str) -> None:
    form, expected = LIFTED[name]
    module, inputs, parts = lifted(form)
    assert [replace(part, base=0) for part in parts] == [replace(part, base=0) for part in expected]
    assert len({part.base for part in parts}) == len({part.base for part in expected})
    assert all("_part_" in node.name for node in module.graph.find_nodes(op="placeholder")[-len(parts) :])
    found = linears(module, inputs)
    assert len(found) == (2 if name in ("chunk", "twice") else 1)
    assert all("_part_" in str(node.args[1]) for node in found)
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs)[0], form(X))


def test_a_column_major_weight_is_one_stored_in_out() -> None:
    module, inputs, _ = lifted(lambda x: F.linear(x, COLUMN_MAJOR))
    (linear,) = linears(module, inputs)
    assert linear.args[3] == 1
    assert info(linear.args[1]).value.shape == (N, 2 * N)  # type: ignore[arg-type]


def written(x: Tensor) -> Tensor:
    with torch.no_grad():
        FLAT.mul_(1.0)
    return F.linear(x, FLAT.view(N, N))


@pytest.mark.parametrize(
    "form",
    [
        lambda x: F.linear(x, PLAIN),
        lambda x: x @ PLAIN.t(),
        lambda x: F.linear(x, PACKED[:, :2].t() @ PACKED[:, :N]),
        lambda x: F.linear(x[:, :2], PACKED[:, :2]),
        lambda x: F.linear(x, PACKED[::2]),
        lambda x: F.linear(x, PACKED[:N] * 2),
        lambda x: x @ F.linear(PACKED[:N], PACKED[N : 2 * N]),
        lambda x: x[:, :2] @ x.view(N, 3)[:2].clone(),
        written,
    ],
)  # fmt: skip
def test_what_is_whole_or_not_contiguous_or_computed_or_written_stays(form: Form) -> None:
    module, _, parts = lifted(form)
    assert parts == ()
    assert not any("_part_" in node.name for node in module.graph.nodes)


def test_dynamos_own_graph_is_not_changed() -> None:
    module, inputs = dynamo_graph(both_parts, X)
    mode, before = capture(module, inputs), len(module.graph.nodes)
    changed, parts = lift_parts(module, inputs, weights_of(module, inputs), mode)
    assert parts
    assert changed is not module
    assert len(module.graph.nodes) == before


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_part_is_a_parameter_and_has_its_version(guard: Callable[[], Any]) -> None:
    whole = nn.Parameter(torch.randn(4, 4))
    with guard():
        _, part = with_parts([whole], [WeightPart(0, (2, 4), (4, 1), 8)])
    assert isinstance(part, nn.Parameter)
    before = part._version
    with torch.no_grad():
        whole.add_(1)
    assert part._version == before + 1
    torch.testing.assert_close(part.data, whole.data[2:])


def test_the_offset_counts_from_where_this_calls_weight_begins() -> None:
    flat = torch.arange(24.0)
    _, part = with_parts([flat[8:]], [WeightPart(0, (2, 2), (2, 1), 4)])
    assert part.flatten().tolist() == [12, 13, 14, 15]
