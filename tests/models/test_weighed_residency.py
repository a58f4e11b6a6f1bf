"""A model whose decode steps are weighed: its prompts follow, and nothing is planned again and again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hetegen_compile.cost_model import load_profile, profile_to_json
from hetegen_compile.passes.context import require
from hetegen_compile.planning.planned import BucketPlan
from hetegen_compile.planning.planner import Planner
from tests.models.harness import RecordingBackend, emulated

GENERATIONS = 3


def test_decode_decides_and_prompts_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("h100-server")
    accelerator = replace(profile.accelerator, issue_s=26e-6, segment_issue_s=34e-6, gate_s=9e-6)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_to_json(replace(profile, accelerator=accelerator, fixed_s_per_split=5e-5))))
    decided: list[BucketPlan] = []
    decide = Planner._decided

    def noted(self: Planner, *given: Any) -> BucketPlan:
        decided.append(decide(self, *given))
        return decided[-1]

    monkeypatch.setattr(Planner, "_decided", noted)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=6144,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(16)[None]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    budget = int(0.4 * sum(one.nbytes for one in model.parameters()))
    backend = RecordingBackend()
    options = emulated(hardware=str(path), gpu_memory=budget, context=64, issue_ahead=True, split="auto")
    model.compile(backend=backend, options=options)
    counts = []
    for _ in range(GENERATIONS):
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
        counts.append(len(decided))
    prompt, *orders = [require(plan.context.residency, "choose_residency") for plan in decided[: counts[0]]]
    ways = [plan.context.residency_way for plan in decided[: counts[0]]]
    assert ways == [None, None, *orders[0].ways[:3]]
    assert prompt.first_rows == orders[0].first_rows, "both begin with what is estimated"
    ledger = backend.graphs[0].runtime.ledger
    assert ledger.first_rows in [order.first_rows for order in orders[1:]]
    assert counts[1] - counts[0] <= 1, "the prompt is planned with what decode steps keep"
    assert counts[2] == counts[1]
    assert all(claim.weighed for claim in ledger.others(None, None).claims()[-1] if claim.rank == 0)
    assert backend.accelerator.counters.peak_bytes <= budget
