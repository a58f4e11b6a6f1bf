"""``refresh`` of what it cannot be meant for is told; what it does is tested with the mirrors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hetegen_compile
from hetegen_compile.errors import OptionError
from tests.backend.modules import BUDGET, Mlp, random
from tests.models.harness import RecordingBackend, emulated


@pytest.mark.parametrize(
    "given", [3, None, [Mlp()], Mlp().state_dict(), Mlp().forward], ids=lambda one: type(one).__name__
)
def test_only_a_module_can_be_refreshed(given: Any) -> None:
    with pytest.raises(OptionError, match=f"an nn.Module: {type(given).__name__} is none"):
        hetegen_compile.refresh(given)


@pytest.mark.parametrize("budget", [BUDGET, 1 << 20], ids=["streamed", "everything fits"])
def test_what_no_graph_has_run_with_is_told(budget: int, caplog: pytest.LogCaptureFixture) -> None:
    model, other = Mlp().eval(), Mlp().eval()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=budget))
    hetegen_compile.refresh(model)
    assert caplog.text.count("known to hold anything of this Mlp") == 1, "not called yet"
    with torch.no_grad():
        model(random(2, 64))
    hetegen_compile.refresh(other)
    assert caplog.text.count("known to hold anything of this Mlp") == 2


def _whole(model: nn.Module) -> nn.Module:
    return model


def _one_layer(model: nn.Module) -> nn.Module:
    return next(layer for layer in model.modules() if isinstance(layer, nn.Linear))


def _wrapped(model: nn.Module) -> nn.Module:
    wrapped: object = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


@pytest.mark.parametrize("part", [_whole, _one_layer, _wrapped])
@pytest.mark.parametrize("budget", [BUDGET, 1 << 20], ids=["streamed", "everything fits"])
def test_what_a_graph_has_run_with_is_not(
    budget: int, part: Callable[[nn.Module], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = Mlp().eval()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=budget))
    with torch.no_grad():
        model(random(2, 64))
    for _ in range(2):
        hetegen_compile.refresh(part(model))
    assert "refresh:" not in caplog.text


def test_a_layer_whose_weights_were_replaced_is_not(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp().eval()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=1 << 20))
    layer = _one_layer(model)
    with torch.no_grad():
        model(random(2, 64))
        for tensor in layer.parameters():
            tensor.data = tensor.data.clone()
        model(random(2, 64))
    hetegen_compile.refresh(layer)
    assert "refresh:" not in caplog.text
