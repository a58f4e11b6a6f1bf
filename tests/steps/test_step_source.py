"""Arguments of nodes as Python text: what is evaluated again is what was given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx

from hetegen_compile.steps.step_source import StepSource

SIGNATURE = (("x0",), (), ())
"""Inputs, mirrors and residents of the functions made here."""


def _evaluated(argument: Any) -> Any:
    graph, source = fx.Graph(), StepSource({})
    node = graph.placeholder("x")
    source.add(f"{node.name} = inputs[0]")
    source.add("")
    source.add(f"return {source.text(fx.map_arg(argument, lambda _: node))}, twins")
    function, text = source.function()
    assert text.count("\n") == 4, "an empty line is none"
    value, twins = function(*SIGNATURE)
    assert twins == []
    return value


@pytest.mark.parametrize(
    "argument",
    [
        None, True, -3, "a'b\n", (), (1,), [], [(1, 2), None], {"dim": -1, "keepdim": [True]}, slice(None, 2, None),
        1e300, -math.inf, torch.float16, torch.device("cpu"), Ellipsis, 2 + 3j,
    ],
    ids=repr,
)  # fmt: skip
def test_literals_and_constants(argument: Any) -> None:
    found = _evaluated(argument)
    assert found == argument
    assert type(found) is type(argument)


def test_values_are_the_names_of_their_nodes() -> None:
    node = fx.Graph().placeholder("y")
    assert _evaluated([node, {"k": (node,)}, slice(node, None)]) == ["x0", {"k": ("x0",)}, slice("x0", None)]


def test_a_constant_is_the_very_object() -> None:
    assert _evaluated(torch.ops.aten.add.Tensor) is torch.ops.aten.add.Tensor


def test_names_of_constants_do_not_repeat() -> None:
    source = StepSource({"launch": max})
    names = [source.constant("op", number) for number in range(3)]
    assert len(set(names)) == 3
    source.add(f"return launch({', '.join(names)})")
    function, _ = source.function()
    assert function(*SIGNATURE) == 2
