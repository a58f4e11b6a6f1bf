"""Which writes of a captured program are to a cache, and how its tensors share memory, whatever their storages are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from hetegen_compile.ir import info
from hetegen_compile.passes.append_tokens import append_tokens, lies_by_token
from hetegen_compile.passes.written_caches import inputs_laid_out, sharing, writer_of_caches, writes_in_place
from tests.passes.graphs import case

LAID_OUT = append_tokens(torch.tensor([]), torch.randn(1, 2, 5, 8))
CONTIGUOUS = torch.randn(1, 2, 5, 8)


def graph_of(function: Any, *inputs: Tensor) -> fx.Graph:
    return case(function, *inputs).module.graph


def writes_scores(cache: Tensor, other: Tensor) -> Tensor:
    scores = (cache * other).sum(-1)
    scores /= 2
    return scores


def writes_the_other(cache: Tensor, other: Tensor) -> Tensor:
    other.mul_(2)
    return cache + 1


def writes_a_view(cache: Tensor, other: Tensor) -> Tensor:
    cache[:, :, :2].transpose(1, 2).zero_()
    return other + 1


def moves(cache: Tensor, other: Tensor) -> Tensor:
    other.data = torch.zeros_like(other)
    return cache + other


@pytest.mark.parametrize(
    ("function", "other", "found"),
    [
        (writes_scores, CONTIGUOUS, False),
        (writes_the_other, CONTIGUOUS, False),
        (writes_the_other, LAID_OUT.clone(), True),  # one from before the cache may be in the same memory
        (writes_a_view, CONTIGUOUS, True),
        (moves, CONTIGUOUS, True),
    ],
    ids=["scores", "a contiguous input", "one laid out", "a view", "data"],
)
def test_the_first_writer_of_a_cache(function: Any, other: Tensor, found: bool) -> None:
    graph = graph_of(function, LAID_OUT, other)
    (cache,) = (node for node in graph.find_nodes(op="placeholder") if "cache" in node.name)
    assert lies_by_token(info(cache).value)
    assert (writer_of_caches(graph, [cache]) is not None) is found


def test_inputs_that_lie_token_by_token() -> None:
    graph = graph_of(writes_scores, LAID_OUT, CONTIGUOUS)
    assert [node in inputs_laid_out(graph) for node in graph.find_nodes(op="placeholder")] == [True, False]


def test_a_node_that_writes_inside_counts() -> None:
    def inside(cache: Tensor) -> Tensor:
        found: Tensor = torch.vmap(lambda one: one.contiguous().mul_(2))(cache)
        return found

    assert not writes_in_place(graph_of(lambda cache: cache * 2, LAID_OUT))
    assert writes_in_place(graph_of(writes_scores, LAID_OUT, CONTIGUOUS))
    assert writes_in_place(graph_of(inside, LAID_OUT))


def test_sharing_is_the_same_for_the_same_program_and_not_where_a_copy_is_none() -> None:
    def flat(cache: Tensor) -> Tensor:
        return (cache * 2).reshape(-1)[:3].mul_(2)

    assert sharing(graph_of(flat, LAID_OUT)) == sharing(graph_of(flat, LAID_OUT.clone()))
    assert sharing(graph_of(flat, LAID_OUT)) != sharing(graph_of(flat, CONTIGUOUS))
    assert sharing(graph_of(writes_scores, LAID_OUT, CONTIGUOUS)) == sharing(
        graph_of(writes_scores, CONTIGUOUS, LAID_OUT)
    )
