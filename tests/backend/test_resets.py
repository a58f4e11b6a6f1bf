"""``torch._dynamo.reset()`` while a compiled model lives on: it is compiled anew, nothing of the old graphs stays."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from hetegen_compile.backend import make_backend
from hetegen_compile.runtime import live_runtimes
from hetegen_compile.steps.segments import plain_compiler
from tests.backend.modules import BUDGET, WIDTH, Mlp, around, random
from tests.backend.test_deleted_models import Watched, breaks_in_a_helper
from tests.models.architectures import prompts, tiny_model
from tests.models.harness import RecordingBackend, compiled_like_eager, emulated, half_the_weights, live_threads

RESETS = 4


def _broken() -> nn.Module:
    """Dynamo keeps graphs of it for ever."""
    return around(breaks_in_a_helper)


def _used(model: nn.Module, backend: RecordingBackend) -> Watched:
    """Called like eager, twice, so that prefetches are carried."""
    x = random(2, WIDTH)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    return Watched(backend)


@pytest.mark.parametrize("make", [Mlp, _broken])
def test_one_model_lives_on_and_another_is_deleted(make: Callable[[], nn.Module]) -> None:
    stays, others, before = make().eval(), [make().eval()], live_threads()
    backend, held, threads = RecordingBackend(), [], []
    for model in (stays, *others):
        model.compile(backend=backend, options=emulated(gpu_memory=BUDGET, seed=None))
        _used(model, backend)
    del model
    for _ in range(RESETS):
        compiled = len(backend.graphs)
        torch._dynamo.reset()
        others.clear()
        gc.collect()
        assert not any(graph.serves_models for graph in backend.graphs), "the old graphs are let go"
        watched = _used(stays, backend)
        assert len(backend.graphs) > compiled
        held.append(watched.held_bytes)
        threads.append(len(live_threads() - before))
    assert watched.counters.uploaded_bytes["weights"] > 0
    assert watched.counters.peak_bytes <= BUDGET
    assert held == [held[0]] * RESETS
    assert threads == [len(watched.threads)] * RESETS
    del stays
    gc.collect()
    assert watched.all_gone
    assert live_threads() == before


def test_a_reset_frees_what_a_backend_inside_a_function_made() -> None:
    backend = make_backend(plain_compiler)
    graphs: list[Any] = []

    def own(module: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        graphs.append(backend(module, inputs, **settings))
        return graphs[-1]

    model, x = _broken().eval(), random(2, WIDTH)
    model.compile(backend=own, options=emulated(gpu_memory=BUDGET, seed=None))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    assert any(graph.serves_models for graph in graphs)
    torch._dynamo.reset()
    assert not any(graph.serves_models for graph in graphs)
    gc.collect()
    assert not live_runtimes()


def test_a_graph_that_a_thread_called_after_a_reset_is_released_by_the_next() -> None:
    model, backend, x = Mlp().eval(), RecordingBackend(), random(2, WIDTH)
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET, seed=None))
    with torch.no_grad():
        model(x)
        torch._dynamo.reset()
        (old,) = backend.graphs
        old(*_arguments_of(model, x))
        assert old.serves_models
        model(x)
        torch._dynamo.reset()
    assert not old.serves_models


def _arguments_of(model: Mlp, x: Tensor) -> list[Tensor]:
    """In the order in which the forward uses them, as Dynamo hands them over."""
    weights = [tensor for layer in model.layers for tensor in (layer.weight, layer.bias)]
    return [*weights[:2], x, *weights[2:]]  # type: ignore[list-item]


def _dynamic(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def _static(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=20)


@pytest.mark.parametrize("make", [_dynamic, _static])
def test_a_conversation_over_a_reset(make: Callable[[PreTrainedModel], Cache]) -> None:
    model, tokens = tiny_model("llama", layers=1), prompts(1)["input_ids"]

    def run() -> list[Tensor]:
        cache = make(model)
        first = _answer(model, tokens, cache)
        torch._dynamo.reset()
        return [first, _answer(model, torch.cat([first, tokens[:, :2]], 1), cache)]

    compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model) * 13 // 10))


def _answer(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    found: Tensor = model.generate(  # type: ignore[operator]
        tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache
    )
    return found
