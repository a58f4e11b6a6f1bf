"""The hard limit that a plan is made for, and what is told of a plan that is decided again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetegen_compile.passes.claims import NothingResident
from hetegen_compile.planning.planned import DRY_RUN, ScheduledStep, Target
from hetegen_compile.planning.planner import Planner, budget_bytes
from tests.passes.graphs import PROFILE, case


def test_the_default_budget_is_what_is_free_less_a_sixteenth() -> None:
    assert budget_bytes(None, 16 << 30, "cuda") == 15 << 30


def test_a_stated_budget_is_taken_as_it_is() -> None:
    assert budget_bytes(12345, 16 << 30, "cuda") == 12345


def test_more_than_there_is_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert budget_bytes(17 << 30, 16 << 30, "cuda") == 16 << 30
    assert "17.00 GiB is more than the 16.00 GiB" in caplog.text


class HostMemory:
    """Host memory that cannot be pinned for as long as there is a reason."""

    def __init__(self) -> None:
        self.reason = "the cgroup's limit is too low"

    def staged(self, names: Collection[str], weights: Mapping[str, Tensor]) -> Mapping[str, str]:
        return dict.fromkeys(names, self.reason) if self.reason else {}


def test_what_a_decision_refused_is_gone_when_the_next_one_does_not() -> None:
    def function(x: Tensor, first: nn.Parameter, second: nn.Parameter, table: Tensor) -> Tensor:
        return F.linear(F.linear(x, first), second).relu() @ table.T

    first, second = (nn.Parameter(torch.randn(256, 256), requires_grad=False) for _ in range(2))
    found = case(function, torch.randn(1, 256), first, second, torch.randn(8, 256))
    segments, options = found.context.segments, replace(found.context.options, pair_mlp=True)
    planner = Planner(found.module, options=options, profile=PROFILE, segments=segments)
    host_memory = HostMemory()
    tight = Target(DRY_RUN, torch.device("cpu"), 400 << 10, NothingResident(), host_memory=host_memory)
    sizes, weights = found.context.sizes, found.context.weights

    base = planner.plan_bucket(sizes, tight, weights)
    told = explained(planner.plan_split(base, "auto"))
    assert any(host_memory.reason in line for line in told)
    assert any("for the next step" in line for line in told)
    host_memory.reason = ""
    again = planner.decide_again(base, sizes, tight, weights)
    assert again.module is base.module, "the graph was not cut again"
    later = explained(planner.plan_split(again, "auto"))
    assert not any("pinned ring" in line for line in later)
    assert [line for line in told if "pinned ring" not in line] == later, "what still holds is still told"
    assert any("pair_mlp" in line for line in later)


def explained(planned: ScheduledStep) -> list[str]:
    """What its report says was left as it is."""
    return [line for line in planned.schedule.explain().splitlines() if line.startswith("left as it is")]
