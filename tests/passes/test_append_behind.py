"""Segments that are given their new caches compute what they did, and Inductor's code copies none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import profile

from hetegen_compile.ir import info
from hetegen_compile.passes.append_behind import Appended, append_behind, appends
from hetegen_compile.passes.append_tokens import COPIED
from hetegen_compile.steps.segments import inductor_compiler
from tests.models.harness import through_inductor
from tests.passes.graphs import case

HEADS, WIDTH = 2, 16


def lengthening(past: Tensor, new: Tensor, query: Tensor) -> tuple[Tensor, ...]:
    keys = torch.cat([past, new], -2)
    return scaled_dot_product_attention(query, keys, keys), keys


def two(past: Tensor, new: Tensor, query: Tensor) -> tuple[Tensor, ...]:
    keys, prompt = torch.cat([past, new], -2), torch.cat([query.new_empty(0), query], -2)
    return query + 1, prompt, keys, keys.sum() + prompt.sum()


def by_token(tokens: int) -> Tensor:
    """A random cache, laid out token by token."""
    return torch.randn(tokens, 1, HEADS, WIDTH).permute(1, 2, 0, 3)


def captured(function: Callable[..., Any], past: Tensor, new: Tensor, query: Tensor) -> fx.GraphModule:
    """An annotated graph, as a segment has it, in which the tokens of what has several vary."""
    for tensor in (past, new):
        if tensor.dim() == 4 and past.dim() == 4 and tensor.shape[2] > 1:
            torch._dynamo.mark_dynamic(tensor, 2)
    return case(function, past, new, query).module


def inputs_of(segment: fx.GraphModule, *tensors: Tensor) -> list[Any]:
    """Real inputs in the graph's order: those tensors, and the sizes by what they are in them."""
    fakes = [info(node).value for node in segment.graph.find_nodes(op="placeholder")]
    given, left = [], list(tensors)
    sizes: dict[str, int] = {}
    for fake in fakes:
        given.append(left.pop(0) if isinstance(fake, Tensor) else fake)
        if isinstance(fake, Tensor):
            sizes |= {str(n): m for n, m in zip(fake.shape, given[-1].shape, strict=True)}
    return [one if isinstance(one, Tensor) else sizes[str(one)] for one in given]


def with_caches(appended: tuple[Appended, ...], given: list[Any], tokens: int = 1) -> tuple[list[Any], list[Tensor]]:
    """The inputs with caches that are longer by so many tokens, NaN where a segment has to write, and those."""
    inputs, caches = list(given), []
    for one in appended:
        if one.tokens is None:
            longer = by_token(int(one.value.shape[2]))
            before = 0
            inputs.append(longer)
        else:
            before = given[one.given].shape[2]
            longer = by_token(before + tokens)
            longer[:, :, :before] = given[one.given]
            inputs[one.given] = longer
        longer[:, :, before:] = torch.nan
        caches.append(longer)
    return inputs, caches


CASES = {
    "attention": (lengthening, 5, 1),
    "several tokens": (lengthening, 5, 3),
    "one that is made of nothing, too": (two, 4, 1),
}


@through_inductor
@pytest.mark.parametrize("inductor", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_a_copy(name: str, inductor: bool) -> None:
    function, before, tokens = CASES[name]
    new, query = by_token(tokens), by_token(1)
    segment = captured(function, by_token(before), new, query)
    count = sum(map(appends, segment.graph.nodes))
    changed, appended = append_behind(segment)
    assert len(appended) == count == (2 if function is two else 1)
    assert not any(map(appends, changed.graph.nodes))
    assert sum(map(appends, segment.graph.nodes)) == count, "the segment is as it was"
    call: Callable[..., Any] = changed.forward
    if inductor:
        examples = [info(node).value for node in changed.graph.find_nodes(op="placeholder")]
        call = inductor_compiler(appended[0].value.fake_mode)(changed, examples)  # type: ignore[attr-defined]
    for longer in (0, 2, 3):
        past = by_token(before + longer)
        inputs, caches = with_caches(appended, inputs_of(segment, past, new, query), tokens)
        with torch.no_grad():
            found = list(call(*inputs))
        for one, cache in zip(appended, caches, strict=True):
            found.insert(one.result, cache)
        torch.testing.assert_close(found, list(function(past, new, query)), rtol=1e-5, atol=1e-6)


@through_inductor
def test_inductors_code_copies_no_cache() -> None:
    """It makes attention's result and little else."""
    past, new, query = by_token(4096), by_token(1), by_token(1)
    segment = captured(lengthening, past, new, query)
    changed, appended = append_behind(segment)
    made = {}
    for name, one in (("copied", segment), ("behind", changed)):
        examples = [info(node).value for node in one.graph.find_nodes(op="placeholder")]
        compiled = inductor_compiler(appended[0].value.fake_mode)(one, examples)  # type: ignore[attr-defined]
        given = inputs_of(segment, past, new, query)
        inputs = with_caches(appended, given)[0] if one is changed else given
        with torch.no_grad(), profile(profile_memory=True, acc_events=True) as found:
            compiled(*inputs)
        events = found.profiler.kineto_results.events()
        made[name] = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert made["copied"] >= past.nbytes > 4 * made["behind"]


def test_what_makes_no_cache_is_left_alone() -> None:
    segment = captured(lambda past, new, query: (past + 1, new), by_token(3), by_token(1), by_token(1))
    assert append_behind(segment) == (segment, ())


def test_a_cache_that_somebody_else_reads_is_copied_and_it_is_told() -> None:
    """Behind it there is room for one longer one, and Inductor may read the shorter one behind the write."""

    def both(past: Tensor, new: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([past, new], -2), torch.cat([past, query], -2)

    def summed(past: Tensor, new: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        before, keys = past.sum(), torch.cat([past, new], -2)
        return keys, scaled_dot_product_attention(query, keys, keys) + before

    def asked(past: Tensor, new: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([past, new], -2), query * past.shape[2] + past.numel()

    def put_elsewhere(past: Tensor, new: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat([past, new], -2)
        other = torch.zeros_like(keys)
        other[:, :, : past.shape[2]] = past
        return keys, other + query

    for function, copied in ((both, 2), (summed, 1), (put_elsewhere, 1), (asked, 0)):
        segment = captured(function, by_token(3), by_token(1), by_token(1))
        assert sum(COPIED in node.meta for node in segment.graph.nodes) == copied
        assert sum(map(appends, segment.graph.nodes)) == (copied == 0)
