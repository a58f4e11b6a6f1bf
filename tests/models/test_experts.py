"""Mixtures of experts whose experts are stacked in one parameter and exceed the budget: they run, as in eager."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import hetegen_compile
from hetegen_compile.cost_model import KernelChoice, load_profile, profile_to_json
from hetegen_compile.host_kernels import KERNELS, VECTORISED
from tests.models.architectures import VOCABULARY, WEIGHT_SCALE, generate, prompts
from tests.models.harness import RecordingBackend, emulated, new_schedules

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip

MIXTURES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "mixtral": lambda sizes: MixtralForCausalLM(MixtralConfig(num_local_experts=16, **sizes)),
    "qwen3_moe": lambda sizes: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=16, moe_intermediate_size=64, **sizes)),
    "gpt_oss": lambda sizes: GptOssForCausalLM(GptOssConfig(num_local_experts=16, **sizes)),
}


def mixture(name: str, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = MIXTURES[name](_SIZES | sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(WEIGHT_SCALE if parameter.dim() > 1 else 1)
    return model


def test_a_stack_that_stays_goes_up_once() -> None:
    """Prefill and decode agree on it, in this generation and the next."""
    model = mixture("mixtral")
    stacks = [p.nbytes for p in model.parameters() if p.dim() == 3]
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    options = {"gpu_memory": 400 << 10, "context": 12}
    model.compile(backend=backend, options=emulated(split="auto", **options))
    uploaded = []
    for _ in range(2):
        generate(model, prompts(2), None, tokens=3)
        uploaded.append(backend.accelerator.counters.uploaded_bytes["weights"])
    schedules = new_schedules(known)
    assert len(schedules) >= 2
    assert {schedule.streamed_bytes for schedule in schedules} == {0}, "so that all uploads are of what stays"
    assert {schedule.resident_bytes for schedule in schedules} == {uploaded[0]}
    assert min(stacks) < uploaded[0] < sum(p.nbytes for p in model.parameters())
    assert uploaded[1] == uploaded[0]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_beyond_the_budget_are_computed_on_the_host(name: str) -> None:
    model = mixture(name)
    experts = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 3)
    budget = experts // 2
    expected = generate(model, prompts(2), None, tokens=3)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split="auto"))
    found = generate(model, prompts(2), None, tokens=3)
    assert torch.equal(found["sequences"], expected["sequences"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert 0 < backend.accelerator.counters.peak_bytes <= budget < experts
    schedules = new_schedules(known)
    assert schedules
    for schedule in schedules:
        assert schedule.resident_bytes, "Linears go first"
        assert schedule.host_bytes >= min(p.nbytes for p in model.parameters() if p.dim() == 3)
        assert "stacked weights do not fit" in schedule.explain()
        assert "caches that grow" not in schedule.explain(), "what routers write in place are no caches"
        appends = "append_tokens" in {row.op for row in schedule.rows if row.placement == "host"}
        assert appends is (name != "gpt_oss"), "whose one layer has a window"
        assert "not offloaded" not in schedule.title


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of each product of tokens with experts that our kernels compute, how many experts in one call, and tokens."""
    seen: list[tuple[str, int]] = []

    def run(x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int) -> Tensor:
        if x.dim() == 2:
            seen.append(("one", x.shape[0]))
        return VECTORISED.run(x, rows, bias, lo, hi, dim)

    def groups(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        assert VECTORISED.groups is not None
        seen.append(("all", x.shape[0]))
        return VECTORISED.groups(x, matrices, ends)

    monkeypatch.setitem(KERNELS, "vectorised", replace(VECTORISED, run=run, groups=groups, reading=None))
    return seen


def profile_with(kernel: str, folder: Path) -> str:
    """The path of a profile that says that this kernel computes host parts."""
    preset = load_profile("cpu-emulated")
    ours = dict.fromkeys(("float32", "bfloat16"), KernelChoice(((1.0, kernel),)))
    path = folder / "profile.json"
    profile = replace(preset, name="ours", host=replace(preset.host, linear_kernels=ours))
    path.write_text(json.dumps(profile_to_json(profile)))
    return str(path)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in transformers' own code
@pytest.mark.parametrize(
    ("name", "dtype"), [("mixtral", torch.float32), *((name, torch.bfloat16) for name in MIXTURES)]
)
def test_the_hosts_kernels_compute_with_experts(
    name: str, dtype: torch.dtype, products: list[tuple[str, int]], tmp_path: Path
) -> None:
    """What transformers calls differs by dtype, and of GPT-OSS each matrix lies [in, out], with biases."""
    model = mixture(name)
    torch.nn.Module.to(model, dtype)
    experts = sum(p.nbytes for p in model.parameters() if p.dim() == 3)
    expected = generate(model, prompts(2), None, tokens=3)
    hardware = profile_with("vectorised", tmp_path)
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=experts // 2, split=0.0, hardware=hardware))
    found = generate(model, prompts(2), None, tokens=3)
    if dtype == torch.float32:
        assert torch.equal(found["sequences"], expected["sequences"])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found["logits"][0], expected["logits"][0], rtol=tolerance, atol=tolerance)
    (kind,) = {kind for kind, _ in products}
    assert kind == ("one" if name == "gpt_oss" else "all")
    if kind == "all":
        assert len(products) == 2 * 3, "two a layer and forward"
        assert {tokens for _, tokens in products[2:]} == {2 * 2}, "two sequences, two experts for each token"


def test_a_kernel_that_cannot_be_used_shows(tmp_path: Path) -> None:
    model = mixture("mixtral")
    experts = sum(p.nbytes for p in model.parameters() if p.dim() == 3)
    expected, known = generate(model, prompts(2), None, tokens=2), hetegen_compile.schedules()
    hardware = profile_with("of tomorrow", tmp_path)
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=experts // 2, hardware=hardware))
    assert torch.equal(generate(model, prompts(2), None, tokens=2)["sequences"], expected["sequences"])
    for schedule in new_schedules(known):
        assert "products with experts: computed with F.linear, not with the hardware" in schedule.explain()


class Grouped(nn.Module):
    """One product with experts, given where groups end as ``ends``, that may switch autocast on or off."""

    def __init__(self, ends: torch.dtype, autocast: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(4, 48, 32))
        self.ends, self.autocast = ends, autocast

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.arange(1, 5, dtype=self.ends) * 2
        within = contextlib.nullcontext() if self.autocast is None else torch.autocast("cpu", enabled=self.autocast)
        with within:
            found: Tensor = torch.ops.transformers.grouped_mm_fallback(x * 2, self.stack.transpose(1, 2), offs=ends)
        return found + 1


@pytest.mark.parametrize(
    ("ends", "callers", "programs", "reason"),
    [
        (torch.int32, False, None, None),
        (torch.int64, False, None, "it has more operands than the experts' matrices and where groups end, as int32"),
        (torch.int32, True, None, "autocast is on"),
        (torch.int32, False, True, "autocast is on"),
        (torch.int32, True, False, None),
    ],
)
@torch.no_grad()
def test_products_that_the_hosts_kernels_do_not_serve_are_torchs_and_show(
    ends: torch.dtype, callers: bool, programs: bool | None, reason: str | None,
    products: list[tuple[str, int]], tmp_path: Path,
) -> None:  # fmt: skip
    model, x = Grouped(ends, programs).eval(), torch.randn(8, 32)
    hardware, known = profile_with("vectorised", tmp_path), hetegen_compile.schedules()
    with torch.autocast("cpu", torch.bfloat16, enabled=callers):
        expected = model(x)
        compiled = torch.compile(
            model, backend=RecordingBackend(), options=emulated(gpu_memory=8 << 10, hardware=hardware)
        )
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    (schedule,) = new_schedules(known)
    shown = f"products with experts: computed by torch: {reason}"
    assert [refusal for refusal in schedule.explain().splitlines() if "computed by torch" in refusal] == (
        [f"left as it is: {shown}"] if reason else []
    )
    assert bool(products) == (reason is None)


class Multiplied(nn.Module):
    """A stack that autocast casts, in the program or where it is switched off there."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(8, 480, 32))
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            found = torch.bmm(x.expand(8, 2, 32), self.stack.transpose(1, 2))
        return found + 1


@pytest.mark.parametrize("programs", [False, True])
@torch.no_grad()
def test_what_the_host_computes_of_a_stack_is_under_the_programs_autocast(programs: bool) -> None:
    """It had been computed outside of the region, in float32."""
    model, x = Multiplied(programs).eval(), torch.randn(2, 32)
    known = hetegen_compile.schedules()
    with torch.autocast("cpu", torch.bfloat16, enabled=not programs):
        expected = model(x)
        found = torch.compile(model, backend=RecordingBackend(), options=emulated(gpu_memory=400 << 10))(x)
    assert expected.dtype == (torch.bfloat16 if programs else torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (schedule,) = new_schedules(known)
    assert "computed on the host, where they lie" in schedule.explain()
