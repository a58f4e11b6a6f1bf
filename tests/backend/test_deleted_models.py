"""A model that is deleted takes what it had on the accelerator with it, though Dynamo keeps its compiled graphs.

Nothing here resets Dynamo between models. Dynamo keeps the graphs of functions that it inlined up to a graph break.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.accelerators.counters import Counters
from tests.backend.modules import BUDGET, WIDTH, Linear, Mlp, around, plain, random
from tests.models.architectures import prompts, tiny_model
from tests.models.harness import RecordingBackend, emulated, half_the_weights, live_threads

REPEATS = 20
OTHER_REPEATS = 2


def broken(x: Tensor) -> Tensor:
    """``x``, behind a graph break."""
    return x if x.sum().item() < 1e9 else -x


def breaks_in_a_helper(before: Linear, after: Linear, x: Tensor) -> Tensor:
    """The break is in a function that Dynamo inlined; what follows it in this one is compiled by itself, too."""
    return after(broken(before(x))) + 1


class BreaksInForward(nn.Module):
    """The break is in the model's own code, between two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return x if y.sum().item() > 1e9 else torch.relu(self.second(y))


class BreaksInASubmodule(nn.Module):
    """The break is in the forward of a submodule, with Linears before and after in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.middle, self.after = nn.Linear(WIDTH, WIDTH), BreaksInForward(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.middle(self.before(x)))
        return result.sigmoid()


class CompiledInside(nn.Module):
    """Only a submodule will be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(WIDTH, WIDTH), BreaksInASubmodule()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(self.outer(x))
        return result


def _breaks_in_a_helper() -> nn.Module:
    return around(breaks_in_a_helper)


MODELS: list[tuple[Callable[[], nn.Module], int]] = [
    (Mlp, OTHER_REPEATS),
    (BreaksInForward, OTHER_REPEATS),
    (_breaks_in_a_helper, REPEATS),
    (BreaksInASubmodule, OTHER_REPEATS),
    (CompiledInside, OTHER_REPEATS),
]
"""The first has no break: its steps start prefetches for the next one, which does not come."""


class Watched:
    """What a backend's accelerator holds, without keeping the accelerator."""

    def __init__(self, backend: RecordingBackend) -> None:
        accelerator = backend.accelerator
        assert isinstance(accelerator, EmulatedAccelerator)
        self.counters: Counters = accelerator.counters
        self._pins = accelerator._pins
        self.threads = [stream.thread for stream in accelerator._engine._streams.values()]

    @property
    def held_bytes(self) -> int:
        """On the accelerator, and pinned for it."""
        return sum(self.counters.held_bytes.values()) + self._pins.pinned_bytes

    @property
    def all_gone(self) -> bool:
        """Whether nothing is held and no thread is left."""
        return self.held_bytes == 0 and not any(thread.is_alive() for thread in self.threads)


def _compile(model: nn.Module, backend: RecordingBackend, budget: int = BUDGET) -> None:
    compiled = model.inner if isinstance(model, CompiledInside) else model
    compiled.compile(backend=backend, options=emulated(gpu_memory=budget, seed=None))


def _used(model: nn.Module, backend: RecordingBackend) -> Watched:
    """Compiled, called like eager often enough that prefetches are carried, and something of it offloaded."""
    x = random(2, WIDTH)
    with torch.no_grad():
        expected = model(x)
        _compile(model, backend)
        for _ in range(3):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    watched = Watched(backend)
    assert watched.held_bytes > 0
    assert watched.counters.uploaded_bytes["weights"] > 0
    return watched


@pytest.mark.parametrize(("make", "repeats"), MODELS)
def test_nothing_is_left_of_a_deleted_model(make: Callable[[], nn.Module], repeats: int) -> None:
    """Again and again through one backend: Dynamo may give a model the graphs of the one before."""
    backend, before = RecordingBackend(), live_threads()
    for _ in range(repeats):
        model = make().eval()
        watched = _used(model, backend)
        del model
        gc.collect()
        assert watched.all_gone
        assert live_threads() == before
    assert len(backend.graphs) > (0 if make is Mlp else 1)


def test_nothing_is_left_of_models_with_backends_of_their_own() -> None:
    kept = []
    for _ in range(OTHER_REPEATS):
        model, backend = _breaks_in_a_helper().eval(), RecordingBackend()
        watched = _used(model, backend)
        kept += [weakref.ref(graph) for graph in backend.graphs]
        del model, backend
        gc.collect()
        assert watched.all_gone
    assert any(graph() is not None for graph in kept), "Dynamo lets go of them now: this test asks for nothing any more"


def test_a_model_that_is_compiled_again_and_again() -> None:
    """It lives on and Dynamo keeps all of its graphs: they share what they have."""
    model, held, before = _breaks_in_a_helper().eval(), [], live_threads()
    for _ in range(1 + OTHER_REPEATS):
        model._compiled_call_impl = None
        watched = _used(model, RecordingBackend())
        gc.collect()
        held.append(watched.held_bytes)
        assert watched.counters.peak_bytes <= BUDGET
        assert len(live_threads() - before) == len(watched.threads)
    assert max(held) == held[0]
    del model
    gc.collect()
    assert watched.all_gone


class _BreakingMlp(nn.Module):
    """In the place of a transformers model's MLP."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(broken(x))
        return result


def _generated(model: PreTrainedModel) -> Tensor:
    found: Tensor = model.generate(  # type: ignore[operator]
        **prompts(2), max_new_tokens=1, do_sample=False
    )
    return found


def test_nothing_is_left_of_a_model_that_generated() -> None:
    """A break in a layer of a transformers model: its decoder's forward cannot be captured past it."""
    model, backend, before = tiny_model("llama", layers=1), RecordingBackend(), live_threads()
    (layer,) = model.model.layers
    layer.mlp = _BreakingMlp(layer.mlp)
    expected = _generated(model)
    model.compile(backend=backend, options=emulated(gpu_memory=half_the_weights(model) * 13 // 10, seed=None))
    assert torch.equal(_generated(model), expected)
    assert len(backend.graphs) > 1
    watched = Watched(backend)
    assert watched.counters.uploaded_bytes["weights"] > 0
    del model, layer
    gc.collect()
    assert watched.all_gone
    assert live_threads() == before


def _resident_bytes(backend: RecordingBackend) -> int:
    return sum(plan.schedule.resident_bytes for graph in backend.graphs for plan in graph.plans)


def test_who_goes_on_gets_the_memory_of_who_is_gone() -> None:
    """Two models under one limit; one goes: what it held is free at once, and the other's next step takes it."""
    first, second, x = around(breaks_in_a_helper), around(plain), random(2, WIDTH)
    gone, stays = RecordingBackend(), RecordingBackend()
    _compile(first, gone, budget=36 << 10)
    _compile(second, stays, budget=36 << 10)
    with torch.no_grad():
        expected = second.forward(x)
        for _ in range(3):
            first(x)
            torch.testing.assert_close(second(x), expected, rtol=1e-4, atol=1e-5)
        accelerator, shared = stays.accelerator, _resident_bytes(stays)
        assert gone.accelerator is accelerator
        weights = accelerator.counters.held_bytes["weights"]
        assert 0 < _resident_bytes(gone) < weights
        del first
        gc.collect()
        assert accelerator.counters.held_bytes["weights"] < weights
        assert not any(graph.serves_models for graph in gone.graphs)
        torch.testing.assert_close(second(x), expected, rtol=1e-4, atol=1e-5)
    assert shared < _resident_bytes(stays) <= accelerator.counters.held_bytes["weights"]
    assert accelerator.counters.peak_bytes <= 36 << 10


@pytest.mark.parametrize("in_another_thread", [False, True])
def test_a_model_that_goes_during_somebodys_step_is_forgotten_after_it(in_another_thread: bool) -> None:
    """A finalizer may run while this thread or another one uses the accelerator: it changes nothing then."""
    models, backend = [around(breaks_in_a_helper)], RecordingBackend()
    watched = _used(models[0], backend)
    runtime = backend.graphs[0].runtime
    held = watched.held_bytes

    def go() -> None:
        models.clear()
        gc.collect()

    def step() -> None:
        if in_another_thread:
            thread = threading.Thread(target=go)
            thread.start()
            thread.join()
        else:
            go()
        assert backend.graphs[0].serves_models
        assert sum(watched.counters.held_bytes.values()) > 0

    assert held > 0
    runtime.lives.exclusively(step)
    assert not any(graph.serves_models for graph in backend.graphs)
    assert watched.all_gone


class EndsWithoutWeights(nn.Module):
    """What follows the graph break reads no weights: nothing of it dies with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return broken(self.first(x)) * 2


def test_a_deleted_model_of_which_one_graph_has_no_weights_limits_nobody() -> None:
    backend, x = RecordingBackend(), random(2, WIDTH)
    small, large = EndsWithoutWeights().eval(), Mlp(2, 4 * WIDTH).eval()
    budget = WIDTH * WIDTH * 4 + (32 << 10)
    small.compile(backend=backend, options=emulated(gpu_memory=budget))
    large.compile(backend=backend, options=emulated(gpu_memory=64 * budget))
    with torch.no_grad():
        torch.testing.assert_close(small(x), small.forward(x))
        without = [graph for graph in backend.graphs if not graph._graph.weights]
        assert len(without) < len(backend.graphs)
        del small
        gc.collect()
        assert backend.graphs[0].runtime.ledger.smallest_budget_bytes is None
        large(random(2, 4 * WIDTH))
        torch.testing.assert_close(without[-1](x)[0], x * 2)  # whoever calls it finds it working


def test_a_replaced_weight_is_no_deleted_model() -> None:
    model, x, backend = Mlp().eval(), random(2, WIDTH), RecordingBackend()
    watched = _used(model, backend)
    replaced = torch.nn.Parameter(random(WIDTH, WIDTH, seed=5), requires_grad=False)
    model.layers[0].weight = replaced
    gc.collect()
    assert all(graph.serves_models for graph in backend.graphs)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    assert backend.accelerator.counters is watched.counters
    del model, replaced
    gc.collect()
    assert watched.all_gone
