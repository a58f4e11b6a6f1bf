"""MLP blocks that are cut as one, end to end: eager's values, fewer trips, 2-D copies carried into the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from hetegen_compile.passes.retarget_devices import CHECK_VARIABLE
from tests.models.architectures import prompts, tiny_model
from tests.models.harness import Comparison, RecordingBackend, compiled_like_eager, emulated, half_the_weights

SPARE = 32 << 10
"""Bytes: the layers are so few that activations are as large as half the weights."""
WIDTHS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}


def _phi3() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = Phi3ForCausalLM(Phi3Config(num_hidden_layers=1, pad_token_id=0, **WIDTHS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def _trips(backend: RecordingBackend) -> int:
    """Transfers up in all steps that were planned."""
    plans = [plan for graph in backend.graphs for plan in graph.plans]
    return sum(plan.bound.source.count("= to_accelerator(") for plan in plans)


def _compared(model: PreTrainedModel, run: Callable[[], Any], near: float = 1e-4) -> Comparison:
    def close(result: Any, expected: Any) -> None:
        torch.testing.assert_close(result, expected, rtol=near, atol=near)

    options = emulated(pair_mlp=True, gpu_memory=half_the_weights(model) + SPARE)
    return compiled_like_eager(model, run, options=options, compare=close)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_a_block_makes_one_trip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the embeddings, what goes up comes from: q/k/v, the attention's output, the block, the output layer."""
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    model, inputs = _phi3() if name == "phi3" else tiny_model(name, layers=1), prompts(2)

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**inputs).logits
        return found

    found = _compared(model, logits)
    assert _trips(found.backend) == 5
    rows = [row for schedule in found.schedules for row in schedule.rows if row.placement == "block"]
    assert len(rows) == (3 if name == "llama" else 2)
    assert all(row.host_share == 0.5 == row.streamed_share for row in rows)
    assert " block " in found.schedules[-1].table()
    assert "what lies between its Linears stays where it is" in found.schedules[-1].explain()


def test_half_precision_and_steps_after_each_other() -> None:
    """One partial sum is added in float32, so bf16 is as near as if the Linears were cut apart."""
    model = tiny_model("opt", layers=1, dtype=torch.bfloat16)
    inputs = prompts(1)

    def tokens() -> Any:
        found = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        return torch.stack(found.logits)

    found = _compared(model, tokens, near=0.1)
    ahead = [plan for graph in found.backend.graphs for plan in graph.plans if plan.bound.carried]
    assert any("[0:" in plan.bound.source and "ahead(" in plan.bound.source for plan in ahead)
