"""Prompts of mixtures whose experts exceed the budget: the link brings experts while the host computes with others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.cost_model import HardwareProfile, KernelChoice, load_profile, profile_to_json
from hetegen_compile.reports.schedule import EXPERTS, Schedule
from tests.models.architectures import VOCABULARY, generate
from tests.models.harness import RecordingBackend, emulated, new_schedules
from tests.models.test_experts import MIXTURES, mixture

PROMPT, TOKENS, LAYERS = 48, 3, 3
FEW = 3.0
"""Tokens of an expert from which on the host of these tests is slow."""


def slow_with_many_tokens(folder: Path, *, kernel: str | None = None, slower: float = 3000.0) -> str:
    """The path of a profile whose host reads weights so much more slowly for many tokens than for few."""
    preset = load_profile("cpu-emulated")
    host, link = preset.host, preset.link
    tables = {dtype: _slowed(preset, dtype, slower) for dtype in host.linear_bytes_per_s}
    kernels = dict.fromkeys(("float32", "bfloat16"), KernelChoice(((1.0, kernel),))) if kernel else {}
    slow = replace(host, linear_bytes_per_s=tables, linear_kernels=kernels)
    quick = replace(link, up=replace(link.up, latency_s=1e-6), down=replace(link.down, latency_s=1e-6))
    accelerator = replace(preset.accelerator, launch_s=1e-7)
    profile = replace(preset, name="slow with many", host=slow, link=quick, accelerator=accelerator)
    path = folder / "slow.json"
    path.write_text(json.dumps(profile_to_json(profile)))
    return str(path)


def _slowed(preset: HardwareProfile, dtype: str, slower: float) -> Any:
    table = preset.host.linear_bytes_per_s[dtype]
    curves = tuple(
        (size, replace(curve, points=tuple((n, rate / (slower if n >= FEW else 1.0)) for n, rate in curve.points)))
        for size, curve in table.curves
    )
    return replace(table, curves=curves)


def prompt(batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(2, VOCABULARY, (batch, PROMPT), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def experts_rows(schedule: Schedule) -> list[Any]:
    return [row for row in schedule.rows if row.op == EXPERTS]


def budget(model: torch.nn.Module, batch: int = 1) -> int:
    """Bytes that hold a prompt's step and a third of the experts."""
    stacks = [p for p in model.parameters() if p.dim() == 3]
    return sum(p.nbytes for p in stacks) // 3 + batch * (70 << 10) * stacks[0].element_size()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in transformers' own code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_prompts_experts_are_streamed_and_a_tokens_are_not(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = mixture(name, num_hidden_layers=LAYERS)
    torch.nn.Module.to(model, dtype)
    expected = generate(model, prompt(), None, tokens=TOKENS)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    options = emulated(
        gpu_memory=budget(model), split="auto", hardware=slow_with_many_tokens(tmp_path), context=PROMPT + 8
    )
    model.compile(backend=backend, options=options)
    found = generate(model, prompt(), None, tokens=TOKENS)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found["logits"][0], expected["logits"][0], rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(found["sequences"], expected["sequences"])
    first, *later = new_schedules(known)
    rows = experts_rows(first)
    assert rows
    assert all(row.placement == "streamed" and row.streamed_share == 1.0 and row.link_s > 0 for row in rows)
    assert "100% streamed: most of them have tokens of a forward like this" in first.explain()
    assert first.streamed_bytes >= sum(row.weight_bytes for row in rows) > 0
    assert later
    for schedule in later:
        assert not experts_rows(schedule)
        assert "stacked weights do not fit" in schedule.explain()
    counters = backend.accelerator.counters
    assert counters.uploaded_bytes["weights"] >= first.streamed_bytes
    assert counters.peak_bytes <= budget(model)


@pytest.mark.parametrize(("split", "kernel"), [(0.0, None), (0.25, "vectorised"), (0.5, None)])
@pytest.mark.parametrize("name", MIXTURES)
def test_host_and_link_share_the_experts(name: str, kernel: str | None, split: float, tmp_path: Path) -> None:
    """The same tokens whoever computes with an expert, by torch's product or by our kernels."""
    model = mixture(name, num_hidden_layers=LAYERS)
    expected = generate(model, prompt(2), None, tokens=TOKENS)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    hardware = slow_with_many_tokens(tmp_path, kernel=kernel)
    model.compile(backend=backend, options=emulated(gpu_memory=budget(model, 2), split=split, hardware=hardware))
    found = generate(model, prompt(2), None, tokens=TOKENS)
    assert torch.equal(found["sequences"], expected["sequences"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    rows = experts_rows(new_schedules(known)[0])
    assert rows
    assert {row.host_share for row in rows} == {split}
    assert {row.placement for row in rows} == {"split" if split else "streamed"}
    assert all((row.host_s > 0) is (split > 0) for row in rows)


def test_the_balance_gives_the_host_some(tmp_path: Path) -> None:
    """Where it is about as fast as the link, and the way of the activations is short."""
    model = mixture("mixtral", num_hidden_layers=LAYERS)
    known = hetegen_compile.schedules()
    hardware = slow_with_many_tokens(tmp_path, slower=4.0)
    expected = generate(model, prompt(), None, tokens=1)
    model.compile(
        backend=RecordingBackend(), options=emulated(gpu_memory=budget(model), split="auto", hardware=hardware)
    )
    assert torch.equal(generate(model, prompt(), None, tokens=1)["sequences"], expected["sequences"])
    (schedule,) = new_schedules(known)
    assert any(0 < row.host_share < 1 for row in experts_rows(schedule))
    assert schedule.floor_s <= schedule.predicted_step_s


def test_weights_that_change_in_place_are_streamed_as_they_are(tmp_path: Path) -> None:
    model = mixture("mixtral", num_hidden_layers=LAYERS)
    model.compile(
        backend=RecordingBackend(),
        options=emulated(gpu_memory=budget(model), split=0.25, hardware=slow_with_many_tokens(tmp_path)),
    )
    generate(model, prompt(), None, tokens=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.mul_(-0.5)
    found = generate(model, prompt(), None, tokens=1)
    eager = mixture("mixtral", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for parameter in eager.parameters():
            if parameter.dim() == 3:
                parameter.mul_(-0.5)
    expected = generate(eager, prompt(), None, tokens=1)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


class ReadByALinear(nn.Module):
    """A Linear reads what a product with experts makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(32, 64, 32) * 0.2)
        self.before, self.after = nn.Linear(32, 32), nn.Linear(64, 64)

    def forward(self, x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        found: Tensor = torch.ops.transformers.grouped_mm_fallback(
            self.before(x), self.stack.transpose(1, 2), offs=ends
        )
        return found, self.after(found)


@torch.no_grad()
def test_a_linear_that_reads_a_product_is_another_trip(tmp_path: Path) -> None:
    model, known = ReadByALinear().eval(), hetegen_compile.schedules()
    x, ends = torch.randn(96, 32), torch.arange(1, 33, dtype=torch.int32) * 3
    expected = model(x, ends)
    options = emulated(gpu_memory=150 << 10, hardware=slow_with_many_tokens(tmp_path))
    found = torch.compile(model, backend=RecordingBackend(), options=options)(x, ends)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (schedule,) = new_schedules(known)
    assert experts_rows(schedule)
