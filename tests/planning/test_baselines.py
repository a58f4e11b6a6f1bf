"""Ways that are compared with ours move, or compute with, all of a model's weights; those that cannot be split, too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.cost_model import (
    HardwareProfile,
    accelerator_linear_s,
    accelerator_op_s,
    host_linear_s,
    load_profile,
    profile_to_json,
    upload_s,
)
from hetegen_compile.reports.schedule import Schedule
from tests.models.harness import fresh_dynamo

__all__ = ["fresh_dynamo"]

EXPERTS, WIDTH, OUT, TOKENS = 8, 1024, 2048, 4
LINEAR_BYTES, MATRIX_BYTES = 2 * WIDTH * WIDTH, 2 * WIDTH * OUT
STACK_BYTES = EXPERTS * MATRIX_BYTES
LINEAR_FLOPS, GROUPED_FLOPS = 2.0 * TOKENS * WIDTH * WIDTH, 2.0 * TOKENS * WIDTH * OUT
PROFILE = load_profile("rtx4090-desktop")


class Mixture(nn.Module):
    """A Linear, and grouped products with stacks of experts."""

    def __init__(self, stacks: int) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
        shape = (EXPERTS, OUT, WIDTH)
        self.stacks = nn.ParameterList(nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for _ in range(stacks))

    def forward(self, x: Tensor, ends: Tensor) -> list[Tensor]:
        """x [tokens, width] and where each expert's tokens end -> [tokens, out] of each stack."""
        h = self.before(x)
        return [torch._grouped_mm(h, stack.transpose(1, 2), offs=ends) for stack in self.stacks]


def planned(tmp_path: Path, budget: int, *, stacks: int = 1, profile: HardwareProfile = PROFILE) -> Schedule:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_to_json(replace(profile, name="this test's"))))
    with torch.device("meta"):
        model = Mixture(stacks)
        x, ends = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16), torch.empty(EXPERTS, dtype=torch.int32)
    with torch.no_grad():
        return hetegen_compile.plan(model, x, ends, options={"hardware": str(path), "gpu_memory": budget})


def resident_s(stacks: int = 1) -> float:
    """The accelerator's time with all weights at hand."""
    grouped_bytes = TOKENS * MATRIX_BYTES + 2 * TOKENS * (WIDTH + OUT)
    linear_s = accelerator_linear_s(PROFILE, "bfloat16", TOKENS, LINEAR_BYTES, LINEAR_FLOPS)
    return linear_s + stacks * accelerator_op_s(PROFILE, "bfloat16", GROUPED_FLOPS, grouped_bytes)


def test_of_a_linear_that_stays_in_part_the_rest_is_copied() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(8192, 16384, bias=False, dtype=torch.bfloat16), torch.empty(1, 8192, dtype=torch.bfloat16)
    with torch.no_grad():
        schedule = hetegen_compile.plan(model, x, options={"hardware": PROFILE.name, "gpu_memory": "150MiB"})
    nbytes = model.weight.nbytes - schedule.resident_bytes
    assert 0 < nbytes < model.weight.nbytes
    resident = schedule.baselines["resident"]
    assert resident is not None
    copied = upload_s(PROFILE, nbytes, pinned=False) + PROFILE.synchronise_s
    assert schedule.baselines["per_module"] == pytest.approx(copied + resident)
    assert "splitting loses" not in schedule.explain()


def test_experts_on_the_host_are_copied_streamed_or_computed_with_like_all_else(tmp_path: Path) -> None:
    schedule = planned(tmp_path, 300 << 10)
    assert schedule.resident_bytes == 0
    assert "stacked weights do not fit" in schedule.explain()
    copied = sum(upload_s(PROFILE, n, pinned=False) + PROFILE.synchronise_s for n in (LINEAR_BYTES, STACK_BYTES))
    streamed = sum(upload_s(PROFILE, nbytes) for nbytes in (LINEAR_BYTES, STACK_BYTES))
    linear_s = host_linear_s(PROFILE, "bfloat16", TOKENS, LINEAR_BYTES, LINEAR_FLOPS, contended=False)
    each_s = host_linear_s(PROFILE, "bfloat16", 1, MATRIX_BYTES, GROUPED_FLOPS / TOKENS, contended=False)
    launch_s = PROFILE.host.launch_s
    expected = {
        "resident": resident_s(),
        "per_module": copied + resident_s(),
        "streamed": streamed,
        "host_only": linear_s + launch_s + TOKENS * (each_s - launch_s),
    }
    assert {name: schedule.baselines[name] for name in expected} == pytest.approx(expected)
    assert streamed > resident_s(), "so that the link decides"


def test_the_accelerator_may_take_longer_than_the_link(tmp_path: Path) -> None:
    slow = replace(PROFILE, accelerator=replace(PROFILE.accelerator, launch_s=1.0))
    schedule = planned(tmp_path, 300 << 10, profile=slow)
    assert schedule.baselines["streamed"] == schedule.baselines["resident"] == pytest.approx(2.0, rel=1e-3)


def test_what_stays_resident_takes_the_accelerators_memory_too(tmp_path: Path) -> None:
    """One stack is resident, one stays on the host; whether all fits is asked of both and of the Linear."""
    budget, weights = STACK_BYTES + (10 << 20), 2 * STACK_BYTES + LINEAR_BYTES
    for memory, fits in ((weights + (1 << 20), True), (weights - (1 << 20), False)):
        profile = replace(PROFILE, accelerator=replace(PROFILE.accelerator, memory_bytes=memory))
        schedule = planned(tmp_path, budget, stacks=2, profile=profile)
        assert STACK_BYTES <= schedule.resident_bytes <= STACK_BYTES + LINEAR_BYTES
        assert schedule.host_bytes >= STACK_BYTES
        assert (schedule.baselines["resident"] is not None) is fits


def test_a_resident_linear_is_not_streamed(tmp_path: Path) -> None:
    schedule = planned(tmp_path, LINEAR_BYTES + (2 << 20))
    assert schedule.resident_bytes == LINEAR_BYTES
    assert schedule.baselines["streamed"] == pytest.approx(upload_s(PROFILE, STACK_BYTES))


class Tied(nn.Module):
    """A table that is looked up, and multiplied with once more in a way that is no Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4096, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [n] -> logits [n, 4096]."""
        return torch.einsum("bi,vi->bv", self.table(tokens), self.table.weight * 2)


def test_a_weight_that_is_looked_up_and_computed_with_is_copied_once() -> None:
    with torch.device("meta"):
        model, tokens = Tied(), torch.empty(4, dtype=torch.long)
    with torch.no_grad():
        schedule = hetegen_compile.plan(model, tokens, options={"hardware": "rtx4090-desktop", "gpu_memory": "1MiB"})
    copied = upload_s(PROFILE, 4096 * 256 * 4, pinned=False) + PROFILE.synchronise_s
    per_module, resident = schedule.baselines["per_module"], schedule.baselines["resident"]
    assert per_module is not None
    assert resident is not None
    assert per_module - resident == pytest.approx(copied)
