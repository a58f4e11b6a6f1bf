"""Caches that grow: the host's copies grow where they lie, and who keeps an earlier one keeps what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers import DynamicCache

import hetegen_compile
from hetegen_compile.host_memory.growing import append
from hetegen_compile.passes import capture
from hetegen_compile.passes.append_tokens import append_tokens, lies_by_token
from tests.models.architectures import tiny_model
from tests.models.harness import RecordingBackend, assert_offloaded, emulated, half_the_weights, new_schedules

PROMPT, STEPS = 24, 8


def _keys(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])  # full layers; windows, which are cut and copied
def test_caches_grow_where_they_lie(architecture: str) -> None:
    model, backend, known = tiny_model(architecture, layers=1), RecordingBackend(), hetegen_compile.schedules()
    tokens = torch.randint(2, 256, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    eager, options = copy.deepcopy(model), emulated(gpu_memory=half_the_weights(model), context=PROMPT + STEPS)
    model.compile(backend=backend, options=options)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    steps = [tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1)]
    lay: list[list[int]] = []
    held: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for given in steps:
            logits = model(given, past_key_values=cache).logits
            torch.testing.assert_close(logits, eager(given, past_key_values=expected).logits, rtol=1e-4, atol=1e-5)
            lay.append([tensor.data_ptr() for tensor in _keys(cache)])
            held += [(tensor, tensor.clone()) for tensor in _keys(cache)]
    for mine, eagers in zip(_keys(cache), _keys(expected), strict=True):
        torch.testing.assert_close(mine, eagers, rtol=1e-4, atol=1e-5)
        assert lies_by_token(mine) is (architecture == "llama")
    assert all(torch.equal(tensor, before) for tensor, before in held), "whoever keeps one keeps what it was"
    assert (lay[0] == lay[-1]) is (architecture == "llama")
    assert len(backend.graphs) == {"llama": 2, "mistral": 3}[architecture]  # transformers branches on windows
    rows = backend.graphs[-1].plans[-1].schedule.rows
    (copies,) = {row.op for row in rows if row.placement == "host"} & {"cat", "append_tokens"}
    assert copies == ("append_tokens" if architecture == "llama" else "cat")
    assert_offloaded(backend, new_schedules(known), options)


class Flat(nn.Module):
    """Reads its keys as a view that only contiguous ones have."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        new = self.proj(x).view(x.shape[0], x.shape[1], 2, 32).transpose(1, 2)
        keys = torch.cat([past, new], dim=-2)
        flat = keys.view(keys.shape[0], -1)
        return self.out(functional.relu(x)) + flat.sum(), keys


def test_a_program_that_needs_other_strides_has_its_caches_copied_and_is_told() -> None:
    torch.manual_seed(0)
    model, backend, known = Flat().eval(), RecordingBackend(), hetegen_compile.schedules()
    x, past = torch.randn(1, 1, 64), append_tokens(torch.tensor([]), torch.randn(1, 2, 5, 32))
    options = emulated(gpu_memory=half_the_weights(model), split=0.5)
    with torch.no_grad():
        expected = model(x, past)
        compiled = torch.compile(model, backend=backend, options=options)
        found = compiled(x, past)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, check_stride=True)
    (schedule,) = new_schedules(known)
    told = "caches that grow: copied in each step: laid out token by token the program cannot read it"
    assert told in schedule.explain()
    assert not backend.graphs[0].plans[0].schedule.whole_graph


def test_the_host_is_charged_for_what_is_new() -> None:
    """A step's time does not grow with its cache on the host, and it did by twice the cache over the memory's rate."""
    model, backend = tiny_model("llama", layers=1), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory="256MiB", context=600, max_batch=64))
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.ones(64, 500, dtype=torch.long), past_key_values=cache)
        model(torch.ones(64, 1, dtype=torch.long), past_key_values=cache)
    plan = backend.graphs[-1].plans[-1]
    appended = [row for row in plan.schedule.rows if row.op == append_tokens.__name__]
    launch_s = 1e-5
    assert len(appended) == 2 * model.config.num_hidden_layers
    assert all(row.host_s < 2 * launch_s for row in appended)
    assert _keys(cache)[0].nbytes / 25e9 > 10 * launch_s, "the whole cache would take longer"


def test_a_cache_that_came_in_otherwise_goes_on_as_it_is() -> None:
    """Given by the caller, or reordered for beams: no step lays it out anew, so Dynamo sees one layout."""
    model, backend, known = tiny_model("llama"), RecordingBackend(), hetegen_compile.schedules()
    tokens = torch.randint(2, 256, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for one in (cache, expected):
            model(tokens[:, :PROMPT], past_key_values=one)  # in eager: contiguous
        right = [model(token, past_key_values=expected).logits for token in tokens[:, PROMPT:].split(1, dim=1)]
        options = emulated(gpu_memory=half_the_weights(model), context=PROMPT + STEPS)
        model.compile(backend=backend, options=options)
        found = [model(token, past_key_values=cache).logits for token in tokens[:, PROMPT:].split(1, dim=1)]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert all(tensor.is_contiguous() and not lies_by_token(tensor) for tensor in _keys(cache))
    assert len(backend.graphs) == 2, "for the first length, and for all"
    assert_offloaded(backend, new_schedules(known), options)


def _divided_scores(keys: Tensor, past: Tensor, new: Tensor) -> Tensor:
    """As a mixture's router divides what it has made."""
    scores, places = torch.softmax(keys.float().sum(-1), -1).topk(2)
    scores /= scores.sum()
    return scores.mul_(places.add_(1))


def _routed_and(something: _Something) -> _Something:
    """A program writes something else as well."""
    return lambda keys, past, new: _divided_scores(keys, past, new).sum() + something(keys, past, new)


def _returned_by_one_node(keys: Tensor, past: Tensor, new: Tensor) -> Tensor:
    found: Tensor = torch.vmap(lambda one: (one.sum(), one.contiguous())[1])(keys)
    return found.mul_(2)


_Something = Callable[[Tensor, Tensor, Tensor], Tensor]

CHANGED: dict[str, _Something] = {
    "contiguous, which is the cache itself in eager": lambda keys, past, new: keys.contiguous().mul_(2),
    "a view of it": lambda keys, past, new: keys.reshape(-1)[:7].zero_(),
    "a view of that": lambda keys, past, new: keys.contiguous().unfold(2, 2, 2).mul_(2),
    "what a node returns among others": _returned_by_one_node,
    "what a node writes inside": lambda keys, past, new: torch.vmap(lambda one: one.contiguous().mul_(2))(keys),
    "past": lambda keys, past, new: past.zero_(),
    "part": lambda keys, past, new: keys[:, :, :2].zero_(),
    "part, and a router's weights": _routed_and(lambda keys, past, new: keys[:, :, :2].zero_()),
    "read as it lies": lambda keys, past, new: torch.as_strided(keys, (100,), (1,)),
    # what is made of a cache anew has strides of it
    "a product": lambda keys, past, new: (keys * 2).reshape(-1)[:7].zero_(),
    "a product with past": lambda keys, past, new: (past * 2).flatten().mul_(2),
    "made like it": lambda keys, past, new: torch.zeros_like(keys).reshape(-1)[:5].add_(1),
    "what is a copy in eager": lambda keys, past, new: (keys.transpose(1, 2) * 2).reshape(keys.shape[0], -1).mul_(3),
    "a part of what is sorted": lambda keys, past, new: keys.sort(-1)[0].contiguous().mul_(2),
    "attention": lambda keys, past, new: (
        functional.scaled_dot_product_attention(keys, keys, keys).transpose(1, 2).reshape(1, -1, 64).mul_(2)
    ),
}
"""What a program may do to a longer cache (keys), the one that it was given and what it put behind it: strides tell."""

UNCHANGED: dict[str, _Something] = {
    "what was put behind it": lambda keys, past, new: new.mul_(2),
    "what is made of it": _divided_scores,
    "by more operations than one": lambda keys, past, new: functional.rms_norm(keys.sum(1), (32,)).div_(2),
    "a product where it lies": lambda keys, past, new: (keys * 2)[:, :, :1].mul_(3),
    "what is read beside it": lambda keys, past, new: torch.zeros_like(keys).add_(keys),
    "nothing": lambda keys, past, new: keys,
}
"""Writes that have nothing to do with how a cache lies."""


class Writes(nn.Module):
    """Makes a longer cache of what it is given and does something."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.something = {**CHANGED, **UNCHANGED}[what]
        self.proj, self.out = nn.Linear(64, 64, bias=False), nn.Linear(64, 1024, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        new = self.proj(x).view(x.shape[0], x.shape[1], 2, 32).transpose(1, 2)
        keys = torch.cat([past, new], dim=-2)
        found = self.something(keys, past, new).sum()
        return self.out(functional.relu(x)) + found, keys


@pytest.mark.parametrize("what", [*CHANGED, *UNCHANGED])
def test_programs_that_strides_change_are_left_alone(what: str) -> None:
    torch.manual_seed(0)
    model, backend, known = Writes(what).eval(), RecordingBackend(), hetegen_compile.schedules()
    x, past = (
        torch.randn(1, 1, 64),
        append(append(torch.tensor([]), torch.randn(1, 2, 4, 32)), torch.randn(1, 2, 1, 32)),
    )
    mine, eagers = past, past.contiguous()
    compiled = torch.compile(model, backend=backend, options=emulated(gpu_memory=half_the_weights(model), split=0.5))
    with torch.no_grad():
        for _ in range(3):
            (right, eager_next), (found, next_one) = model(x, eagers), compiled(x, mine)
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(next_one, eager_next, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine, eagers, rtol=0, atol=1e-5)
            mine, eagers = next_one, eager_next
    first = new_schedules(known)[0]
    assert ("caches that grow: copied in each step" in first.explain()) is (what in CHANGED)
    assert lies_by_token(mine) is (what in UNCHANGED)


def test_a_program_that_raises_an_error_without_text_has_its_caches_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    propagated = capture.propagate

    def propagate(module: fx.GraphModule, *rest: Any) -> None:
        if any(node.target is append_tokens for node in module.graph.nodes):
            raise AssertionError
        propagated(module, *rest)

    monkeypatch.setattr(capture, "propagate", propagate)
    model, known, past = (
        Flat().eval(),
        hetegen_compile.schedules(),
        append_tokens(torch.tensor([]), torch.randn(1, 2, 5, 32)),
    )
    options = emulated(gpu_memory=half_the_weights(model), split=0.5)
    with torch.no_grad():
        torch.compile(model, backend=RecordingBackend(), options=options)(torch.randn(1, 1, 64), past)
    (schedule,) = new_schedules(known)
    assert "the program cannot read it (AssertionError)" in schedule.explain()
