"""A weight that is used twice counts once: in the plan, in the ledger, on the accelerator and on the link."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from hetegen_compile.runtime import Runtime
from tests.backend.modules import Mlp, random
from tests.models.architectures import VOCABULARY, prompts
from tests.models.harness import RecordingBackend, emulated

WIDTH = 64
WEIGHT_BYTES = VOCABULARY * WIDTH * 4
"""Of the embedding, and of the output layer."""
PLENTY = 8 << 20
SOME = 240 << 10
"""Not enough for GPT-2's Linears, the staging ring and activations."""
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCABULARY}


def _gpt2(tied: bool) -> PreTrainedModel:
    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 1, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(tie_word_embeddings=tied, **sizes, **_TOKENS))


def _opt(tied: bool) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "ffn_dim": 128, "word_embed_proj_dim": WIDTH}
    layers: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(tie_word_embeddings=tied, **sizes, **layers, **_TOKENS))


@dataclass(frozen=True)
class Weighed:
    """Bytes of weights and other mirrored tensors, by who says so; ``planned`` is the most of any plan."""

    planned: int
    ledger: int
    held: int
    uploaded: int


def _moved(runtime: Runtime, kind: str) -> int:
    """Uploaded bytes of the weights, without those of steps that did not come."""
    runtime.accelerator.synchronize()  # what was started for a next step may still be on its way
    wasted = runtime.carried.held_bytes + runtime.carried.wasted_bytes
    return runtime.accelerator.counters.uploaded_bytes[kind] - (wasted if kind == "weights" else 0)


def _weigh(model: nn.Module, backend: RecordingBackend) -> Weighed:
    """Of a model that is there: nothing is left of one that is not."""
    del model
    runtime, plans = backend.graphs[0].runtime, [plan for graph in backend.graphs for plan in graph.plans]
    gc.collect()
    runtime.mirrors.purge()
    budgets = [plan.schedule.budget for plan in plans]
    counters = runtime.accelerator.counters
    return Weighed(
        planned=max(one["resident weights"] + one["mirrors of inputs, buffers and caches"] for one in budgets),
        ledger=runtime.ledger.resident_bytes,
        held=counters.held_bytes["weights"] + counters.held_bytes["mirrors"],
        uploaded=_moved(runtime, "weights") + _moved(runtime, "mirrors"),
    )


def _generate(model: PreTrainedModel) -> Any:
    return model.generate(**prompts(1), max_new_tokens=2, min_new_tokens=2, do_sample=False)  # type: ignore[operator]


def _made(make: Callable[[bool], PreTrainedModel], tied: bool) -> PreTrainedModel:
    torch._dynamo.reset()  # it would know already which sizes change
    gc.collect()  # whoever was before shares the accelerator until then
    torch.manual_seed(0)
    model = make(tied).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return model  # type: ignore[no-any-return]


def _generated(
    model: PreTrainedModel, budget: int, backend: RecordingBackend | None = None
) -> tuple[PreTrainedModel, RecordingBackend]:
    expected, backend = _generate(model), backend or RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split="auto", seed=None))
    assert torch.equal(_generate(model), expected)
    assert len(backend.graphs) >= 2, "one graph for the prompt, another for the tokens"
    return model, backend


@pytest.mark.parametrize("make", [_gpt2, _opt])
def test_where_everything_fits(make: Callable[[bool], PreTrainedModel]) -> None:
    """Embedding and output layer are both there: two pieces of memory in the untied model, one in the tied."""
    tied, untied = (_weigh(*_generated(_made(make, one), PLENTY)) for one in (True, False))
    assert tied.ledger == untied.ledger, "Linears: an embedding that is no Linear's weight is in no ledger"
    assert untied.planned - tied.planned == WEIGHT_BYTES
    assert untied.uploaded - tied.uploaded == WEIGHT_BYTES
    assert untied.held - tied.held == WEIGHT_BYTES


def test_where_only_some_fits() -> None:
    """The host looks embeddings up; what the output layer needs of the same weight goes up as if it were its own."""
    found = []
    for one in (True, False):
        model, backend = _generated(_made(_gpt2, one), SOME)
        runtime, schedules = backend.graphs[0].runtime, [p.schedule for graph in backend.graphs for p in graph.plans]
        found.append(_weigh(model, backend))
        resident = runtime.accelerator.counters.held_bytes["weights"]
        assert {schedule.resident_bytes for schedule in schedules} == {resident} == {found[-1].ledger}
        streamed = sum(schedule.streamed_bytes * len(schedule.step_times_s) for schedule in schedules)
        assert streamed > 0
        assert _moved(runtime, "weights") == resident + streamed
        del model, runtime
    assert found[0] == found[1]


def test_a_copy_has_weights_of_its_own() -> None:
    """Tied in the copy, too, and not with the original's."""
    model, backend = _generated(_made(_gpt2, True), PLENTY)
    one = _weigh(model, backend)
    other, _ = _generated(copy.deepcopy(model), PLENTY, backend)
    assert other.lm_head.weight is other.get_input_embeddings().weight is not model.lm_head.weight
    both = _weigh(other, backend)
    assert both.ledger == 2 * one.ledger
    assert both.held == 2 * one.held == 2 * sum(parameter.nbytes for parameter in model.parameters())
    assert both.uploaded == 2 * one.uploaded


@pytest.mark.parametrize("budget", [1 << 20, 16 << 10])
def test_two_linears_with_one_weight(budget: int) -> None:
    """Half of the rows on the host: the others are resident once, and streamed for each use."""
    counted = []
    for tied in (True, False):
        torch.manual_seed(0)
        model, backend, x = Mlp(2, WIDTH).eval(), RecordingBackend(), random(2, WIDTH)
        if tied:
            model.layers[1].weight = model.layers[0].weight
        model.compile(backend=backend, options=emulated(gpu_memory=budget, seed=None))
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
        ((schedule,), runtime) = [plan.schedule for plan in backend.graphs[0].plans], backend.graphs[0].runtime
        resident = runtime.accelerator.counters.held_bytes["weights"]
        assert resident == runtime.ledger.resident_bytes == schedule.budget["resident weights"]
        assert _moved(runtime, "weights") == resident + 3 * schedule.streamed_bytes
        assert schedule.host_bytes == nn.Linear(WIDTH, WIDTH).weight.nbytes
        counted.append((resident, schedule.resident_bytes))
        del model, runtime, schedule, backend
        torch._dynamo.reset()  # counters begin anew with the next model
        gc.collect()
    (tied_held, tied_used), (held, used) = counted
    assert tied_used == 2 * tied_held
    assert held == used
    if budget == 1 << 20:
        assert held == 2 * tied_held == nn.Linear(WIDTH, WIDTH).weight.nbytes


@pytest.mark.parametrize("split", ["auto", 0.5])
def test_two_parameters_in_one_memory(split: Any) -> None:
    """``Parameter(other.data)`` ties two modules, and Dynamo sees two inputs: one piece of memory all the same."""
    torch.manual_seed(0)
    model, backend, x = Mlp(3, WIDTH).eval(), RecordingBackend(), random(2, WIDTH)
    first: Any = model.layers[0].weight
    model.layers[1].weight = nn.Parameter(first.data)
    model.compile(backend=backend, options=emulated(gpu_memory=1 << 20, split=split, seed=None))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    ((plan,), runtime) = backend.graphs[0].plans, backend.graphs[0].runtime
    different = 2 * nn.Linear(WIDTH, WIDTH).weight.nbytes * (1 if split == "auto" else 0.5)
    assert plan.schedule.budget["resident weights"] == runtime.ledger.resident_bytes == different
    assert runtime.accelerator.counters.held_bytes["weights"] == _moved(runtime, "weights") == different
