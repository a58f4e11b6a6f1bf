"""What a new operation needs is one line of the verifier's table: carried prefetches, staging.

The operations here are the tests' own, put into the table for one test.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hetegen_compile import ir
from hetegen_compile.errors import MissingWaitError, ScheduleError, SlotInUseError
from hetegen_compile.ir import PREFETCH, RELEASE, TO_ACCELERATOR, WAIT, WAIT_ACCELERATOR, annotate, info
from hetegen_compile.passes.happens_before import OPERATIONS, STAGE, Gives, Operation
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import Case, again, halves, quarters, scheduled

LAYERS = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
X = torch.randn(1, 64)
SLOT = 16 * 64 * 4


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


def siblings(x: Tensor) -> Tensor:
    result: Tensor = LAYERS[0](x) * LAYERS[1](x)
    return result


def operation(name: str) -> Any:
    """A function that stands for an operation of the IR, named as operators are."""

    def call(*args: Any) -> Any:
        raise AssertionError("never executed")

    call.__name__ = call.__qualname__ = name
    return call


CARRIED, AHEAD, STAGED = map(operation, ("carried", "ahead", "stage"))


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = OPERATIONS[PREFETCH]
    monkeypatch.setitem(OPERATIONS, CARRIED, replace(fill, waits=(), carried="in"))
    monkeypatch.setitem(OPERATIONS, AHEAD, replace(fill, ended_by=(), carried="out"))
    monkeypatch.setitem(
        OPERATIONS, STAGED,
        Operation(
            STAGE, ("host",), waits=(4,), waits_for=(PREFETCH,), gives=Gives.SLOT, ring="own", ended_by=(PREFETCH,)
        ),
    )  # fmt: skip
    monkeypatch.setitem(
        OPERATIONS, PREFETCH, replace(fill, waits_for=(RELEASE, STAGED), frees=True, precedes=(STAGED,))
    )
    for target in (WAIT, RELEASE):
        waits_for = (*OPERATIONS[target].waits_for, CARRIED)
        monkeypatch.setitem(OPERATIONS, target, replace(OPERATIONS[target], waits_for=waits_for))


def check(found: Case) -> None:
    verify(found.module, found.context)


# ---- prefetches carried over the end of a step -------------------------------------------------------------------


@pytest.fixture
def carrying() -> Case:
    """The first of six prefetches comes from the step before, and is started again at the end."""
    found = scheduled(chain, X, plan=quarters, ring_bytes=2 * SLOT)
    graph, first = found.module.graph, found.nodes(PREFETCH)[0]
    last = next(n for n in reversed(found.nodes(PREFETCH)) if n.args[3] == first.args[3])
    (release,) = [user for user in last.users if user.target == RELEASE]
    with graph.inserting_before(first):
        carried = annotate(graph.call_function(CARRIED, tuple(first.args[:4])), info(first))
    first.replace_all_uses_with(carried)
    graph.erase_node(first)
    with graph.inserting_after(release):
        annotate(graph.call_function(AHEAD, (*carried.args, [release])), info(carried))
    return found


def test_a_carried_prefetch_is_valid(carrying: Case) -> None:
    check(carrying)
    assert len(carrying.nodes(CARRIED)) == len(carrying.nodes(AHEAD)) == 1


def test_nothing_is_started_for_the_next_step(carrying: Case) -> None:
    carrying.module.graph.erase_node(carrying.nodes(AHEAD)[0])
    with pytest.raises(ScheduleError, match="carried .*is carried over the end of the step on one side only"):
        check(carrying)


def test_other_bytes_than_the_next_step_takes(carrying: Case) -> None:
    carrying.nodes(AHEAD)[0].update_arg(1, [32, 48])
    with pytest.raises(ScheduleError, match="on one side only"):
        check(carrying)


def test_the_next_steps_bytes_are_still_read(carrying: Case) -> None:
    carrying.nodes(AHEAD)[0].update_arg(4, [])
    with pytest.raises(SlotInUseError, match="ahead .*overwrites the slot of .* without waiting for its release"):
        check(carrying)


def test_a_prefetch_before_what_the_step_begins_with(carrying: Case) -> None:
    (carried,), second = carrying.nodes(CARRIED), carrying.nodes(PREFETCH)[0]
    carried.prepend(second)
    with pytest.raises(ScheduleError, match=f"carried .*a slot is filled first; missing edge: carried -> {second}"):
        check(carrying)


def test_this_step_reads_what_is_for_the_next(carrying: Case) -> None:
    (ahead,) = carrying.nodes(AHEAD)
    with carrying.module.graph.inserting_after(ahead):
        carrying.module.graph.call_function(WAIT, (ahead,))
    with pytest.raises(MissingWaitError, match="wait.* uses ahead"):
        check(carrying)


# ---- rows through a pinned ring ----------------------------------------------------------------------------------


@pytest.fixture
def staging() -> Case:
    """Every prefetch reads a pinned slot that another thread fills; the pinned ring has two slots."""
    found = scheduled(chain, X, plan=quarters, ring_bytes=2 * SLOT)
    graph, prefetches = found.module.graph, found.nodes(PREFETCH)
    for i, prefetch in enumerate(prefetches):
        weight, ranges, dim, _, _ = prefetch.args
        after = prefetches[i - 2 : i - 1] if i >= 2 else []
        with graph.inserting_before(prefetch):
            stage = annotate(graph.call_function(STAGED, (weight, ranges, dim, i % 2 * SLOT, after)), info(prefetch))
        annotate(stage, side=None)
        prefetch.update_arg(0, stage)
        prefetch.update_arg(1, [0, 16])
    return found


def test_a_staged_schedule_is_valid(staging: Case) -> None:
    check(staging)
    assert len(staging.nodes(STAGED)) == 6


@pytest.mark.parametrize("i", range(2, 6))
def test_a_pinned_slot_is_filled_before_it_was_read(staging: Case, i: int) -> None:
    stage, read = staging.nodes(STAGED)[i], staging.nodes(PREFETCH)[i - 2]
    stage.update_arg(4, [])
    with pytest.raises(SlotInUseError, match=f"{stage} .*without waiting for its release; missing edge: {read}"):
        check(staging)


def test_a_prefetch_that_does_not_read_what_was_staged(staging: Case) -> None:
    stage, prefetch = staging.nodes(STAGED)[0], staging.nodes(PREFETCH)[0]
    prefetch.update_arg(0, stage.args[0])
    with pytest.raises(ScheduleError, match=f"{stage} .*has 0"):
        check(staging)


# ---- several values in one upload --------------------------------------------------------------------------------


@pytest.fixture
def packed() -> Case:
    """The host parts of two Linears go up together."""
    return scheduled(siblings, X, plan=halves)


def test_a_packed_upload_is_valid(packed: Case) -> None:
    check(packed)
    (up,) = packed.nodes(TO_ACCELERATOR)
    assert [value.target for value in up.args[0]] == [ir.HOST_LINEAR] * 2


def test_an_item_of_a_packed_upload_without_the_wait(packed: Case) -> None:
    (up,), (wait,) = packed.nodes(TO_ACCELERATOR), packed.nodes(WAIT_ACCELERATOR)
    item = next(n for n in packed.nodes(operator.getitem) if n.args[0] is wait)
    item.update_arg(0, up)
    with pytest.raises(MissingWaitError, match=f"{item} .*uses {up} .*without a wait.*wait_accelerator"):
        check(packed)


def test_an_item_that_is_written_while_all_of_them_are_lent(packed: Case) -> None:
    (up,) = packed.nodes(TO_ACCELERATOR)
    last = up.args[0][-1]
    with packed.module.graph.inserting_after(up):
        write = packed.module.graph.call_method("zero_", (last,))
    annotate(last, storages=frozenset({1 << 40}))
    annotate(write, side="host", writes=frozenset({1 << 40}), position=10**6)
    with pytest.raises(MissingWaitError, match=f"{write} writes what {up} .*lent to the accelerator"):
        check(packed)


def test_a_prefetch_along_the_columns_fills_as_many_bytes() -> None:
    found = again(scheduled(chain, X, plan=quarters, ring_bytes=2 * SLOT))
    prefetch: fx.Node = found.nodes(PREFETCH)[0]
    prefetch.update_arg(2, 1)
    with pytest.raises(ScheduleError, match="is the part 16:32, but reads 0:64 of"):  # the slot is as large
        check(found)
    prefetch.update_arg(1, [0, 40])
    with pytest.raises(ScheduleError, match=f"{prefetch} .*fills bytes 0 to {40 * 64 * 4} of a staging ring of"):
        check(found)
