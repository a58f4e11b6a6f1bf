"""Linears whose weights are parts of parameters are split like any others, in models three times the budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hetegen_compile
from tests.models.harness import RecordingBackend, compiled_like_eager, emulated, through_inductor
from tests.models.layers import Layers

WIDTH = 128


class Packed(nn.Module):
    """Three Linears in one parameter, and their biases in one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 12)
        self.bias = nn.Parameter(torch.randn(3 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.weight.chunk(3)
        gate = torch.sigmoid(F.linear(x, second, self.bias[WIDTH : 2 * WIDTH]))
        return F.linear(x, first, self.bias[:WIDTH]) * gate + F.linear(x, third)


class ColumnMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t() / 12)
        self.register_buffer("other", torch.randn(WIDTH, WIDTH).t() / 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) @ self.other  # type: ignore[operator]


class Stack(nn.Module):
    """Every layer's matrix in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 12)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights.unbind():
            x = F.linear(x, weight)
        return x


class Attention(nn.Module):
    """Of another input, so that the parts of the packed weight are used apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x / 2, x / 2, need_weights=False)[0]  # type: ignore[no-any-return]


KINDS = [Packed, ColumnMajor, Stack, Attention]


def made(layer: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, int]:
    """A model, its input, and a third of the bytes of its weights."""
    torch.manual_seed(0)
    model = Layers(layer, 3).eval()
    return model, torch.randn(1, 5, WIDTH), sum(t.nbytes for t in (*model.parameters(), *model.buffers())) // 3


@pytest.mark.parametrize("layer", KINDS)
def test_parts_are_split_and_streamed(layer: Callable[[], nn.Module]) -> None:
    model, x, budget = made(layer)
    with torch.no_grad():
        found = compiled_like_eager(
            model, lambda: [model(x) for _ in range(3)], options=emulated(gpu_memory=budget), calls=1
        )
    (schedule,) = found.schedules
    linears = [row for row in schedule.rows if row.op == "linear" and row.host_share is not None]
    assert sum(0 < (row.host_share or 0) < 1 for row in linears) == len(linears) >= 6
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t.dim() > 1)
    assert schedule.host_bytes + schedule.streamed_bytes + schedule.resident_bytes >= weights
    assert "do not fit" not in schedule.explain()


@through_inductor
@pytest.mark.parametrize("layer", KINDS)
def test_another_number_of_tokens(layer: Callable[[], nn.Module]) -> None:
    model, x, budget = made(layer)
    inputs = [x, torch.randn(2, 9, WIDTH), torch.randn(1, 2, WIDTH)]
    with torch.no_grad():
        compiled_like_eager(model, lambda: [model(x) for x in inputs], options=emulated(gpu_memory=budget))


@pytest.mark.parametrize("layer", KINDS)
def test_everything_fits(layer: Callable[[], nn.Module]) -> None:
    model, x, budget = made(layer)
    options = emulated(gpu_memory=12 * budget, split="auto")
    with torch.no_grad():
        found = compiled_like_eager(model, lambda: model(x), options=options, calls=1, offloads=False)
    (schedule,) = found.schedules
    assert schedule.whole_graph
    assert schedule.resident_bytes <= 3 * budget, "no part counts twice"


@pytest.mark.parametrize("layer", KINDS)
def test_changed_weights_and_another_instance(layer: Callable[[], nn.Module]) -> None:
    """Optimiser steps, ``load_state_dict`` and a copy of the model that runs in the same graph."""
    model, x, budget = made(layer)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(-1.5)
        backend = RecordingBackend()
        compiled = torch.compile(lambda one, x: one(x), backend=backend, options=emulated(gpu_memory=budget))
        for _ in range(2):
            for one in (model, other):
                torch.testing.assert_close(compiled(one, x), one(x), rtol=1e-4, atol=1e-5)
        for weight in model.parameters():
            weight.add_(0.01)
        torch.testing.assert_close(compiled(model, x), model(x), rtol=1e-4, atol=1e-5)
        assert backend.accelerator.counters.peak_bytes <= budget


@pytest.mark.parametrize("layer", KINDS)
def test_a_dry_run_splits_the_same(layer: Callable[[], nn.Module]) -> None:
    model, x, budget = made(layer)
    options: dict[str, Any] = {"accelerator": "emulated", "print_schedule": False, "gpu_memory": budget, "split": 0.5}
    with torch.no_grad():
        planned = hetegen_compile.plan(model, x, options=options)
        compiled = torch.compile(model, backend=RecordingBackend(), options=options)
        compiled(x)
    run = hetegen_compile.schedules()[-1]
    assert planned.streamed_bytes == run.streamed_bytes > 0
    assert planned.host_bytes == run.host_bytes > 0
