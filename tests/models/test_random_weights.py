"""``generate()`` with random weights: each architecture, both caches, one prompt and a padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hetegen_compile.passes.retarget_devices import CHECK_VARIABLE
from hetegen_compile.steps.segments import inductor_compiler, plain_compiler
from tests.models.architectures import ARCHITECTURES, generate, prompts, tiny_model
from tests.models.harness import (
    Comparison,
    assert_like_eager,
    calls_of_torchs_layers,
    compiled_like_eager,
    emulated,
    half_the_weights,
    through_inductor,
)

PREFILL_AND_DECODE = 2
EITHER_CACHE: list[tuple[str, str | None, int]] = [
    case
    for i, architecture in enumerate(ARCHITECTURES)
    for case in ((architecture, None, (1, 3)[i % 2]), (architecture, "static", (3, 1)[i % 2]))
]
"""Each architecture with both caches; the batch of 3 goes with the dynamic one and the static one in turn."""
THROUGH_INDUCTOR: list[tuple[str, str | None, int]] = [("gpt2", None, 1), ("gemma2", "static", 3)]
WINDOWS_AND_FULL = ("gemma2", "gemma3")
"""Their layers are of two kinds in turn."""


def _generate_like_eager(
    architecture: str, cache: str | None, batch: int, compiler: Any = plain_compiler
) -> Comparison:
    model, inputs = tiny_model(architecture, _layers(architecture, batch)), prompts(batch)
    found = compiled_like_eager(
        model, lambda: generate(model, inputs, cache), options=emulated(gpu_memory=_budget(architecture, model)),
        compiler=compiler, compare=_same_tokens_and_close_logits,
    )  # fmt: skip
    answers = found.eager["sequences"][:, inputs["input_ids"].shape[1] :]
    assert len(answers.unique()) >= 3, "an answer of one token would be equal by chance"
    return found


def _layers(architecture: str, batch: int) -> int:
    """Two layers, which share segments, once for each architecture, and wherever one is not all kinds of them."""
    return 2 if batch > 1 or architecture in WINDOWS_AND_FULL else 1


def _budget(architecture: str, model: PreTrainedModel) -> int:
    """Half the weights; more for GPT-2, whose activations of 64 tokens (the bucket's last) would fill that."""
    half = half_the_weights(model)
    return half * 5 // 4 if architecture == "gpt2" else half


def _same_tokens_and_close_logits(result: Any, expected: Any) -> None:
    torch.testing.assert_close(result["sequences"], expected["sequences"], rtol=0, atol=0)
    assert_like_eager(result, expected)


@pytest.mark.parametrize(
    ("architecture", "cache", "batch"), [case for case in EITHER_CACHE if case not in THROUGH_INDUCTOR]
)
def test_generates_what_eager_generates(
    architecture: str, cache: str | None, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each schedule is also propagated as if the accelerator were a GPU; a tensor on the wrong device is an error."""
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    found = _generate_like_eager(architecture, cache, batch)
    assert len(found.backend.returned) >= PREFILL_AND_DECODE


@through_inductor
@pytest.mark.parametrize(("architecture", "cache", "batch"), THROUGH_INDUCTOR)
def test_segments_through_inductor(architecture: str, cache: str | None, batch: int) -> None:
    """Llama's go through it with real weights, three prompts and a dynamic cache in ``test_smollm2.py``.

    From the second call on torch's layers are called around GPT-2's attention alone, which returns parts of its input;
    not around Gemma 2's, which writes the static cache.
    """
    found = _generate_like_eager(architecture, cache, batch, inductor_compiler)
    with calls_of_torchs_layers() as calls:
        again = generate(found.model, prompts(batch), cache)  # type: ignore[arg-type]
    assert torch.equal(again["sequences"], found.eager["sequences"])
    steps, segments = len(again["logits"]), sum(row.op == "segment" for row in found.schedules[-1].rows)
    layers = _layers(architecture, batch)
    assert (
        calls.call_count == steps * layers < steps * segments if architecture == "gpt2" else calls.call_count <= layers
    )


@through_inductor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_inductor(dtype: torch.dtype) -> None:
    model, inputs = tiny_model("llama", layers=1, dtype=dtype), prompts(1)
    inductors = (_inductors_logits(dtype, inputs) - _logits(model, inputs)).abs().max().item()
    assert inductors > 0, "no difference to allow"
    found = compiled_like_eager(
        model, lambda: _logits(model, inputs), options=emulated(gpu_memory=half_the_weights(model)),
        compiler=inductor_compiler, calls=1, compare=lambda result, expected: None,
    )  # fmt: skip
    assert found.compiled.dtype == found.eager.dtype == dtype
    assert (found.compiled - found.eager).abs().max().item() <= 2 * inductors + torch.finfo(dtype).eps


def _inductors_logits(dtype: torch.dtype, inputs: dict[str, Tensor]) -> Tensor:
    model = tiny_model("llama", layers=1, dtype=dtype)
    model.compile(backend="inductor")
    return _logits(model, inputs)


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits
