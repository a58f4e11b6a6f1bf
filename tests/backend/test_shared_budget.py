"""Several models, or one compiled again, share a budget: nobody thrashes, and who is gone leaves its room."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hetegen_compile
from hetegen_compile.accelerators.emulated import EmulatedAccelerator
from hetegen_compile.cost_model import load_profile, profile_to_json
from hetegen_compile.errors import BudgetError
from hetegen_compile.passes.plans import OTHERS
from tests.backend.modules import Linear, Mlp, around, random
from tests.backend.test_deleted_models import breaks_in_a_helper
from tests.models.harness import RecordingBackend, emulated, new_schedules


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


def test_a_model_of_several_graphs_that_is_compiled_again_has_its_new_budget() -> None:
    """The first of its new graphs shares no weight with the others, which state the old budget."""
    model, backend = around(breaks_in_a_helper), RecordingBackend()
    with torch.no_grad():
        for budget, tokens in ((24 << 10, 2), (400 << 10, 200)):
            model._compiled_call_impl = None
            model.compile(backend=backend, options=emulated(gpu_memory=budget, seed=1))
            x = random(tokens, 64)
            torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    assert len(backend.graphs) > 3
    assert backend.accelerator.counters.uploaded_bytes["weights"] > 0
    assert 24 << 10 < backend.accelerator.counters.peak_bytes <= 400 << 10


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


def test_auto_and_the_accelerator_that_it_means_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights, x, backend = 4 * 128 * 128 * 4, random(2, 128), RecordingBackend()
    models = [Mlp(4, 128).eval(), Mlp(5, 128).eval()]
    for model, accelerator in zip(models, ("auto", "emulated"), strict=True):
        model.compile(backend=backend, options=emulated(accelerator=accelerator, gpu_memory=weights, seed=1))
    with torch.no_grad():
        for model in models:
            torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    assert backend.accelerator.counters.peak_bytes <= weights


def test_an_emulated_accelerator_is_of_one_machine(tmp_path: Path) -> None:
    """Another profile is another machine, though its accelerator has as much memory."""
    profile, path = load_profile("cpu-emulated"), tmp_path / "slower.json"
    path.write_text(json.dumps(profile_to_json(replace(profile, synchronise_s=1e-3))))
    backend, x, weights = RecordingBackend(), random(2, 128), 4 * 128 * 128 * 4
    models = [Mlp(layers, 128).eval() for layers in (4, 5, 6)]
    for model, hardware in zip(models, ("cpu-emulated", str(path), "auto"), strict=True):
        model.compile(backend=backend, options=emulated(hardware=hardware, gpu_memory=weights, seed=1))
    with torch.no_grad():
        for model in models:
            torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    one, slower, again = (graph.runtime for graph in backend.graphs)
    assert one is again is not slower
    assert one.accelerator.counters.peak_bytes <= weights


def test_an_error_says_that_another_models_budget_is_too_small() -> None:
    models, backend = [Mlp(2).eval(), Mlp(2, 128).eval()], RecordingBackend()
    for model, budget in zip(models, (24 << 10, 1 << 20), strict=True):
        model.compile(backend=backend, options=emulated(gpu_memory=budget, seed=1))
    with torch.no_grad():
        models[0](random(2, 64))
        told = r"This one's is 1.00 MiB; 24.00 KiB is that of the model of \S+weight: compile that one with more"
        with pytest.raises(BudgetError, match=told) as raised:
            models[1](random(2, 128))
        assert "set options" not in str(raised.value), "which would change nothing"
        del models[0]  # with its model the smaller budget goes, too
        gc.collect()
        torch.testing.assert_close(models[0](random(2, 128)), models[0].forward(random(2, 128)))
