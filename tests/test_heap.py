"""The garbage collector looks seldom at what a block makes, and is as it was behind it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hetegen_compile import heap
from hetegen_compile.backend import make_backend
from hetegen_compile.errors import BudgetError
from hetegen_compile.heap import large_heap
from hetegen_compile.steps.segments import plain_compiler
from hetegen_compile.steps.step_plans import StepPlans


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.up(x)
        return result


@pytest.fixture(autouse=True)
def as_in_a_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No block has begun and nothing is frozen.

    Python 3.12 freezes objects of its own when it starts, and ``tests/conftest.py`` what was there by then, within a
    block around all tests; it does so again behind this module.
    """
    monkeypatch.setattr(heap, "_blocks", [])
    before = gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def collector() -> tuple[object, ...]:
    """Not how many objects are frozen: some of them end meanwhile."""
    return (*gc.get_threshold(), gc.get_freeze_count() > 0, gc.isenabled())


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


def test_the_collector_is_as_before_once_the_block_is_over() -> None:
    before = gc.get_threshold()
    with large_heap():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold()[0] >= before[0]
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)


def test_what_the_interpreter_froze_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 begins with 375 frozen objects."""
    frozen: list[int] = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    with large_heap():
        assert frozen == [1]


def test_objects_that_the_program_froze_stay_frozen() -> None:
    gc.freeze()
    try:
        with large_heap():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


FORK = """
import gc, os, sys, threading
from hetegen_compile.heap import large_heap
before, begun, over = gc.get_threshold(), threading.Event(), threading.Event()

def plan():
    with large_heap():
        begun.set()
        over.wait()

threading.Thread(target=plan).start()
begun.wait()
child = os.fork()
if child == 0:
    as_before = (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
    with large_heap():
        frozen = gc.get_freeze_count() > 0
    os._exit(0 if as_before and frozen and gc.get_freeze_count() == 0 else 1)
over.set()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_child_of_a_fork_is_not_in_another_threads_block() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_collector_that_is_switched_off_stays_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with large_heap():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_blocks_of_two_threads_may_overlap() -> None:
    """The first to begin is the first to end; the other one still counts on few collections."""
    before, entered, leave = collector(), threading.Event(), threading.Event()
    meanwhile: list[tuple[object, ...]] = []

    def other() -> None:
        with large_heap():
            entered.set()
            leave.wait(10)
            meanwhile.append(collector())

    with large_heap():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
    inside = collector()
    leave.set()
    thread.join()
    assert meanwhile == [inside]
    assert inside != before
    assert collector() == before
