"""A model that changes after it was compiled: copies, other dtypes, adapters; and two models on one accelerator."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hetegen_compile
from hetegen_compile.backend import make_backend
from hetegen_compile.steps.segments import plain_compiler
from tests.models.architectures import prompts, tiny_model
from tests.models.harness import (
    RTOL,
    RecordingBackend,
    assert_like_eager,
    compiled_like_eager,
    emulated,
    half_the_weights,
    new_schedules,
)


def _logits(model: Any, batch: int = 1) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**prompts(batch), use_cache=False).logits
    return logits


def _options(model: nn.Module) -> dict[str, Any]:
    return emulated(gpu_memory=half_the_weights(model) * 13 // 10)


def _scaled(factor: float) -> PreTrainedModel:
    model = tiny_model("llama", layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def _to(model: Any, dtype: torch.dtype) -> Any:
    return model.to(dtype)


def test_two_models_in_turn() -> None:
    first, second = _scaled(1.0), _scaled(0.7)
    expected = [_logits(first), _logits(second)]
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    for model in (first, second):
        model.compile(backend=backend, options={**_options(model), "seed": 3})
    for _ in range(3):
        assert_like_eager([_logits(first), _logits(second)], expected)
    assert not torch.allclose(expected[0], expected[1])
    assert backend.accelerator.counters.uploaded_bytes["weights"] > 0
    assert any(row.host_share for schedule in new_schedules(known) for row in schedule.rows)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_copy_of_a_compiled_model_is_independent(in_place: bool) -> None:
    model = _scaled(1.0)
    expected = _logits(model)
    backend, options, known = make_backend(plain_compiler), _options(model), hetegen_compile.schedules()
    compiled: Any = model
    if in_place:
        model.compile(backend=backend, options=options)
    else:
        compiled = torch.compile(model, backend=backend, options=options)
    assert_like_eager(_logits(compiled), expected)
    other = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert_like_eager(_logits(compiled), expected)
    other_expected = _logits(_scaled(0.5))
    assert_like_eager(_logits(other), other_expected)
    assert not torch.allclose(expected, other_expected)
    assert any(schedule.host_bytes and schedule.streamed_bytes for schedule in new_schedules(known))


def test_another_dtype_is_compiled_anew() -> None:
    model = _scaled(1.0)
    backend = RecordingBackend()
    model.compile(backend=backend, options=_options(model))
    assert_like_eager(_logits(model), _logits(_scaled(1.0)))
    for dtype in (torch.bfloat16, torch.float64):
        _to(model, dtype)
        expected = _logits(_to(_to(_scaled(1.0), torch.bfloat16), dtype))
        near = 0.05 if dtype == torch.bfloat16 else RTOL
        torch.testing.assert_close(_logits(model), expected, rtol=near, atol=near * expected.abs().max().item())
        assert _logits(model).dtype == dtype
    assert len(backend.graphs) == 3


class _Adapted(nn.Module):
    """What PEFT puts in the place of a Linear: a low-rank term beside it, or merged into its weight's data."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.1, requires_grad=False)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.1, requires_grad=False)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        return result if self.merged else result + nn.functional.linear(nn.functional.linear(x, self.down), self.up)

    def merge(self, sign: float) -> None:
        self.base.weight.data += sign * (self.up @ self.down)
        self.merged = sign > 0


def test_adapters_merged_and_unmerged() -> None:
    torch.manual_seed(1)
    model = _scaled(1.0)
    adapters = []
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            adapters.append(_Adapted(getattr(layer.self_attn, name)))
            setattr(layer.self_attn, name, adapters[-1])

    def run() -> list[Tensor]:
        found = [_logits(model), _logits(model)]
        for sign in (1.0, -1.0):
            for adapter in adapters:
                adapter.merge(sign)
            found += [_logits(model), _logits(model)]
        return found

    compiled_like_eager(model, run, options=_options(model), weights_change=True)


def test_an_adapter_merged_where_nothing_is_compiled_anew(caplog: pytest.LogCaptureFixture) -> None:
    """``p.data += delta`` changes neither versions nor guards: the samples of each step find it."""
    model = _scaled(1.0)
    deltas = {name: 0.1 * torch.randn_like(p) for name, p in model.named_parameters() if "mlp" in name}

    def run() -> list[Tensor]:
        found = [_logits(model)]
        for sign in (1, -1):
            for name, delta in deltas.items():
                model.get_parameter(name).data += sign * delta
            found.append(_logits(model))
        return found

    found = compiled_like_eager(model, run, options=_options(model), weights_change=True, calls=1)
    assert not torch.allclose(found.compiled[0], found.compiled[1])
    assert "in a way that torch does not see" in caplog.text


def test_a_decode_loop_through_torch_compile() -> None:
    model = _scaled(1.0)
    backend = make_backend(plain_compiler)
    compiled = torch.compile(model, backend=backend, options=_options(model))

    def decode(step: Any) -> list[Tensor]:
        tokens, past, found = prompts(1)["input_ids"], None, []
        for _ in range(4):
            with torch.no_grad():
                output = step(input_ids=tokens, past_key_values=past, use_cache=True)
            past, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
            found.append(output.logits)
        return found

    assert_like_eager(decode(compiled), decode(model))
