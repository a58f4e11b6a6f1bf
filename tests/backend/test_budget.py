"""The budget is hard: what is said to be needed is needed and is enough, and nothing that runs exceeds it."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
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
from hetegen_compile.passes.measure_memory import inner_lives
from hetegen_compile.passes.plans import OTHERS, UNFORESEEN
from hetegen_compile.passes.tensors import tensor_bytes, tensors_in
from hetegen_compile.pipeline import ONCE_PER_SPLIT
from hetegen_compile.planned import BucketPlan
from hetegen_compile.planner import Planner
from hetegen_compile.schedule import Schedule
from hetegen_compile.segments import inductor_compiler, plain_compiler
from tests.backend.modules import WIDTH, Linear, Mlp, around, random
from tests.models.architectures import ARCHITECTURES, PROMPT, generate, prompts, tiny_model
from tests.models.harness import (
    RecordingBackend,
    changing_seed,
    emulated,
    half_the_weights,
    new_schedules,
    through_inductor,
)

TOKENS = 5
"""That a generation adds to its prompt."""


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def needed_bytes(model: nn.Module, run: Callable[[], Any], **options: Any) -> int:
    """The budget that the error for one of a byte names."""
    torch._dynamo.reset()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=1, **options))
    with pytest.raises(BudgetError, match=r"mirrors of inputs.*activations.*staging ring") as error:
        run()
    match = re.search(r"'gpu_memory': (\d+)", str(error.value))
    assert match is not None
    return int(match[1])


@pytest.mark.parametrize(("architecture", "split"), [("gpt2", "auto"), ("llama", 0.5)])
def test_the_smallest_budget_is_enough_and_one_byte_less_is_not(architecture: str, split: Any) -> None:
    model, inputs = tiny_model(architecture, layers=1), prompts(2)
    expected = forward(model, inputs)
    needed = needed_bytes(model, lambda: forward(model, inputs), split=split)
    torch._dynamo.reset()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=needed - 1, split=split))
    with pytest.raises(BudgetError, match=str(needed)):
        forward(model, inputs)
    torch._dynamo.reset()
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=needed, split=split))
    for _ in range(2):
        torch.testing.assert_close(forward(model, inputs), expected, rtol=1e-4, atol=1e-5)
    (schedule,) = new_schedules(known)
    assert schedule.resident_bytes == 0
    assert sum(schedule.budget.values()) <= needed
    assert 0 < backend.accelerator.counters.peak_bytes <= needed


@pytest.mark.parametrize(
    ("architecture", "cache", "batches", "tokens"),
    [
        ("llama", None, (1, 2), TOKENS),
        ("llama", None, (1,), 40),
        ("llama", "static", (1,), 40),
        ("qwen2", "static", (1, 3), TOKENS),
        ("opt", None, (2,), TOKENS),
        ("gpt2", "static", (1,), TOKENS),
        ("mistral", None, (1,), TOKENS),
    ],
)
def test_the_smallest_budget_is_enough_for_all_that_is_stated(
    architecture: str, cache: str | None, batches: tuple[int, ...], tokens: int
) -> None:
    """The first forward's error, a prefill's, counts the steps after it, up to ``context`` and ``max_batch``.

    Four fifths of it are not enough, even where nothing is stated and each step is planned as it comes.
    """
    model, stated = tiny_model(architecture, layers=1), {"context": PROMPT + tokens, "max_batch": max(batches)}

    def run() -> list[Tensor]:
        return [generate(model, prompts(batch), cache, tokens)["sequences"] for batch in batches]

    expected = run()
    needed = needed_bytes(model, run, split="auto", **stated)
    torch._dynamo.reset()
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=needed, split="auto", **stated))
    assert all(map(torch.equal, run(), expected))
    assert 0 < backend.accelerator.counters.peak_bytes <= needed
    torch._dynamo.reset()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=needed * 4 // 5, split="auto"))
    with pytest.raises(BudgetError):
        run()


LONG = 80
"""Tokens of a context that is many windows long."""


@pytest.mark.parametrize(("architecture", "layers"), [("mistral", 1), ("gemma2", 2)])
def test_a_window_needs_no_more_for_a_longer_context(architecture: str, layers: int) -> None:
    """The first forward, a short prompt's, names a budget that is enough for all steps, and not for a cache of all."""
    model = tiny_model(architecture, layers)
    tokens = LONG - PROMPT

    def needed(context: int) -> int:
        return needed_bytes(model, lambda: generate(model, prompts(1), None, tokens), split="auto", context=context)

    short, long = needed(LONG // 2), needed(LONG)
    per_token = 8 * 2 * 16 * 4  # of a layer that keeps all: as it comes and goes, and what attention makes of it
    assert long - short <= (LONG // 2) * (layers - 1) * 2 * per_token
    torch._dynamo.reset()
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=long, split="auto", context=LONG))
    both = model, tiny_model(architecture, layers)
    found, expected = [generate(one, prompts(1), None, tokens)["sequences"] for one in both]
    assert torch.equal(found, expected)
    assert 0.7 * long <= backend.accelerator.counters.peak_bytes <= long


@pytest.mark.parametrize(("stated", "told"), [({}, True), ({"context": 12}, False)])
def test_the_error_says_where_a_cache_is_not_counted(stated: dict[str, int], told: bool) -> None:
    model = tiny_model("llama", layers=1)
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=1, **stated))
    with pytest.raises(BudgetError) as error:
        generate(model, prompts(1), None, 1)
    assert ("'context': tokens" in str(error.value)) == told


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_no_budget_is_exceeded(architecture: str) -> None:
    """At several budgets and batch sizes; the accelerator raises if a byte too many is held, and nothing did."""
    model = tiny_model(architecture, layers=1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    needed = needed_bytes(model, lambda: forward(model, prompts(3)), split="auto")
    for budget, batch in ((needed, 3), (needed + weights // 3, 1)):
        torch._dynamo.reset()
        backend, known = RecordingBackend(), hetegen_compile.schedules()
        model.compile(backend=backend, options=emulated(gpu_memory=budget, split="auto"))
        for _ in range(2):
            forward(model, prompts(batch))
        (schedule,) = new_schedules(known)
        assert 0 < schedule.accelerator_peak_bytes <= budget
        assert sum(schedule.budget.values()) <= budget
        assert not any(refusal.where == "gpu_memory" for refusal in schedule.refusals), "a step was run twice"


def test_peak_and_plan_agree() -> None:
    """What is planned is not much more than what is used: a budget that holds twice too much would be no figure."""
    model, inputs = tiny_model("llama", layers=4), prompts(1)
    needed = needed_bytes(model, lambda: forward(model, inputs))
    torch._dynamo.reset()
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=2 * needed))
    forward(model, inputs)
    (graph,) = backend.graphs
    (plan,) = graph.plans
    assert 0.6 * sum(plan.schedule.budget.values()) <= plan.schedule.accelerator_peak_bytes


def _decode_budgets(model: PreTrainedModel, tokens: int, **options: Any) -> list[tuple[int, int]]:
    """(bytes that went up to stay, resident bytes) of each plan of a generation.

    What the last step has started for a step that did not come is not counted, nor what was copied in vain.
    """
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    torch._dynamo.reset()
    model.compile(backend=backend, options=emulated(split=0.0, **options))
    model.generate(**prompts(1), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    schedules = new_schedules(known)
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
    model = tiny_model("opt", layers=3)
    budget = sum(parameter.nbytes for parameter in model.parameters())
    found = _decode_budgets(model, 30, gpu_memory=budget, context=64)
    uploaded, resident = found[0]
    assert resident > 0
    assert {bytes_ for _, bytes_ in found} == {resident}, "prefill and decode keep the same weights"
    assert uploaded == resident, "and each of them went up once"
    assert len(found) == 2, "prefill and decode"


def test_a_cache_beyond_what_was_stated_takes_the_place_of_weights() -> None:
    model = tiny_model("llama", layers=3)
    budget = sum(parameter.nbytes for parameter in model.parameters()) * 3 // 4
    found = _decode_budgets(model, 60, gpu_memory=budget, context=10)
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


# ---- several models on one accelerator -------------------------------------------------------------------------


def _two_models(budget: int, layers: int = 4) -> tuple[list[Mlp], RecordingBackend]:
    """Of one class: Dynamo lets them share one compiled graph if they have as many layers."""
    torch.manual_seed(0)
    models, backend = [Mlp(4, 128).eval(), Mlp(layers, 128).eval()], RecordingBackend()
    options = emulated(gpu_memory=budget, split=0.0, seed=1)
    for model in models:
        model.compile(backend=backend, options=options)
    return models, backend


@pytest.mark.parametrize(("layers", "graphs"), [(4, 1), (5, 2)])
def test_two_models_share_a_budget_and_do_not_thrash(layers: int, graphs: int) -> None:
    weights = 4 * 128 * 128 * 4
    models, backend = _two_models(weights, layers)
    x, known = random(2, 128), hetegen_compile.schedules()
    uploaded = []
    with torch.no_grad():
        expected = [model.forward(x) for model in models]
        for _ in range(4):
            for model, right in zip(models, expected, strict=True):
                torch.testing.assert_close(model(x), right, rtol=1e-4, atol=1e-5)
                uploaded.append(backend.accelerator.counters.uploaded_bytes["weights"])
    assert len(backend.graphs) == graphs
    schedules = new_schedules(known)[-2:]
    assert all(schedule.resident_bytes > weights // 5 for schedule in schedules)
    steps = [after - before for before, after in zip(uploaded[3:], uploaded[4:], strict=False)]
    assert set(steps) == {schedule.streamed_bytes for schedule in schedules}, "resident weights stay where they are"
    assert backend.accelerator.counters.peak_bytes <= weights


def test_a_longer_staging_ring_takes_the_place_of_mirrors() -> None:
    """Mirrors of what the caller keeps fill the budget when a model of wider Linears comes."""
    budget = 700 << 10
    narrow, wide, backend = around(_with_a_table), Mlp(3, 256).eval(), RecordingBackend()
    options = emulated(gpu_memory=budget)
    for model in (narrow, wide):
        model.compile(backend=backend, options=options)
    tables, x, y = [random(128, 64, seed=i) for i in range(budget // (128 * 64 * 4))], random(2, 64), random(2, 256)
    with torch.no_grad():
        for table in tables:
            torch.testing.assert_close(narrow(x, table), narrow.forward(x, table), rtol=1e-4, atol=1e-5)
        held, ring = dict(backend.accelerator.counters.held_bytes), backend.graphs[0].runtime.ledger.ring_bytes
        torch.testing.assert_close(wide(y), wide.forward(y), rtol=1e-4, atol=1e-5)
    longer = backend.graphs[0].runtime.ledger.ring_bytes - ring
    assert sum(held.values()) + longer > budget, "they leave room enough"
    assert backend.accelerator.counters.held_bytes["mirrors"] < held["mirrors"]
    assert backend.accelerator.counters.peak_bytes <= budget


def _with_a_table(before: Linear, after: Linear, x: Tensor, table: Tensor) -> Tensor:
    return after(before(x) + table.sum(0))


def test_forwards_by_turns_do_not_thrash_beside_a_devices_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device's libraries take of the budget is no room for the larger of two steps."""
    overhead, weights = 1 << 20, 4 * 128 * 128 * 4
    monkeypatch.setattr(EmulatedAccelerator, "overhead_bytes", lambda self: {"workspace of a library": overhead})
    model, backend, known = Mlp(4, 128).eval(), RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=overhead + weights, split=0.0), dynamic=True)
    with torch.no_grad():
        for x in 3 * [random(48, 128), random(2, 128)]:
            torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    many, few = new_schedules(known)  # and none was made again
    assert many.resident_bytes == few.resident_bytes > 0
    assert few.budget[OTHERS] > weights // 10
    assert backend.accelerator.counters.peak_bytes <= weights


def test_another_split_is_planned_with_what_is_resident_now() -> None:
    """What was decided for the first model holds no longer when the second has come."""
    models, backend = _two_models(4 * 128 * 128 * 4, layers=5)
    x, known = random(2, 128), hetegen_compile.schedules()
    with torch.no_grad():
        expected = models[0].forward(x)
        for model in models:
            model(x)
        alone, shared = (schedule.resident_bytes for schedule in new_schedules(known))
        with hetegen_compile.override_split(0.5):
            found = models[0](x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    half = new_schedules(known)[-1]
    assert half.split == 0.5
    assert half.host_bytes > 0
    assert 0 < half.resident_bytes < alone, "the two share what one had"
    assert shared > 0
    assert backend.accelerator.counters.peak_bytes <= 4 * 128 * 128 * 4


def test_a_model_that_is_gone_leaves_its_room() -> None:
    weights = 4 * 128 * 128 * 4
    models, backend = _two_models(weights)
    x, known = random(2, 128), hetegen_compile.schedules()
    with torch.no_grad():
        for _ in range(2):
            for model in models:
                model(x)
        shared = new_schedules(known)[-1].resident_bytes
        del models[1], model
        gc.collect()
        models[0](random(1, 128))
    assert new_schedules(known)[-1].tokens == (1, 1)
    assert new_schedules(known)[-1].resident_bytes > 1.5 * shared
    assert backend.accelerator.counters.peak_bytes <= weights


def test_a_model_that_is_compiled_again_has_its_new_budget() -> None:
    """Dynamo keeps the graphs of the compilation before; whoever calls them has the smaller budget hold again."""
    model, x, weights = Mlp(6, 128).eval(), random(2, 128), 6 * 128 * 128 * 4
    expected, backend, resident = model(x).detach(), RecordingBackend(), []
    compiled = []

    def run(step: Any, graph: int, budget: int) -> None:
        with torch.no_grad():
            torch.testing.assert_close(step(x), expected, rtol=1e-4, atol=1e-5)
        (plan,) = backend.graphs[graph].plans
        assert plan.schedule.budget_bytes == budget
        assert plan.schedule.accelerator_peak_bytes <= budget
        resident.append(plan.schedule.resident_bytes)

    budgets = [weights // 2, weights * 9 // 10, weights * 4 // 10]
    for graph, budget in enumerate(budgets):
        options = emulated(gpu_memory=budget, split=0.0, seed=2)
        compiled.append(torch.compile(model, backend=backend, options=options))
        run(compiled[graph], graph, budget)
    assert resident[2] < resident[0] < resident[1]
    run(compiled[1], 1, budgets[2])
    run(compiled[2], 2, budgets[2])
    assert len(backend.graphs) == 3
    assert backend.accelerator.counters.uploaded_bytes["weights"] > weights


def test_the_smaller_of_two_budgets_holds_for_both() -> None:
    weights = 4 * 128 * 128 * 4
    models, backend = [Mlp(4, 128).eval(), Mlp(5, 128).eval()], RecordingBackend()
    for model, budget in zip(models, (4 * weights, weights), strict=True):
        model.compile(backend=backend, options=emulated(gpu_memory=budget, split=0.0, seed=1))
    x, known = random(2, 128), hetegen_compile.schedules()
    with torch.no_grad():
        models[0](x)
        (first,) = new_schedules(known)
        for model in reversed(models):
            model(x)
        held = backend.accelerator.counters.held_bytes
        second, again = new_schedules((*known, first))
        assert first.whole_graph
        assert first.accelerator_peak_bytes > weights
        assert max(second.accelerator_peak_bytes, again.accelerator_peak_bytes) <= weights
        assert sum(held.values()) <= weights
        assert again.budget_bytes == weights


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
    inner = MemoryNeed(tuple(inner_lives(segment)), {})
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
@pytest.mark.parametrize("compiler", [plain_compiler, inductor_compiler])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_segments_allocate_no_more_than_planned(architecture: str, compiler: Any) -> None:
    model, inputs, measured = tiny_model(architecture), prompts(4), MeasuredSegments(compiler)
    needed = needed_bytes(model, lambda: forward(model, inputs))
    torch._dynamo.reset()
    model.compile(backend=RecordingBackend(measured), options=emulated(gpu_memory=needed, seed=changing_seed()))
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
    expected = forward(model, inputs)
    needed = needed_bytes(model, lambda: forward(model, inputs))
    peak_bytes = MemoryNeed.peak_bytes
    monkeypatch.setattr(MemoryNeed, "peak_bytes", lambda need, nbytes: peak_bytes(need, nbytes) * 3 // 4)
    torch._dynamo.reset()
    backend = RecordingBackend()
    budget = needed * 5 // 4
    model.compile(backend=backend, options=emulated(gpu_memory=budget))
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
