"""Every form of Linear with a stored weight becomes ``hetegen.linear``; what cannot says why."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.normalise_linears import normalise_linears
from tests.passes.graphs import Case, case, scheduled

Form = Callable[[Tensor], Tensor]

OUT, IN = 16, 8
W = nn.Parameter(torch.randn(OUT, IN))  # stored [out, in]
V = nn.Parameter(torch.randn(IN, OUT))  # stored [in, out]
B = nn.Parameter(torch.randn(OUT))
WITH_BIAS, WITHOUT_BIAS = nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False)
CONV1D = Conv1D(OUT, IN)

STORED_OUT_IN: dict[str, Form] = {
    "F.linear": lambda x: F.linear(x, W),
    "F.linear by keyword": lambda x: F.linear(x, weight=W, bias=None),
    "matmul t()": lambda x: torch.matmul(x, W.t()),
    "@ T": lambda x: x @ W.T,
    "operator.matmul": lambda x: operator.matmul(x, W.T),
    "@ mT": lambda x: x @ W.mT,
    "@ transpose": lambda x: x @ W.transpose(0, 1),
    "@ transpose of negative dimensions": lambda x: x @ W.transpose(-1, -2),
    "@ permute": lambda x: x @ W.permute(1, 0),
    "@ torch.permute": lambda x: x @ torch.permute(W, (1, 0)),
    "@ swapaxes": lambda x: x @ W.swapaxes(0, 1),
    "mm": lambda x: torch.mm(x, W.t()),
    "method mm": lambda x: x.mm(W.t()),
    "method matmul": lambda x: x.matmul(W.t()),
    "transposed three times": lambda x: x @ W.t().T.mT,
}
STORED_IN_OUT: dict[str, Form] = {
    "@": lambda x: x @ V,
    "matmul": lambda x: torch.matmul(x, V),
    "mm": lambda x: torch.mm(x, V),
    "transposed twice": lambda x: x @ V.t().t(),
    "F.linear with a transpose": lambda x: F.linear(x, V.t()),
}


def by_name(forms: dict[str, Form]) -> list[object]:
    return [pytest.param(form, id=name) for name, form in forms.items()]


@pytest.mark.parametrize("form", by_name(STORED_OUT_IN))
def test_a_weight_stored_out_in(form: Form) -> None:
    found = case(form, torch.randn(3, IN)).run(normalise_linears)
    assert found.text == "t1 = hetegen.linear(x, W, None, 0)\nreturn (t1,)"
    torch.testing.assert_close(found.outputs()[0], form(found_input(found)))


@pytest.mark.parametrize("form", by_name(STORED_IN_OUT))
def test_a_weight_stored_in_out(form: Form) -> None:
    found = case(form, torch.randn(3, IN)).run(normalise_linears)
    assert found.text == "t1 = hetegen.linear(x, V, None, 1)\nreturn (t1,)"
    torch.testing.assert_close(found.outputs()[0], form(found_input(found)))


def found_input(found: Case) -> Any:
    """The one input of the call."""
    (x,) = [value for value in found.inputs if not isinstance(value, nn.Parameter)]
    return x


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (lambda x: F.linear(x, W, B), "t1 = hetegen.linear(x, W, B, 0)"),
        (lambda x: WITH_BIAS(x), "t1 = hetegen.linear(x, WITH_BIAS.weight, WITH_BIAS.bias, 0)"),
        (lambda x: WITHOUT_BIAS(x), "t1 = hetegen.linear(x, WITHOUT_BIAS.weight, None, 0)"),
        (lambda x: torch.addmm(B, x, V), "t1 = hetegen.linear(x, V, B, 1)"),
        (lambda x: torch.addmm(B, x, V, alpha=1, beta=1), "t1 = hetegen.linear(x, V, B, 1)"),
        (lambda x: torch.addmm(B, x, W.t()), "t1 = hetegen.linear(x, W, B, 0)"),
        (lambda x: B.addmm(x, V), "t1 = hetegen.linear(x, V, B, 1)"),
    ],
)
def test_the_bias_belongs_to_the_linear(form: Form, expected: str) -> None:
    found = case(form, torch.randn(3, IN)).run(normalise_linears)
    assert found.text == f"{expected}\nreturn (t1,)"
    torch.testing.assert_close(found.outputs()[0], form(found_input(found)))


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN)])
@pytest.mark.parametrize("form", [WITH_BIAS, WITHOUT_BIAS, lambda x: x @ V, lambda x: x @ W.t()])
def test_inputs_of_any_number_of_dimensions(form: Form, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = case(form, x).run(normalise_linears)
    assert len(found.nodes(LINEAR)) == 1
    torch.testing.assert_close(found.outputs()[0], form(x))


@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN)])
def test_conv1d_of_transformers(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = case(CONV1D, x).run(normalise_linears)
    (linear,) = found.nodes(LINEAR)
    assert linear.args[3] == 1
    assert "addmm" not in found.text
    torch.testing.assert_close(found.outputs()[0], CONV1D(x))


class Tied(nn.Module):
    """One parameter as the embedding's table and as the weight of two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(OUT, IN)
        self.head = nn.Linear(IN, OUT, bias=False)
        self.other = nn.Linear(IN, OUT)
        self.head.weight = self.other.weight = self.table.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids)
        return self.head(x) + self.other(x)


def test_tied_weights_are_one_placeholder() -> None:
    model, ids = Tied(), torch.tensor([3, 5])
    found = case(model, ids).run(normalise_linears)
    assert found.text == """\
t1 = embedding(ids, table.weight, None, None, 2.0, False, False)
t2 = hetegen.linear(t1, table.weight, None, 0)
t3 = hetegen.linear(t1, table.weight, other.bias, 0)
t4 = add(t2, t3)
return (t4,)"""  # fmt: skip
    torch.testing.assert_close(found.outputs()[0], model(ids))
    split = scheduled(model, ids)
    assert "host_linear" in split.text
    torch.testing.assert_close(split.outputs()[0], model(ids))


def test_the_notes_of_the_node_that_was_there_stay() -> None:
    found = case(lambda x: WITH_BIAS(x), torch.randn(3, IN))
    (before,) = [node for node in found.module.graph.nodes if "addmm" in info(node).aten]
    notes = info(before)
    found.run(normalise_linears)
    (linear,) = found.nodes(LINEAR)
    assert info(linear).position == notes.position
    assert info(linear).flops == notes.flops == 2 * 3 * IN * OUT
    assert info(linear).module == "WITH_BIAS"


# ---- what is left alone -----------------------------------------------------------------------------------

STRIDED = nn.Parameter(torch.randn(IN, OUT).t())
GAPPED = nn.Parameter(torch.randn(OUT, 2 * IN)[:, :IN])
CUBE = nn.Parameter(torch.randn(3, IN, OUT))
INTEGER = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int64), requires_grad=False)
EMPTY = nn.Parameter(torch.empty(0, IN))
WIDE_BIAS = nn.Parameter(torch.randn(1, OUT))


def with_written_weight(x: Tensor) -> Tensor:
    W.add_(1)
    return F.linear(x, W)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda x: F.linear(x, STRIDED), r"STRIDED is not contiguous \(strides \(1, 16\)\)"),
        (lambda x: F.linear(x, GAPPED), r"GAPPED is not contiguous \(strides \(16, 1\)\)"),
        (lambda x: F.linear(x, EMPTY), "EMPTY is empty"),
        (lambda x: x @ CUBE, "CUBE has 3 dimensions; a Linear's weight has two"),
        (lambda x: F.linear(x.long(), INTEGER), r"INTEGER is torch\.int64"),
        (with_written_weight, "W is written by the graph itself"),
        (lambda x: F.linear(x, W, B * 2), "its bias is computed, not stored"),
        (lambda x: torch.addmm(B * 2, x, V), "its bias is computed, not stored"),
        (lambda x: torch.addmm(WIDE_BIAS, x, V), r"its bias has shape \(1, 16\)"),
    ],
)
def test_what_cannot_be_split_stays_and_says_why(form: Form, reason: str) -> None:
    found = case(form, torch.randn(3, IN)).run(normalise_linears)
    assert found.nodes(LINEAR) == []
    assert len(found.refusals) == 1
    assert re.fullmatch(reason, found.reasons()[0]), found.reasons()


def test_an_input_of_another_dtype_stays() -> None:
    found = case(lambda x: F.linear(x, W), torch.randn(3, IN))
    (linear,) = [node for node in found.module.graph.nodes if "mm" in info(node).aten]
    x = linear.args[0]
    assert not isinstance(x, Tensor)
    x.meta["hetegen"] = type(info(x))(value=info(x).value.half())
    found.run(normalise_linears)
    assert found.reasons() == ["its input is torch.float16 and W is torch.float32"]


def test_an_input_of_the_call_is_not_a_weight() -> None:
    found = case(lambda x, w: F.linear(x, w), torch.randn(3, IN), torch.randn(OUT, IN)).run(normalise_linears)
    assert found.nodes(LINEAR) == []
    assert found.reasons() == ["w is not a parameter or buffer of the model"]


def test_a_product_of_two_activations_is_no_linear_at_all() -> None:
    found = case(lambda x: (x + 1) @ (x + 2).t(), torch.randn(3, IN)).run(normalise_linears)
    assert found.nodes(LINEAR) == []
    assert found.reasons() == []


def test_a_weight_on_the_left_is_no_linear() -> None:
    found = case(lambda x: W @ x.t(), torch.randn(3, IN)).run(normalise_linears)
    assert found.nodes(LINEAR) == []


LEFT_ALONE: dict[str, Form] = {
    "alpha": lambda x: torch.addmm(B, x, V, alpha=2),
    "beta": lambda x: torch.addmm(B, x, V, beta=0.5),
    "slice of rows": lambda x: F.linear(x, W[:8]),
    "view of another shape": lambda x: x @ W.view(IN, OUT),
    "flattened and back": lambda x: F.linear(x, W.flatten().view(OUT, IN)),
    "computed": lambda x: F.linear(x, W * 2),
}


@pytest.mark.parametrize("form", by_name(LEFT_ALONE))
def test_a_weight_that_is_not_the_whole_parameter_stays(form: Form) -> None:
    found = case(form, torch.randn(3, IN)).run(normalise_linears)
    assert found.nodes(LINEAR) == []
    torch.testing.assert_close(found.outputs()[0], form(found_input(found)))


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_weight_that_is_not_the_whole_parameter_says_why(name: str) -> None:
    found = case(LEFT_ALONE[name], torch.randn(3, IN)).run(normalise_linears)
    scaled = "its alpha or beta is not 1"
    computed = r"its weight is computed from parameters \(\w+\), not a whole parameter"
    assert len(found.reasons()) == 1
    assert re.fullmatch(scaled if name in ("alpha", "beta") else computed, found.reasons()[0]), found.reasons()


def test_a_scaled_product_of_two_activations_is_no_linear_at_all() -> None:
    found = case(lambda x: torch.addmm(B[:3], x, (x + W[0]).t(), alpha=2), torch.randn(3, IN)).run(normalise_linears)
    assert found.nodes(LINEAR) == []
    assert found.reasons() == []


def test_a_bias_that_the_graph_writes_stays() -> None:
    def function(x: Tensor) -> Tensor:
        B.add_(1)
        return F.linear(x, W, B)

    found = case(function, torch.randn(3, IN)).run(normalise_linears)
    assert found.nodes(LINEAR) == []
    assert found.reasons() == ["B is written by the graph itself"]


def test_a_product_with_a_cache_is_no_linear_and_needs_no_reason() -> None:
    found = case(lambda x, cache: x @ cache, torch.randn(3, IN), torch.randn(IN, OUT)).run(normalise_linears)
    assert found.nodes(LINEAR) == []
    assert found.refusals == []


ENCODER = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()


@pytest.mark.parametrize("fused", [True, False])
def test_torchs_fused_encoder_layer_says_how_to_have_its_linears_apart(fused: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        found = case(lambda x: ENCODER(x), torch.randn(2, 3, 8)).run(normalise_linears)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    told = [refusal for refusal in found.refusals if "set_fastpath_enabled(False)" in refusal.reason]
    assert bool(told) == fused
    assert bool(found.nodes(LINEAR)) != fused
