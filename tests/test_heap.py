"""The garbage collector is as it was after a compilation, also after one that fails."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from hetegen_compile.backend import make_backend
from hetegen_compile.errors import BudgetError
from hetegen_compile.heap import large_heap
from hetegen_compile.segments import plain_compiler
from hetegen_compile.step_plans import StepPlans


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.up(x)
        return result


def collector() -> tuple[object, ...]:
    return (*gc.get_threshold(), gc.get_freeze_count(), gc.isenabled())


@pytest.mark.parametrize(("budget", "works"), [(1 << 16, True), (16, False)])
def test_a_compilation_leaves_the_collector_as_it_was(
    budget: int, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, meanwhile = collector(), []
    make = StepPlans._make

    def noted(*arguments: object) -> object:
        meanwhile.append(collector())
        return make(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StepPlans, "_make", noted)
    options: dict[str, Any] = {"accelerator": "emulated", "gpu_memory": budget, "print_schedule": False}
    compiled = torch.compile(Mlp(), backend=make_backend(plain_compiler), options=options)
    with torch.no_grad():
        if works:
            compiled(torch.ones(1, 64))
        else:
            with pytest.raises(BudgetError):
                compiled(torch.ones(1, 64))
    assert collector() == before
    assert meanwhile
    assert all(one != before for one in meanwhile)


def test_what_the_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with large_heap():
            pass
        assert gc.get_freeze_count() >= count - 10  # a few may have died
    finally:
        gc.unfreeze()
