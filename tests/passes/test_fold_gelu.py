"""GELU written out by its tanh formula is one operation, whoever wrote it down and in whatever order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

from hetegen_compile.ir import HOST_LINEAR, info
from hetegen_compile.passes.fold_gelu import fold_gelu
from tests.passes.graphs import case, scheduled

Form = Callable[[Tensor], Tensor]

ROOT = math.sqrt(2.0 / math.pi)
WRITTEN: dict[str, Form] = {
    "transformers' gelu_new": ACT2FN["gelu_new"],
    "transformers' gelu_fast": ACT2FN["gelu_fast"],
    "transformers' gelu_accurate": ACT2FN["gelu_accurate"],
    "BLOOM's, eight digits": bloom_gelu_forward,
    "methods": lambda x: x.mul(0.5).mul(x.pow(3).mul(0.044715).add(x).mul(ROOT).tanh().add(1)),
    "factors inside": lambda x: (0.5 + 0.5 * torch.tanh(x * ROOT + x * x * x * (0.044715 * ROOT))) * x,
}
OTHERS: dict[str, Form] = {
    "another constant": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "another power": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
    "another factor": lambda x: x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3))),
    "tanh alone": lambda x: torch.tanh(ROOT * (x + 0.044715 * x**3)),
    "squared": lambda x: 0.5 * x * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3))),
    "another tensor inside": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x.flip(-1) + 0.044715 * x**3))),
    "scaled add": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * torch.add(x, x**3, alpha=2) * 0.044715)),
    "cubed in another dtype": lambda x: (
        0.5 * x * (1 + torch.tanh(ROOT * (x + (0.044715 * x.float() ** 3).to(x.dtype))))
    ),
}


def folded(form: Form, x: Tensor) -> tuple[int, Any]:
    """How many calls of GELU the graph has, and its result."""
    found = case(lambda x: form(x) + 0, x).run(fold_gelu)
    return len(found.nodes(F.gelu)), found.outputs()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [pytest.param(form, id=name) for name, form in WRITTEN.items()])
def test_the_formula_is_one_operation_with_the_same_values(form: Form, dtype: torch.dtype) -> None:
    """In half precision it is nearer to the float32 result than the formula, which rounds after each operation."""
    x = torch.linspace(-12, 12, 4001).to(dtype)
    calls, result = folded(form, x)
    assert calls == 1
    exact = F.gelu(x.double(), approximate="tanh")
    error, eager_error = ((values.double() - exact).abs().max() for values in (result, form(x)))
    assert error <= 1.01 * eager_error + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", [pytest.param(form, id=name) for name, form in OTHERS.items()])
def test_what_is_not_the_formula_stays(form: Form, dtype: torch.dtype) -> None:
    x = torch.linspace(-4, 4, 64, dtype=dtype)
    calls, result = folded(form, x)
    assert calls == 0
    assert torch.equal(result, form(x))


def test_the_constants_have_to_be_right_to_the_precision_that_is_computed_in() -> None:
    """Eight digits are float32's, not float64's."""
    assert folded(bloom_gelu_forward, torch.randn(8, dtype=torch.float64))[0] == 0
    assert folded(ACT2FN["gelu_new"], torch.randn(8, dtype=torch.float64))[0] == 1


def test_what_else_reads_parts_of_the_formula_still_gets_them() -> None:
    def function(x: Tensor) -> Any:
        cube = x**3
        t = torch.tanh(ROOT * (x + 0.044715 * cube))
        return 0.5 * x * (1 + t), t, cube

    x = torch.randn(64)
    found = case(function, x).run(fold_gelu)
    assert len(found.nodes(F.gelu)) == 1
    for mine, eager in zip(found.outputs(), function(x), strict=True):
        torch.testing.assert_close(mine, eager)


def _written(what: str) -> Form:
    """The formula with one of its values written in place before it is used."""

    def function(x: Tensor) -> Tensor:
        y = x.clone()
        cube = y**3
        if what == "the cube":
            cube.add_(1)
        tanh = torch.tanh(ROOT * (y + 0.044715 * cube))
        if what == "the tanh":
            tanh.mul_(0.5)
        half = 0.5 * y
        if what == "the half":
            F.relu(half, inplace=True)
        if what == "x":
            y.add_(1)
        return half * (1 + tanh) + y

    return function


@pytest.mark.parametrize("what", ["x", "the cube", "the tanh", "the half"])
def test_values_that_the_graph_writes_leave_it_alone(what: str) -> None:
    x = torch.randn(64)
    found = case(_written(what), x).run(fold_gelu)
    assert not found.nodes(F.gelu)
    assert torch.equal(found.outputs()[0], _written(what)(x))


def test_a_tanh_by_keyword_is_none_of_it() -> None:
    x = torch.randn(64)
    found = case(lambda x: torch.tanh(input=x * 2) + 1, x).run(fold_gelu)
    assert torch.equal(found.outputs()[0], torch.tanh(x * 2) + 1)


def test_its_notes_are_those_of_one_operation_on_x() -> None:
    def function(x: Tensor) -> Tensor:
        y: Tensor = ACT2FN["gelu_new"](x.sin())
        return y

    found = case(function, torch.randn(64)).run(fold_gelu)
    (gelu,) = found.nodes(F.gelu)
    (x,) = gelu.all_input_nodes
    assert info(gelu).reads == info(x).storages
    assert info(gelu).traffic_bytes == 2 * 64 * 4
    assert not info(gelu).storages & info(x).storages


def test_the_host_runs_one_operation_between_the_linears_of_a_block() -> None:
    up, down = nn.Linear(64, 256), nn.Linear(256, 64)
    found = scheduled(lambda x: down(ACT2FN["gelu_new"](up(x))), torch.randn(1, 64), paired=0.5)
    between = [
        node.target for node in found.module.graph.nodes
        if node.op == "call_function" and info(node).side == "host" and "gelu" in info(node).aten
    ]  # fmt: skip
    assert between == [F.gelu]
    assert len(found.nodes(HOST_LINEAR)) == 2
