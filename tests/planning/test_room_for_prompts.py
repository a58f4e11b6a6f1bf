"""Of a prompt the budget keeps room for the split that will be chosen, not only for those that are easy to foresee."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.model_shapes import shape_of
from benchmarks.schedule_quality import Work
from hetegen_compile.cost_model import load_profile
from hetegen_compile.passes.context import Bucket
from hetegen_compile.planning import within_budget
from hetegen_compile.planning.balance import promising_trips


def test_an_output_layer_may_be_the_hosts_though_its_way_up_takes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a third of what is streamed, and read at one token: the host has it while the link works for the next."""
    work, profile = Work(shape_of("opt-6.7b", 6), "prefill-512"), load_profile("a10-xeon")
    base, step = work.plan(profile, 0.75)
    assert not any("leaner split" in refusal.reason for refusal in step.schedule.refusals)
    assert step.schedule.predicted_step_s < 1.1 * step.schedule.floor_s
    few = replace(base.context, bucket=Bucket(1, 1))
    assert promising_trips(base.module, base.context) is not None
    assert promising_trips(base.module, few) is None, "a decode step's splits need no more than those at hand"
    monkeypatch.setattr(within_budget, "promising_trips", lambda module, context: None)
    _, before = work.plan(profile, 0.75)
    assert any("leaner split" in refusal.reason for refusal in before.schedule.refusals), "or this test shows nothing"
    assert before.schedule.predicted_step_s > 1.2 * step.schedule.predicted_step_s
