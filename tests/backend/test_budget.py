"""The budget is hard: what is said to be needed is needed and is enough, and nothing that runs exceeds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import hetegen_compile
from hetegen_compile.accelerators.emulated import EmulatedAccelerator
from hetegen_compile.errors import BudgetError
from hetegen_compile.ir import info
from hetegen_compile.passes.context import SegmentCompiler, require
from hetegen_compile.passes.findings import MemoryNeed
from hetegen_compile.passes.lower import lower
from hetegen_compile.passes.measure_memory import segment_lives
from hetegen_compile.passes.plans import UNFORESEEN
from hetegen_compile.passes.tensors import tensor_bytes, tensors_in
from hetegen_compile.pipeline import ONCE_PER_SPLIT
from hetegen_compile.planning.planned import BucketPlan
from hetegen_compile.planning.planner import Planner
from hetegen_compile.reports.schedule import Schedule
from hetegen_compile.steps.segments import inductor_compiler, plain_compiler
from tests.backend.budgets import Kept, forward, needed_bytes
from tests.backend.modules import BUDGET, WIDTH, Mlp, random
from tests.models.architectures import generate, prompts, tiny_model
from tests.models.harness import (
    RecordingBackend,
    changing_seed,
    emulated,
    half_the_weights,
    new_schedules,
    through_inductor,
)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "llama", "opt"])
def test_no_budget_is_exceeded(architecture: str) -> None:
    """At several budgets and batch sizes; the accelerator raises if a byte too many is held, and nothing did."""
    model = tiny_model(architecture, layers=1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kept = Kept(model)
    needed = needed_bytes(kept, lambda: forward(model, prompts(3)), split="auto")
    for budget, batch in ((needed, 3), (needed + weights // 3, 1)):
        known = hetegen_compile.schedules()
        kept.compile(gpu_memory=budget, split="auto")
        for _ in range(2):
            forward(model, prompts(batch))
        (schedule,) = new_schedules(known)
        assert 0 < schedule.accelerator_peak_bytes <= budget
        assert sum(schedule.budget.values()) <= budget
        assert not any(refusal.where == "gpu_memory" for refusal in schedule.refusals), "a step was run twice"


def test_peak_and_plan_agree() -> None:
    """What is planned is not much more than what is used: a budget that holds twice too much would be no figure."""
    model, inputs = tiny_model("llama", layers=4), prompts(1)
    kept = Kept(model)
    needed = needed_bytes(kept, lambda: forward(model, inputs))
    backend = kept.compile(gpu_memory=2 * needed)
    forward(model, inputs)
    (graph,) = backend.graphs
    (plan,) = graph.plans
    assert 0.6 * sum(plan.schedule.budget.values()) <= plan.schedule.accelerator_peak_bytes


def _decode_budgets(model: PreTrainedModel, tokens: int, **options: Any) -> list[tuple[int, int]]:
    """(bytes that went up to stay, resident bytes) of each plan of a generation.

    What the last step has started for a step that did not come is not counted, nor what was copied in vain. No step
    ran out of memory on the way: plans are made anew before that.
    """
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    torch._dynamo.reset()
    model.compile(backend=backend, options=emulated(split=0.0, **options))
    model.generate(**prompts(1), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    schedules = new_schedules(known)
    assert not any(refusal.where == "gpu_memory" for schedule in schedules for refusal in schedule.refusals)
    assert backend.accelerator.counters.peak_bytes <= options["gpu_memory"]
    streamed = sum(schedule.streamed_bytes * len(schedule.step_times_s) for schedule in schedules)
    (carried,) = {graph.runtime.carried for graph in backend.graphs}
    backend.accelerator.synchronize()  # counts what was started for a next step, too
    streamed += carried.held_bytes + carried.wasted_bytes
    uploaded = backend.accelerator.counters.uploaded_bytes["weights"]
    return [(uploaded - streamed, schedule.resident_bytes) for schedule in schedules]


def test_a_stated_context_leaves_prefill_the_room_that_decode_needs() -> None:
    """Decode finds every weight where prefill left it, up to the stated context, and no plan is made anew.

    Without grouped heads: where attention gets a mask (in transformers 5.17 always), it repeats the cache for all
    heads, which no graph before decode can foresee.
    """
    model = tiny_model("opt", layers=2)
    budget = sum(parameter.nbytes for parameter in model.parameters())
    found = _decode_budgets(model, 30, gpu_memory=budget, context=64)
    uploaded, resident = found[0]
    assert resident > 0
    assert {bytes_ for _, bytes_ in found} == {resident}, "prefill and decode keep the same weights"
    assert uploaded == resident, "and each of them went up once"
    assert len(found) == 2, "prefill and decode"


def test_a_cache_beyond_what_was_stated_takes_the_place_of_weights() -> None:
    model = tiny_model("llama")
    budget = sum(parameter.nbytes for parameter in model.parameters()) * 3 // 4
    found = _decode_budgets(model, 40, gpu_memory=budget, context=10)
    resident = [bytes_ for _, bytes_ in found]
    assert resident == sorted(resident, reverse=True)
    assert 0 <= resident[-1] < resident[0]


def test_a_static_cache_counts_as_large_as_it_is() -> None:
    model = tiny_model("llama")
    model.generation_config.cache_implementation = "static"
    config = {"cache_implementation": "static", "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    budget = sum(parameter.nbytes for parameter in model.parameters())
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split=0.0))
    model.generate(**prompts(1), **config)  # type: ignore[operator]
    prefill, decode = new_schedules(known)
    cache_bytes = 2 * 2 * 2 * (7 + 40 - 1) * 16 * 4  # layers, keys and values, heads, tokens, width, bytes
    assert decode.budget["mirrors of inputs, buffers and caches"] >= cache_bytes
    assert prefill.budget["activations"] >= cache_bytes
    # transformers repeats keys and values for the heads in decode only, which no prefill can tell
    assert 0.9 * prefill.resident_bytes < decode.resident_bytes <= prefill.resident_bytes
    assert backend.accelerator.counters.peak_bytes <= budget


# ---- workspace -------------------------------------------------------------------------------------------------


class MeasuredSegments:
    """A segment compiler that measures what each segment's first call allocates beside its outputs."""

    def __init__(self, compiler: Callable[[FakeTensorMode], SegmentCompiler]) -> None:
        self._compiler = compiler
        self.measured: list[tuple[int, int, str]] = []

    def __call__(self, mode: FakeTensorMode) -> SegmentCompiler:
        inner = self._compiler(mode)

        def compile_segment(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
            compiled = inner(segment, examples)
            planned, text, calls = _planned_bytes(segment), str(segment.graph), [0]

            def call(*args: Any) -> Any:
                calls[0] += 1
                if calls[0] != 2:  # the first call warms up
                    return compiled(*args)
                with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
                    results = compiled(*args)
                self.measured.append((_peak(found), planned, text))
                return results

            return call

        return compile_segment


def _planned_bytes(segment: fx.GraphModule) -> int:
    output = next(iter(reversed(segment.graph.nodes)))
    outputs = sum(int(tensor_bytes(t)) for node in output.all_input_nodes for t in tensors_in(info(node).value))
    inner = MemoryNeed(tuple(segment_lives(segment).inner), {})
    return outputs + (inner.peak_bytes(float) if inner.lives else 0)


def _peak(found: Any) -> int:
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


ATTENTION_SCRATCH_BYTES = 1 << 20
"""Torch's attention on the CPU works in blocks of a fixed size for each thread; a GPU's has nothing like it."""


@through_inductor
@pytest.mark.parametrize(
    ("architecture", "compiler"), [("llama", plain_compiler), ("llama", inductor_compiler), ("gpt2", plain_compiler)]
)
def test_segments_allocate_no_more_than_planned(architecture: str, compiler: Any) -> None:
    model, inputs, measured = tiny_model(architecture, layers=1), prompts(4), MeasuredSegments(compiler)
    kept = Kept(model)
    needed = needed_bytes(kept, lambda: forward(model, inputs))
    kept.compile(RecordingBackend(measured), gpu_memory=needed, seed=changing_seed())
    for _ in range(2):
        forward(model, inputs)
    assert len(measured.measured) >= 4
    for peak, planned, text in measured.measured:
        assert peak <= planned + ("attention" in text) * ATTENTION_SCRATCH_BYTES, text
    assert any(peak > 0 for peak, _, _ in measured.measured)


def test_a_report_says_what_others_use_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, known = Mlp(), random(2, WIDTH), hetegen_compile.schedules()
    monkeypatch.setattr(EmulatedAccelerator, "beside_bytes", property(lambda _: 3 << 20))
    compiled = torch.compile(model, backend=RecordingBackend(), options=emulated())
    with torch.no_grad():
        compiled(x)
    (schedule,) = new_schedules(known)
    assert schedule.beside_bytes == 3 << 20
    assert "3.00 MiB" in schedule.explain()


def _plannings(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, run: Callable[[], Any], **options: Any
) -> list[tuple[Planner, tuple[Any, ...]]]:
    """What the buckets of a run were planned with."""
    calls: list[tuple[Planner, tuple[Any, ...]]] = []
    plan_bucket = Planner.plan_bucket

    def noted(planner: Planner, *arguments: Any) -> BucketPlan:
        calls.append((planner, arguments))
        return plan_bucket(planner, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Planner, "plan_bucket", noted)
        model.compile(backend=RecordingBackend(), options=emulated(**options))
        run()
    return calls


def test_what_another_split_needs_on_a_gpu_does_not_depend_on_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", layers=1)
    options = {"gpu_memory": half_the_weights(model), "split": 0.5}
    calls = _plannings(monkeypatch, model, lambda: generate(model, prompts(1), "static"), **options)
    stages = tuple(stage for stage in ONCE_PER_SPLIT if stage.run is not lower)  # there is no GPU
    needs = []
    for planner, (sizes, target, weights) in calls:
        base = planner.plan_bucket(sizes, replace(target, device=torch.device("cuda:0")), weights)
        steps = [planner.plan_split(base, split, stages) for split in (0.5, 0.0, 0.5, 0.0)]
        assert steps[0].schedule.host_bytes > steps[1].schedule.host_bytes == 0
        needs.append([require(s.context.memory, "measure_memory").peak_bytes(s.context.room) for s in steps])
    assert len(needs) == 2, "prefill and decode"
    assert all(need[:2] == need[2:] for need in needs)


@pytest.mark.parametrize(("architecture", "split"), [("gpt2", 0.5), ("llama", "auto")])
def test_every_budget_from_the_smallest_to_the_whole_model_has_a_plan(
    architecture: str, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_model(architecture, layers=1), prompts(2)
    ((planner, planning),) = _plannings(monkeypatch, model, lambda: forward(model, inputs), split=split)
    sizes, target, weights = planning
    first = planner.plan_bucket(sizes, target, weights)

    def planned(budget_bytes: int) -> Schedule:
        there = replace(target, budget_bytes=budget_bytes)
        return planner.plan_split(planner.decide_again(first, sizes, there, weights), split).schedule

    with pytest.raises(BudgetError) as error:
        planned(1)
    found = re.search(r"'gpu_memory': (\d+)", str(error.value))
    assert found is not None
    smallest, whole = int(found[1]), sum(first.context.residency.budget.values())  # type: ignore[union-attr]
    budgets = [smallest + (whole - smallest) * i // 6 for i in range(7)]
    schedules = [planned(budget_bytes) for budget_bytes in budgets]
    assert all(sum(s.budget.values()) <= b for s, b in zip(schedules, budgets, strict=True))
    assert len({s.resident_bytes for s in schedules}) > 3, "the budgets differ in what stays"


def test_what_verification_finds_beyond_the_plan_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations that the plan counts too low take the place of weights instead of being refused."""
    model, inputs = tiny_model("llama", layers=1), prompts(2)
    expected, kept = forward(model, inputs), Kept(model)
    needed = needed_bytes(kept, lambda: forward(model, inputs))
    peak_bytes = MemoryNeed.peak_bytes
    monkeypatch.setattr(MemoryNeed, "peak_bytes", lambda need, nbytes: peak_bytes(need, nbytes) * 3 // 4)
    budget = needed * 5 // 4
    backend = kept.compile(gpu_memory=budget)
    torch.testing.assert_close(forward(model, inputs), expected, rtol=1e-4, atol=1e-5)
    (graph,) = backend.graphs
    (plan,) = graph.plans
    assert plan.schedule.budget[UNFORESEEN] > 0
    assert backend.accelerator.counters.peak_bytes <= budget


def test_a_budget_beyond_the_device_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not in each step, nor for each length of the prompt."""
    torch.manual_seed(0)
    model = Mlp(2).eval()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=1 << 50), dynamic=True)
    with torch.no_grad():
        for tokens in (3, 5, 9, 20, 70, 9, 3):
            model(random(tokens, 64))
    assert sum("planning with the latter" in record.message for record in caplog.records) == 1


def test_what_was_refused_once_is_planned_for_other_sizes() -> None:
    """The graph of a prompt that is too long serves shorter ones, too, and gets no new backend call for them."""
    model, backend = Mlp(2).eval(), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET), dynamic=True)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(BudgetError, match="The smallest budget that works"):
                model(random(200, WIDTH))
        torch.testing.assert_close(model(random(2, WIDTH)), model.forward(random(2, WIDTH)), rtol=1e-4, atol=1e-5)
        with pytest.raises(BudgetError, match="The smallest budget that works"):
            model(random(200, WIDTH))
    assert len(backend.graphs) == 1
    assert backend.accelerator.counters.peak_bytes <= BUDGET
