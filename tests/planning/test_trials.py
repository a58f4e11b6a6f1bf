"""Schedules that residency measured are those that the split is chosen from: made once, and kept for nobody."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
from torch import fx

from benchmarks.schedule_quality import Work
from hetegen_compile.ir import copy_module
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.issue_ahead import NO_ROOM_AHEAD
from hetegen_compile.passes.plans import Splits
from hetegen_compile.planning import trials as module_of_trials
from hetegen_compile.planning.planned import BucketPlan
from hetegen_compile.planning.trials import Trials
from tests.benchmarks.shapes import config
from tests.planning.test_share_search import dear_issue


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(config("gptj", layers=2), "decode-1")


@pytest.fixture
def base(work: Work) -> BucketPlan:
    return work.base(dear_issue(), 0.1)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that ``Trials`` makes."""
    made: list[fx.GraphModule] = []

    def noted(module: fx.GraphModule) -> fx.GraphModule:
        made.append(copy_module(module))
        return made[-1]

    monkeypatch.setattr(module_of_trials, "copy_module", noted)
    return made


def streamed(base: BucketPlan) -> tuple[Context, Splits]:
    """What all streamed is asked for with."""
    context = replace(base.context, options=replace(base.context.options, split=0.0))
    return context, choose_splits(base.module, context)


def told(module: fx.GraphModule) -> list[str]:
    return [node.format_node() or node.name for node in module.graph.nodes]


def test_what_was_measured_is_not_made_again(base: BucketPlan, copies: list[fx.GraphModule]) -> None:
    context, splits = streamed(base)
    plans = [trial.context.splits for trial in base.measured]
    assert splits in plans
    assert base.context.splits in plans, "the closed form of each Linear"
    found, anew = base.trials(), Trials(base.module)
    again = found.prediction(context, splits, keep=True)
    assert not copies
    assert found.prediction(context, splits) == again, "kept, and not simulated again"
    fresh = anew.prediction(context, splits, keep=True)
    assert len(copies) == 1
    assert again.step_s == fresh.step_s
    assert [(node.name, at) for node, at in again.start_s.items()] == [
        (node.name, at) for node, at in fresh.start_s.items()
    ]
    mine, other = found.finish(context, splits, ()), anew.finish(context, splits, ())
    assert told(mine[0]) == told(other[0])
    assert mine[1].refusals == other[1].refusals


@pytest.mark.parametrize("change", [{"cannot_issue_ahead": NO_ROOM_AHEAD}, {"share_trips": False}])
def test_what_was_measured_otherwise_is_made(
    base: BucketPlan, copies: list[fx.GraphModule], change: dict[str, object]
) -> None:
    context, splits = streamed(base)
    trials = base.trials()
    trials.prediction(replace(context, **change), splits)  # type: ignore[arg-type]
    assert len(copies) == 1
    residency = context.residency
    assert residency is not None
    trials.prediction(replace(context, residency=replace(residency, ring_bytes=residency.ring_bytes * 2)), splits)
    assert len(copies) == 2


def test_the_weights_are_not_kept_with_it(base: BucketPlan) -> None:
    assert base.measured
    assert not any(trial.context.weights for trial in base.measured)


def test_nobody_keeps_it_once_the_split_is_chosen(base: BucketPlan) -> None:
    graphs = [weakref.ref(trial.module.graph) for trial in base.measured]
    trials = base.trials()
    assert not base.measured
    context, splits = streamed(base)
    module, _ = trials.finish(context, splits, ())
    gc.collect()
    alive = [graph() for graph in graphs]
    assert [graph for graph in alive if graph is not None] == [module.graph], "``trials`` is still there"
