"""Names are those that the user's modules have, whatever the traced function calls its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hetegen_compile.graph_inputs import model_weights
from hetegen_compile.ir import info
from hetegen_compile.passes.capture import capture
from hetegen_compile.passes.lift_parts import lift_parts
from hetegen_compile.passes.sources import source_name
from tests.passes.graphs import case, dynamo_graph


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.scale = nn.Parameter(torch.ones(4))

    def forward(me, x: Tensor) -> Tensor:  # noqa: N805
        for layer in me.layers:
            x = layer(x) * me.scale
        return x

    def gated(this, gate: nn.Module, x: Tensor) -> Any:  # noqa: N805
        return this.layers[0](x) * gate(x)


class Packed(nn.Module):
    """A lookup that is written, and a Linear whose weight is part of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.packed = nn.Parameter(torch.randn(8, 4))

    def forward(me, ids: Tensor) -> Tensor:  # noqa: N805
        x: Tensor = me.table(ids)
        x.mul_(2.0)
        return F.linear(torch.relu(x), me.packed[4:])


def names(function: Callable[..., Any], *inputs: Any) -> tuple[set[str], set[str]]:
    """(what parameters are called, which modules Linears come from)."""
    nodes = case(function, *inputs).module.graph.nodes
    found = {source_name(node) for node in nodes if node.op == "placeholder"}
    return found - {"x"}, {info(node).module for node in nodes if "addmm" in info(node).aten}


X = torch.randn(2, 4)
FIRST = {"layers.0.weight", "layers.0.bias"}


def test_a_method_calls_its_module_as_it_likes() -> None:
    assert names(Model(), X) == (set(dict(Model().named_parameters())), {"layers.0", "layers.1"})
    found = names(Model().gated, nn.Linear(4, 4), X)
    assert found == ({*FIRST, "gate.weight", "gate.bias"}, {"layers.0", "gate"})


def test_modules_that_a_function_calls_keep_their_names() -> None:
    net = Model()

    def enclosed(x: Tensor) -> Any:
        return net.layers[0](x)

    def given(net: nn.Module, x: Tensor) -> Any:
        return net(x)

    assert names(enclosed, X) == ({f"net.{name}" for name in FIRST}, {"net.layers.0"})
    parameters = {f"net.{name}" for name, _ in net.named_parameters()}
    assert names(given, net, X) == (parameters, {"net.layers.0", "net.layers.1"})


def test_copies_and_parts_have_the_names_of_what_they_are_made_of() -> None:
    module, inputs = dynamo_graph(Packed(), torch.tensor([3, 5, 8]))
    mode = capture(module, inputs)
    (copy,) = module.graph.find_nodes(op="call_function", target=torch.clone)
    assert info(copy).module == "table"
    lifted, (_,) = lift_parts(module, inputs, model_weights(module, inputs), mode)
    assert source_name(lifted.graph.find_nodes(op="placeholder")[-1]) == "packed"
