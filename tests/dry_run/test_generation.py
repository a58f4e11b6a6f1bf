"""``plan_generation``: figures that follow from each other, memory inside the budget, one ledger, errors."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BambaConfig, Gemma2Config, LlamaConfig, MistralConfig, T5Config, ViTConfig

from hetegen_compile import plan_generation
from hetegen_compile.cost_model import load_profile, profile_to_json
from hetegen_compile.dry_run import GenerationPlan, generation
from hetegen_compile.dry_run.forwards import TracedGeneration, trace_generation
from hetegen_compile.dry_run.models import NamedModel, named_model
from hetegen_compile.dry_run.report import generation_json, generation_report
from hetegen_compile.dry_run.times import contexts_of, sum_of_steps
from hetegen_compile.errors import BudgetError, HardwareProfileError, OptionError, UnsupportedModelError
from tests.dry_run.configs import MODELS, make

LLAMA = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=8192, max_position_embeddings=32768,
)  # fmt: skip
PARAMETERS = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 5632 + 2 * 2048) + 2 * 8192 * 2048 + 2048
CACHE_BYTES = 2 * 2 * 512 * 2
"""Of one token: layers, keys and values, width, float16."""
A10 = "a10-xeon"


_TRACED: dict[Any, TracedGeneration] = {}


@pytest.fixture(autouse=True)
def each_model_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a plan is Dynamo's tracing, which is the same for every budget and split."""

    def traced(named: NamedModel, prompt: int, batch: int, **how: Any) -> TracedGeneration:
        module: Any = named.module
        tensors = [(name, t.shape, t.dtype, t.device) for name, t in module.state_dict().items()]
        key = (type(module), repr(module.config), *tensors, prompt, batch, *sorted(how.items()))
        if key not in _TRACED:
            _TRACED[key] = trace_generation(named, prompt, batch, **how)
        return _TRACED[key]

    monkeypatch.setattr(generation, "trace_generation", traced)


@cache
def planned(gpu_memory: str = "120MiB") -> GenerationPlan:
    options = {"hardware": A10, "gpu_memory": gpu_memory}
    return plan_generation(LLAMA, prompt=64, new_tokens=9, options=options)


def test_tokens_per_second_follow_from_the_times() -> None:
    plan = planned()
    assert list(plan.decode_step_s) == [64, 67, 71]
    first, middle, last = plan.decode_step_s.values()
    assert first <= middle <= last  # attention reads more, beside a link that works all the time
    assert plan.ours.decode_s == pytest.approx(8 * middle, rel=0.01)
    assert plan.tokens_per_s == pytest.approx(9 / (plan.prefill_s + plan.ours.decode_s))
    assert plan.decode_tokens_per_s == pytest.approx(8 / plan.ours.decode_s)
    assert plan.prefill_s == plan.prefill.predicted_step_s
    assert plan.floor_s < plan.ours.total_s


def test_the_context_costs_what_the_cache_holds() -> None:
    """Keys and values are read by attention, and not written anew; attention's FLOPs are few."""
    step = planned("1GiB").decode_step_s  # nothing is streamed: the accelerator's work is the step
    slope = (step[71] - step[64]) / 7
    assert CACHE_BYTES / 600e9 < slope < 2 * CACHE_BYTES / 600e9


def test_memory_is_inside_the_budget_and_counts_every_weight() -> None:
    plan = planned()
    assert plan.accelerator_peak_bytes <= plan.budget_bytes == 120 * 2**20
    assert plan.accelerator_bytes["resident weights"] > 0
    assert PARAMETERS * 2 <= plan.host_bytes["weights and buffers"] <= PARAMETERS * 2 + 4096
    assert 0 < plan.pinned_bytes < plan.host_bytes["weights and buffers"]


def test_prefill_and_decode_share_one_ledger() -> None:
    plan = planned()
    assert plan.decode is not None
    resident = [{row.module for row in s.rows if row.placement == "resident"} for s in (plan.prefill, plan.decode)]
    assert resident[0] == resident[1] != set()
    assert plan.prefill.resident_bytes == plan.decode.resident_bytes
    assert plan.decode.tokens == (1, 1)


def test_a_larger_budget_is_never_slower() -> None:
    speeds = [planned(memory).tokens_per_s for memory in ("60MiB", "120MiB", "1GiB")]
    assert speeds == sorted(speeds)
    assert planned("1GiB").decode is not None
    assert "everything fits" in planned("1GiB").verdict


def test_baselines_are_whole_generations() -> None:
    plan = planned()
    assert set(plan.baselines) == {"per_linear", "streamed", "per_module", "host_only", "resident"}
    seconds = {name: one.total_s for name, one in plan.baselines.items() if one is not None}
    assert seconds["resident"] < plan.ours.total_s <= seconds["streamed"] < seconds["per_module"]
    assert plan.ours.total_s < seconds["host_only"]
    assert "times as fast as the best alternative" in plan.verdict


def test_a_forced_split_is_followed_and_judged() -> None:
    streamed = plan_generation(
        LLAMA, prompt=64, new_tokens=9, options={"hardware": A10, "gpu_memory": "120MiB", "split": 0.0}
    )
    assert streamed.decode is not None
    assert streamed.decode.host_bytes == 0
    assert streamed.ours.total_s == pytest.approx(planned().baselines["streamed"].total_s, rel=1e-6)  # type: ignore[union-attr]
    assert "buys nothing: the host adds nothing" in streamed.verdict


def test_context_keeps_room_for_its_cache() -> None:
    options = {"hardware": A10, "gpu_memory": "180MiB", "context": 4000}
    plain, room = planned("180MiB"), plan_generation(LLAMA, prompt=64, new_tokens=9, options=options)
    more_cache = (4000 - 73) * CACHE_BYTES
    shared_out = ("resident weights", "staging ring")
    held = [sum(n for name, n in p.accelerator_bytes.items() if name not in shared_out) for p in (plain, room)]
    assert more_cache <= held[1] - held[0] < 2 * more_cache  # it is lengthened where it lies
    assert room.accelerator_bytes["resident weights"] < plain.accelerator_bytes["resident weights"]


def test_a_budget_below_the_cache_is_an_error_with_the_number() -> None:
    with pytest.raises(BudgetError, match=r"smallest budget that works is \d+ bytes"):
        plan_generation(LLAMA, prompt=64, new_tokens=9, options={"hardware": A10, "gpu_memory": "1MiB"})


def test_an_encoder_has_one_forward() -> None:
    plan = plan_generation(MODELS["bert"][1], prompt=32, options={"hardware": A10})
    assert plan.decode is None
    assert plan.decode_tokens_per_s is None
    assert plan.tokens_per_s == pytest.approx(32 / plan.prefill_s)
    assert "one forward of 32 tokens" in generation_report(plan)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_architectures(name: str) -> None:
    """On a slow accelerator and with many sequences: else the host's calls are the step of models as small as these."""
    options = {"hardware": "cpu-emulated"}
    plan = plan_generation(MODELS[name][1], prompt=16, new_tokens=4, batch=64, options=options)
    first, *_, last = plan.decode_step_s.values()
    assert 0 < first < last


def test_a_module_in_host_memory_is_planned_like_its_config() -> None:
    real = plan_generation(make("llama", "cpu"), prompt=16, new_tokens=4, options={"hardware": A10})
    config = plan_generation(MODELS["llama"][1], prompt=16, new_tokens=4, dtype="float32", options={"hardware": A10})
    assert real.ours == config.ours
    assert real.dtype == "float32"


def test_one_token_has_no_decode_steps() -> None:
    plan = plan_generation(LLAMA, prompt=1, new_tokens=1, options={"hardware": A10, "gpu_memory": "120MiB"})
    assert plan.decode_step_s == {}
    assert plan.tokens_per_s == pytest.approx(1 / plan.prefill_s)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        planned().batch = 2  # type: ignore[misc]


# ---- where models come from --------------------------------------------------------------------------------------


def test_a_folder_is_planned_like_its_config(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    plan = plan_generation(tmp_path, prompt=64, new_tokens=9, options={"hardware": A10, "gpu_memory": "120MiB"})
    assert plan.ours == planned().ours
    assert plan.model == str(tmp_path)


def test_a_config_file(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    named = named_model(tmp_path / "config.json", "float16")
    assert named.generates
    assert {p.device.type for p in named.module.parameters()} == {"meta"}
    assert sum(p.numel() for p in named.module.parameters()) == PARAMETERS


@pytest.mark.parametrize(
    ("stated", "dtype", "found"),
    [
        ({}, None, "float16"),
        ({"torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": "float32"}, None, "float32"),
        ({"dtype": "float32"}, "bfloat16", "bfloat16"),
        ({"torch_dtype": "float8_e4m3fn"}, None, "float16"),
    ],
)
def test_weights_are_of_the_type_that_the_config_states(
    stated: dict[str, str], dtype: str | None, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA.to_dict(), **stated}))
    named = named_model(path, dtype)
    assert named.dtype == found
    assert {str(p.dtype) for p in named.module.parameters()} == {f"torch.{found}"}


def test_a_type_that_torch_does_not_have_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "half of it"}')
    with pytest.raises(UnsupportedModelError, match=r"no config of .*'half of it'"):
        named_model(tmp_path)


def test_a_config_stays_as_it_was_given() -> None:
    before = LLAMA.to_dict()
    named_model(LLAMA, "bfloat16")
    assert LLAMA.to_dict() == before


def test_a_model_that_is_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--llama" / "snapshots" / "0123"
    LLAMA.save_pretrained(snapshot)
    (tmp_path / "models--some--llama" / "refs").mkdir()
    (tmp_path / "models--some--llama" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    named = named_model("some/llama", "float16")
    assert sum(p.numel() for p in named.module.parameters()) == PARAMETERS
    assert named.name == "some/llama"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/has-this-model", "hub's cache; the network is not used"),
        (T5Config(), "encoder and a decoder"),
        (ViTConfig(num_hidden_layers=1), "does not read tokens"),
        (7, "neither a path"),
    ],
)
def test_what_is_no_model_of_text_is_an_error(source: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        plan_generation(source, options={"hardware": A10})


WINDOWED: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 512, "sliding_window": 32,
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "new_tokens", "tokens"), [(16, 8, 23), (16, 32, 31), (40, 32, 31)])
def test_windows_are_as_long_as_in_the_last_step(prompt: int, new_tokens: int, tokens: int) -> None:
    """All layers of Mistral have one, so each step takes the same time; every other one of Gemma 2."""
    mistral = MistralConfig(**{**WINDOWED, "num_hidden_layers": 1})
    gemma = Gemma2Config(**WINDOWED, head_dim=128)
    plans = [
        plan_generation(config, prompt=prompt, new_tokens=new_tokens, options={"hardware": A10, "gpu_memory": "1GiB"})
        for config in (mistral, gemma)
    ]
    for plan in plans:
        assert any(note.endswith(f"{tokens} tokens long") for note in plan.notes)
        assert list(plan.decode_step_s) == contexts_of(prompt, new_tokens)
    assert len(set(plans[0].decode_step_s.values())) == 1 < len(set(plans[1].decode_step_s.values()))


def test_a_cache_of_another_kind_is_an_error_that_names_plan() -> None:
    config = BambaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"cache of \w+; decode .*hetegen_compile\.plan"):
        plan_generation(config, prompt=16, new_tokens=4, options={"hardware": A10})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": "int3"}, OptionError, "valid are 'float16'"),
        ({"prompt": 0}, OptionError, "prompt = 0"),
        ({"prompt": 1.5}, OptionError, "prompt = 1.5: expected a whole number"),
        ({"new_tokens": "9"}, OptionError, "new_tokens = '9'"),
        ({"batch": True}, OptionError, "batch = True"),
        ({"options": {"context": 20}}, OptionError, "context=20 is less than the 73 tokens"),
        ({"options": {"hardware": "no-such-machine"}}, HardwareProfileError, "no-such-machine"),
        ({"options": {"gpu_memry": 1}}, OptionError, "did you mean 'gpu_memory'"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_generation(LLAMA, **{"prompt": 64, "new_tokens": 9, "options": {"hardware": A10}, **changes})


def test_the_tables_are_printed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"hardware": A10, "gpu_memory": "120MiB"}
    plan = plan_generation(LLAMA, prompt=64, new_tokens=9, options=given)
    assert plan.decode is not None
    assert capsys.readouterr().out == ""
    plan_generation(LLAMA, prompt=64, new_tokens=9, options={**given, "print_schedule": True, "unfold": True})
    shown = capsys.readouterr().out
    assert plan.prefill.table(unfold=True) in shown
    assert plan.decode.table(unfold=True) in shown


# ---- parts -------------------------------------------------------------------------------------------------------


def test_steps_between_contexts_lie_on_straight_lines() -> None:
    steps = {n: 1.0 + 0.25 * n for n in range(10, 30)}
    for new_tokens in (2, 3, 4, 20):
        contexts = contexts_of(10, new_tokens)
        exact = sum(steps[10 + i] for i in range(new_tokens - 1))
        assert sum_of_steps({n: steps[n] for n in contexts}) == pytest.approx(exact)
    assert sum_of_steps({}) == 0.0


def test_json_has_the_figures_of_the_plan() -> None:
    plan = planned()
    data = json.loads(json.dumps(generation_json(plan)))
    assert data["tokens_per_s"] == plan.tokens_per_s
    assert data["accelerator_peak_bytes"] == plan.accelerator_peak_bytes
    assert data["baselines"]["streamed"]["tokens_per_s"] == plan.baselines["streamed"].tokens_per_s  # type: ignore[union-attr]
    assert len(data["decode"]["rows"]) == len(plan.decode.rows)  # type: ignore[union-attr]
    assert data["decode_step_s"]["64"] == plan.decode_step_s[64]


def test_notes_say_what_the_figures_leave_out() -> None:
    config = LlamaConfig(**{**LLAMA.to_dict(), "max_position_embeddings": 64})
    plan = plan_generation(config, prompt=64, new_tokens=1, options={"hardware": A10, "gpu_memory": "120MiB"})
    assert plan.notes == ("65 tokens are more than the 64 positions that the model's config states",)
    assert f"note: {plan.notes[0]}" in generation_report(plan)


def test_weights_above_the_hosts_memory_go_through_a_pinned_ring(tmp_path: Path) -> None:
    profile = load_profile(A10)
    small = replace(profile, host=replace(profile.host, memory_bytes=100 * 2**20))
    path = tmp_path / "small.json"
    path.write_text(json.dumps(profile_to_json(small)))
    options = {"hardware": str(path), "gpu_memory": "120MiB", "split": 0.0}
    plan = plan_generation(LLAMA, prompt=64, new_tokens=1, options=options)
    assert plan.host_bytes["pinned ring"] > 0
    assert plan.pinned_bytes == 0
    assert "pinned ring" in plan.notes[0]


def test_dtypes_halve_the_weights() -> None:
    wide = plan_generation(LLAMA, prompt=64, new_tokens=1, dtype="float32", options={"hardware": A10})
    narrow = plan_generation(LLAMA, prompt=64, new_tokens=1, dtype="bfloat16", options={"hardware": A10})
    assert wide.host_bytes["weights and buffers"] > 1.99 * narrow.host_bytes["weights and buffers"]
    assert narrow.dtype == "bfloat16"
    stated = LlamaConfig(**{**LLAMA.to_dict(), "dtype": "bfloat16"})
    assert plan_generation(stated, prompt=64, new_tokens=1, options={"hardware": A10}) == narrow
    assert not torch.is_inference_mode_enabled()
