"""Memory that other models had and have no longer is used by those that go on, and nothing is planned for ever."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.passes.claims import weight_key
from hetegen_compile.planning.planner import Planner
from hetegen_compile.reports.schedule import Schedule
from tests.backend.modules import Linear, Mlp, around, plain, random
from tests.models.harness import RecordingBackend, emulated

WIDTH, ROWS = 128, 2048
WEIGHT_BYTES, TABLE_BYTES = WIDTH * WIDTH * 4, ROWS * WIDTH * 4


class WithTable(nn.Module):
    """An embedding table, of which one row is read, before some Linears."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.table, self.mlp = nn.Embedding(ROWS, WIDTH), Mlp(layers, WIDTH)

    def forward(self, ids: Tensor) -> Any:
        return self.mlp(self.table(ids))


def current(backend: RecordingBackend, model: nn.Module) -> Schedule:
    """The schedule that the model's steps have now."""
    storages = {weight_key(one).storage for one in model.parameters()}
    (found,) = (plan for graph in backend.graphs for (part, _), plan in graph._open()._plans.items()
                if part[1] in storages and plan.epoch == graph.runtime.ledger.epoch)  # fmt: skip
    return found.schedule


def in_turns(models: Sequence[nn.Module], x: Tensor, rounds: int = 3) -> None:
    with torch.no_grad():
        for _ in range(rounds):
            for model in models:
                torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)


def counted_decisions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    decided: list[str] = []
    for name in ("plan_bucket", "decide_again"):
        plan = getattr(Planner, name)

        def noted(self: Planner, *given: Any, plan: Any = plan, name: str = name) -> Any:
            decided.append(name)
            return plan(self, *given)

        monkeypatch.setattr(Planner, name, noted)
    return decided


def test_a_plan_of_a_time_when_another_model_had_the_memory_is_made_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has its table on the accelerator while it is alone, and not beside the second."""
    decided, (first, second) = counted_decisions(monkeypatch), (WithTable(4).eval(), WithTable(5).eval())
    ids, backend = torch.tensor([[1, 2]]), RecordingBackend()
    options = emulated(gpu_memory=TABLE_BYTES + 5 * WEIGHT_BYTES, split="auto", seed=1)
    for model in (first, second):
        model.compile(backend=backend, options=options)
        in_turns([model], ids, 1)
    assert current(backend, second).resident_bytes < 3 * WEIGHT_BYTES
    in_turns([first, second], ids)
    assert decided == ["plan_bucket", "plan_bucket", "decide_again", "decide_again"]
    assert [current(backend, one).resident_bytes for one in (first, second)] == [4 * WEIGHT_BYTES, 5 * WEIGHT_BYTES]
    assert backend.accelerator.counters.peak_bytes <= options["gpu_memory"]


def test_the_ring_of_a_model_that_is_gone_does_not_stay() -> None:
    """Nor by plans that the other model has for other numbers of tokens, and that are out of date as well."""
    narrow, wide, backend = Mlp(7, 128).eval(), Mlp(3, 256).eval(), RecordingBackend()
    few, many = random(2, 128), random(9, 128)
    options = emulated(gpu_memory=400 << 10, split="auto", seed=1)
    narrow.compile(backend=backend, options=options, dynamic=True)
    in_turns([narrow], many, 1)
    in_turns([narrow], few, 1)
    ledger = backend.graphs[0].runtime.ledger
    alone = ledger.ring_bytes
    wide.compile(backend=backend, options=options)
    in_turns([wide], random(2, 256), 1)
    for x in (many, few):
        in_turns([narrow], x, 1)
    assert ledger.ring_bytes > alone > 0
    del wide
    gc.collect()
    in_turns([narrow], many, 1)
    assert ledger.ring_bytes == backend.accelerator.counters.held_bytes["slots"] == alone


def test_a_model_whose_planning_was_interrupted_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while somebody keeps the traceback, as an interactive shell does."""
    first, second, backend, x = Mlp(4, 128).eval(), Mlp(5, 128).eval(), RecordingBackend(), random(2, 128)
    for model in (first, second):
        model.compile(backend=backend, options=emulated(gpu_memory=3 * WEIGHT_BYTES, split="auto", seed=1))
    in_turns([first], x, 1)
    alone = current(backend, first).resident_bytes

    def ctrl_c(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Planner, "plan_split", ctrl_c)
        with pytest.raises(KeyboardInterrupt) as kept:
            in_turns([second], x, 1)
    in_turns([first], x)
    assert kept.value.__traceback__ is not None
    assert current(backend, first).resident_bytes == alone
    in_turns([second, first], x)  # it works, too
    assert current(backend, first).resident_bytes < alone
    assert backend.accelerator.counters.peak_bytes <= 3 * WEIGHT_BYTES


def test_a_lower_budget_holds_in_its_first_step() -> None:
    """What the first model's caller keeps there leaves before it begins, though the ring is as long as it was."""
    first, second, backend, x = around(_with_a_table), around(plain), RecordingBackend(), random(2, 64)
    tables, lower = [random(256, 64, seed=i) for i in range(10)], 256 << 10
    first.compile(backend=backend, options=emulated(gpu_memory=1 << 20, seed=1))
    second.compile(backend=backend, options=emulated(gpu_memory=lower, seed=1))
    with torch.no_grad():
        for table in tables:
            torch.testing.assert_close(first(x, table), first.forward(x, table), rtol=1e-4, atol=1e-5)
    ledger = backend.graphs[0].runtime.ledger
    assert backend.accelerator.counters.held_bytes["mirrors"] > lower
    ring = ledger.ring_bytes
    in_turns([second], x, 1)
    assert ledger.ring_bytes == ring > 0
    assert current(backend, second).accelerator_peak_bytes <= lower


def _with_a_table(before: Linear, after: Linear, x: Tensor, table: Tensor) -> Tensor:
    return after(before(x)) + table.sum(0)
