"""Symbolic FLOPs of captured graphs against torch's own counter, exactly."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hetegen_compile.dry_run.fakes import Fakes
from hetegen_compile.dry_run.trace import TracedGraph, trace
from hetegen_compile.ir import info
from hetegen_compile.passes.expressions import evaluate
from tests.dry_run.configs import MODELS, make

BATCH = 1
LENGTHS = (7, 16, 33)
COUNTED = ("mm", "addmm", "bmm", "baddbmm")
"""Operations in these models that FlopCounterMode counts on the CPU."""


@cache
def captured(name: str, tokens: int, *, dynamic: bool) -> TracedGraph:
    fakes = Fakes()
    ids = torch.empty(BATCH, tokens, dtype=torch.long, device="meta")
    if dynamic:
        torch._dynamo.mark_dynamic(ids, 1)
    (graph,) = trace(fakes.copy(make(name, "meta")), fakes, (), {"input_ids": fakes.copy(ids)}).graphs
    return graph


def flops_by_operation(graph: TracedGraph, tokens: int) -> Counter[str]:
    """FLOPs of the graph at a length; each node of these graphs runs one operation that counts."""
    sizes = dict.fromkeys(graph.sizes, sympy.Integer(tokens))
    found: Counter[str] = Counter()
    for node in graph.module.graph.nodes:
        if flops := evaluate(info(node).flops, sizes):
            found[_operation(node)] += int(flops)
    return found


def _operation(node: fx.Node) -> str:
    for name in info(node).aten:
        if name in COUNTED:
            return name
        if name.startswith("_scaled_dot_product"):
            return "attention"
        if "grouped_mm" in name:
            return "grouped"
    raise AssertionError(f"{node} has FLOPs but runs {info(node).aten}")


def counted(name: str, tokens: int) -> dict[str, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        make(name, "cpu")(input_ids=torch.zeros(BATCH, tokens, dtype=torch.long))
    return {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_flops_are_the_counters_at_every_length(name: str) -> None:
    graph = captured(name, 16, dynamic=True)
    assert len(graph.sizes) == 1
    for tokens in LENGTHS:
        expected = counted(name, tokens)
        assert set(expected) <= set(COUNTED)
        ours = flops_by_operation(graph, tokens)
        assert {op: n for op, n in ours.items() if op in COUNTED} == expected


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_static_flops_are_the_symbolic_ones(name: str) -> None:
    tokens = 9
    static = captured(name, tokens, dynamic=False)
    assert static.sizes == {}
    assert flops_by_operation(static, tokens) == flops_by_operation(captured(name, 16, dynamic=True), tokens)


@pytest.mark.parametrize("name", MODELS)
def test_attention_counts_by_the_registrys_formula(name: str) -> None:
    config: Any = MODELS[name][1]
    heads, layers, width = config.num_attention_heads, config.num_hidden_layers, config.hidden_size
    graph = captured(name, 16, dynamic=True)
    for tokens in LENGTHS:
        shape = (BATCH, heads, tokens, width // heads)
        assert flops_by_operation(graph, tokens)["attention"] == layers * sdpa_flop_count(shape, shape, shape)


def test_experts_count_once_for_each_token_that_goes_to_them() -> None:
    config: Any = MODELS["mixtral"][1]
    graph = captured("mixtral", 16, dynamic=True)
    for tokens in LENGTHS:
        rows = BATCH * tokens * config.num_experts_per_tok
        each = 3 * 2 * config.hidden_size * config.intermediate_size  # gate, up and down
        assert flops_by_operation(graph, tokens)["grouped"] == config.num_hidden_layers * rows * each


def test_a_step_reads_no_more_experts_than_it_has_rows_for() -> None:
    config: Any = MODELS["mixtral"][1]
    graph = captured("mixtral", 16, dynamic=True)
    grouped = [node for node in graph.module.graph.nodes if any("grouped_mm" in op for op in info(node).aten)]
    assert len(grouped) == 2 * config.num_hidden_layers
    for node in grouped:
        rows, matrices = (info(operand).value for operand in node.all_input_nodes[:2])
        row_bytes = 4 * (rows.shape[1] + matrices.shape[2])  # in and out
        one_expert = 4 * matrices.shape[1] * matrices.shape[2]
        for tokens in (1, 16):
            sizes = dict.fromkeys(graph.sizes, sympy.Integer(tokens))
            used = BATCH * tokens * config.num_experts_per_tok
            expected = used * row_bytes + min(used, config.num_local_experts) * one_expert
            assert evaluate(info(node).traffic_bytes, sizes) == expected
