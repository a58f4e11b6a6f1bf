"""torch's attention function as its parts: what they are, and that they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetegen_compile.ir import info
from hetegen_compile.passes.capture import capture
from tests.passes.graphs import dynamo_graph

WIDTH = 16


class Attention(nn.Module):
    """Of the inner kind; ``options`` are those of the call."""

    def __init__(self, kind: dict[str, Any], options: dict[str, Any], apart: bool) -> None:
        super().__init__()
        self.inner, self.options, self.apart = nn.MultiheadAttention(WIDTH, 4, **kind).eval(), options, apart

    def forward(self, x: Tensor) -> Any:
        return self.inner(x, *((x.neg(), x.roll(1)) if self.apart else (x, x)), **self.options)


MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "self": ({"batch_first": True}, {"need_weights": False}, False),
    "cross": ({"batch_first": True}, {"need_weights": False}, True),
    "weights": ({}, {}, True),
    "weights of each head": ({}, {"average_attn_weights": False}, False),
    "mask": ({}, {"attn_mask": MASK, "need_weights": False}, False),
    "causal": ({}, {"attn_mask": MASK, "is_causal": True, "need_weights": False}, True),
    "padding": ({}, {"key_padding_mask": torch.zeros(2, 7, dtype=torch.bool)}, True),
    "bias of keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}, True),
    "other keys": ({"kdim": WIDTH, "vdim": WIDTH, "bias": False}, {}, True),
}


def given(name: str) -> Tensor:
    kind, options, _ = CASES[name]
    if kind.get("batch_first"):
        return torch.randn(2, 7, WIDTH)
    return torch.randn(5 if "attn_mask" in options else 7, 2, WIDTH)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_parts_take_the_place_of_the_function(name: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    model, x = Attention(*CASES[name]), given(name)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0 if CASES[name][0].get("batch_first") else 1)
    module, inputs = dynamo_graph(model, x)
    functions = [node.target for node in module.graph.nodes]
    assert F.multi_head_attention_forward in functions, "Dynamo has another form for it: this pass is for nothing"
    capture(module, inputs)
    assert not any(node.target is F.multi_head_attention_forward for node in module.graph.nodes)
    linears = [n for n in module.graph.nodes if n.target in (F.linear, torch._C._nn.linear)]
    assert len(linears) >= 2
    assert all(info(node).module == "inner" for node in linears)
    with torch.no_grad():
        expected = [one for one in model(x) if one is not None]
        for found, other in zip(module(*inputs), expected, strict=True):
            torch.testing.assert_close(found, other)
