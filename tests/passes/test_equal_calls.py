"""Equal calls are propagated once: the notes on all nodes are those of a propagation of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import info
from hetegen_compile.passes.capture import capture, propagate
from hetegen_compile.passes.equal_calls import EqualCalls
from hetegen_compile.passes.tensors import tensors_in
from tests.models.architectures import prompts, tiny_model
from tests.passes.graphs import dynamo_graph


def told(module: fx.GraphModule) -> list[dict[str, Any]]:
    """All notes, with storages named by the first node that shows them and values by their geometry."""
    names: dict[int, int] = {}
    for node in module.graph.nodes:
        for tensor in tensors_in(info(node).value):
            names.setdefault(storage_id(tensor), len(names))
    return [_told(node, names) for node in module.graph.nodes]


def _told(node: fx.Node, names: dict[int, int]) -> dict[str, Any]:
    notes = dict(vars(info(node)))
    for kind in ("storages", "reads", "writes"):
        notes[kind] = sorted(names.get(key, key) for key in notes[kind])
    leaves = tensors_in(notes.pop("value"))
    geometry = [(t.dtype, *map(str, (*t.shape, *t.stride(), t.storage_offset()))) for t in leaves]
    return {"node": node.name, "geometry": geometry, **notes}


def propagated(module: fx.GraphModule, inputs: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """What a capture tells, and how many results were made after an equal call."""
    again, made = EqualCalls.again, 0

    def counted(self: EqualCalls, key: Any) -> Any:
        nonlocal made
        found = again(self, key)
        made += found is not None
        return found

    with mock.patch.object(EqualCalls, "again", counted):
        mode = capture(module, inputs)
    equal = told(module)
    with mock.patch.object(EqualCalls, "again", return_value=None):
        propagate(module, inputs, mode)
    assert equal == told(module)
    return equal, made


def notes_on(function: Callable[..., Any], *inputs: Any) -> tuple[list[dict[str, Any]], int]:
    """``propagated`` for the one graph of a function."""
    return propagated(*dynamo_graph(function, *inputs))


@pytest.mark.parametrize(
    ("architecture", "dynamic"), [("gemma2", True), ("gpt2", True), ("llama", False), ("llama", True), ("opt", True)]
)
def test_layers_are_noted_as_if_each_was_propagated(architecture: str, dynamic: bool) -> None:
    model, ids = tiny_model(architecture, layers=3), prompts(2)["input_ids"]
    if dynamic:
        torch._dynamo.mark_dynamic(ids, 1)
    found, made = notes_on(lambda ids: model(ids, use_cache=False).logits, ids)
    computed = [notes for notes in found if notes["made_bytes"] != 0]
    assert made > len(computed) / 3, "of three layers two are made after the first"


def test_results_of_equal_calls_are_different_memory() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = x.relu(), x.relu()
        return first.add_(1) + second

    found, made = notes_on(function, torch.randn(3))
    assert made == 1
    first, second = (notes for notes in found if notes["aten"] == ("relu",))
    (written,) = (notes["writes"] for notes in found if notes["aten"] == ("add_",))
    assert written == first["storages"] != second["storages"]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.t(), lambda x: x.contiguous(), lambda x: x.sin_(), lambda x: F.dropout(x, 0.5, training=True),
        lambda x: torch.randn_like(x), lambda x: x[1:], lambda x: torch.chunk(x, 2)[0],
    ],
)  # fmt: skip
def test_what_does_more_than_read_and_make_is_propagated_each_time(call: Callable[[Tensor], Tensor]) -> None:
    assert notes_on(lambda x: (call(x), call(x)), torch.randn(4, 4))[1] == 0


@pytest.mark.parametrize(
    "calls",
    [
        (lambda x: x.sum(0), lambda x: x.sum(1)), (lambda x: x.float(), lambda x: x.double()),
        (lambda x: x * 2, lambda x: x.double() * 2), (lambda x: x + 1, lambda x: x.t() + 1),
        (lambda x: torch.zeros_like(x), lambda x: torch.ones_like(x)), (lambda x: x > 1, lambda x: x > 1.0),
    ],
)  # fmt: skip
def test_calls_that_differ_in_an_operand_are_not_equal(calls: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    assert notes_on(lambda x: tuple(call(x) for call in calls), torch.randn(4, 4))[1] == 0


def test_autocast_makes_another_call_of_it() -> None:
    weight = torch.randn(4, 4)

    def function(x: Tensor) -> Any:
        before = F.linear(x, weight)
        with torch.autocast("cpu", torch.bfloat16):
            inside = F.linear(x, weight), F.linear(x, weight)
        return before, inside, F.linear(x, weight)

    found, made = notes_on(function, torch.randn(2, 4))
    products = [notes["geometry"][0][0] for notes in found if "mm" in notes["aten"]]
    assert products == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    assert made == 2, "the second one inside, and the last one, which is as the first"


def test_a_number_that_is_known_is_not_taken_for_another() -> None:
    def function(x: Tensor) -> Any:
        two, three = torch.tensor(2), torch.tensor(3)
        return x * (two + 1), x * (three + 1), torch.full((2,), 1.0) * x[:2], torch.full((3,), 1.0) * x

    notes_on(function, torch.randn(3))
