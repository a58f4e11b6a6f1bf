"""Prefetches for the next step on the emulated accelerator: order, NaN, failures, aborts and the end."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.accelerators.emulated.values import Transfer
from hetegen_compile.accelerators.ring import Slot
from hetegen_compile.errors import AcceleratorError, MissingWaitError, ScheduleError, SlotInUseError

ROWS = torch.arange(64.0).reshape(8, 8)
NBYTES = 256


class Gate:
    """A source whose copy waits until it is opened, so that a test decides when a copy is under way."""

    def __init__(self, accelerator: EmulatedAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.error: Exception | None = None
        real = accelerator._work.fill_slot

        def fill_slot(*args: Any) -> None:
            self.reached.set()
            assert self.opened.wait(10)
            if self.error is not None:
                raise self.error
            real(*args)

        monkeypatch.setattr(accelerator._work, "fill_slot", fill_slot)


@pytest.fixture
def slots(accelerator: EmulatedAccelerator) -> list[Slot]:
    accelerator.reserve_ring(4 * NBYTES)
    return [accelerator.slot(i * NBYTES, (8, 8), torch.float32) for i in range(4)]


@pytest.fixture
def gate(accelerator: EmulatedAccelerator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(accelerator, monkeypatch)
    yield gate
    gate.opened.set()


def one_step(accelerator: EmulatedAccelerator, slot: Slot, source: torch.Tensor = ROWS) -> Transfer:
    """A step that only starts a prefetch for the next one."""
    accelerator.begin_step()
    started = accelerator.prefetch_ahead(Op("ahead", category="weights"), source, slot, ())
    accelerator.end_step()
    return started


def use(accelerator: EmulatedAccelerator, transfer: Transfer) -> torch.Tensor:
    """What a step reads from a carried slot."""
    value = accelerator.launch(Op("neg"), torch.neg, (accelerator.wait(Op("wait"), transfer),))
    result = accelerator.download(Op("out"), value)
    accelerator.release(Op("release"), transfer)
    return result


def test_the_end_of_a_step_does_not_wait_for_it_and_the_next_reads_it(
    accelerator: EmulatedAccelerator, slots: list[Slot], gate: Gate
) -> None:
    started = one_step(accelerator, slots[0])
    assert not started.done.is_set()  # type: ignore[union-attr]
    assert accelerator.holds(started)
    accelerator.begin_step([started])
    assert not accelerator.holds(started)
    gate.opened.set()
    assert torch.equal(use(accelerator, started), -ROWS)
    accelerator.end_step()
    assert accelerator.counters.uploaded_bytes["weights"] == NBYTES
    assert accelerator._prefetches.ring.buffer.eq(255).all()


def test_other_uploads_are_waited_for(accelerator: EmulatedAccelerator, slots: list[Slot], gate: Gate) -> None:
    accelerator.begin_step()
    own = accelerator.prefetch(Op("own"), ROWS, slots[1], ())
    ahead = accelerator.prefetch_ahead(Op("ahead"), ROWS, slots[0], ())
    ended = threading.Thread(target=accelerator.end_step)
    ended.start()
    assert gate.reached.wait(10)
    ended.join(0.05)
    assert ended.is_alive()
    gate.opened.set()
    ended.join(10)
    assert not ended.is_alive()
    assert own.done.is_set()  # type: ignore[union-attr]
    assert accelerator.holds(ahead)


def test_without_a_wait_in_the_next_step(accelerator: EmulatedAccelerator, slots: list[Slot]) -> None:
    """Also once the copy happens to be over: nothing but the wait orders it."""
    started = one_step(accelerator, slots[0])
    started.done.wait()  # type: ignore[union-attr]
    accelerator.begin_step([started])
    with pytest.raises(MissingWaitError, match=r"neg uses ahead without waiting"):
        accelerator.launch(Op("neg"), torch.neg, (started.value,))
    with pytest.raises(MissingWaitError, match=r"release .* ahead"):
        accelerator.release(Op("release"), started)


def test_in_its_own_step_it_cannot_be_used(accelerator: EmulatedAccelerator, slots: list[Slot]) -> None:
    accelerator.begin_step()
    started = accelerator.prefetch_ahead(Op("ahead"), ROWS, slots[0], ())
    with pytest.raises(ScheduleError, match=r"wait waits for ahead, which is a prefetch_ahead"):
        accelerator.wait(Op("wait"), started)
    assert not accelerator.holds(started)


def test_a_slot_in_use_is_not_filled_for_the_next_step(accelerator: EmulatedAccelerator, slots: list[Slot]) -> None:
    accelerator.begin_step()
    own = accelerator.prefetch(Op("own"), ROWS, slots[0], ())
    accelerator.wait(Op("wait"), own)
    with pytest.raises(SlotInUseError, match=r"ahead overwrites the slot of own, which is not released"):
        accelerator.prefetch_ahead(Op("ahead"), ROWS, slots[0], ())
    token = accelerator.release(Op("release"), own)
    with pytest.raises(SlotInUseError, match=r"ahead overwrites the slot of own without waiting for its release"):
        accelerator.prefetch_ahead(Op("ahead"), ROWS, slots[0], ())
    assert accelerator.prefetch_ahead(Op("ahead"), ROWS, slots[0], (token,)).node == "ahead"


def test_a_carried_slot_is_overwritten_after_its_release_only(
    accelerator: EmulatedAccelerator, slots: list[Slot]
) -> None:
    started = one_step(accelerator, slots[0])
    accelerator.begin_step([started])
    with pytest.raises(SlotInUseError, match=r"fetch overwrites the slot of ahead, which is not released"):
        accelerator.prefetch(Op("fetch"), ROWS, slots[0], ())
    accelerator.wait(Op("wait"), started)
    token = accelerator.release(Op("release"), started)
    accelerator.prefetch(Op("fetch"), ROWS, slots[0], (token,))
    accelerator.end_step()


@pytest.mark.parametrize("arrived", [True, False])
def test_what_is_given_up_is_nan_and_its_bytes_may_be_overwritten(
    accelerator: EmulatedAccelerator, slots: list[Slot], gate: Gate, arrived: bool
) -> None:
    kept = one_step(accelerator, slots[0])
    given_up = accelerator.prefetch_ahead(Op("given_up"), ROWS, slots[1], ())
    if arrived:
        gate.opened.set()
        given_up.done.wait()  # type: ignore[union-attr]
    accelerator.begin_step([kept])
    with pytest.raises(ScheduleError, match=r"begin_step takes over given_up, which is not held"):
        accelerator._hazards.take_over(given_up)
    fetched = accelerator.prefetch(Op("fetch"), ROWS + 1, slots[2], ())
    gate.opened.set()
    fetched.done.wait()  # type: ignore[union-attr]
    assert torch.isnan(accelerator._prefetches.ring.view(slots[1])).all()
    assert torch.equal(accelerator._prefetches.ring.view(slots[0]), ROWS)
    with pytest.raises(SlotInUseError, match=r"late uses given_up after begin_step released its slot"):
        accelerator._hazards.use(given_up.value, accelerator._hazards.clocks.issue(1, "late"))  # type: ignore[arg-type]
    over = accelerator.prefetch(Op("over"), ROWS + 2, slots[1], ())
    assert torch.equal(use(accelerator, over), -ROWS - 2)
    accelerator.end_step()


def test_what_fails_in_the_copy_is_raised_by_the_next_step(
    accelerator: EmulatedAccelerator, slots: list[Slot], gate: Gate
) -> None:
    gate.error = OSError("the mapping is gone")
    started = one_step(accelerator, slots[0])
    accelerator.begin_step([started])
    gate.opened.set()
    accelerator.wait(Op("wait"), started)
    with pytest.raises(AcceleratorError, match=r"ahead failed .*OSError: the mapping is gone"):
        accelerator.end_step()
    gate.error = None
    again = one_step(accelerator, slots[0])
    accelerator.begin_step([again])
    assert torch.equal(use(accelerator, again), -ROWS)
    accelerator.end_step()


def test_a_failure_in_a_copy_that_is_given_up_disturbs_nobody(
    accelerator: EmulatedAccelerator, slots: list[Slot], gate: Gate
) -> None:
    gate.error = OSError("the mapping is gone")
    one_step(accelerator, slots[0])
    gate.opened.set()
    accelerator.begin_step()
    accelerator.end_step()
    accelerator.synchronize()


def fail(_: torch.Tensor) -> torch.Tensor:
    raise ValueError("boom")


@pytest.mark.parametrize("how", ["aborted", "failed", "failed between", "ring"])
def test_what_is_lost_is_not_held(accelerator: EmulatedAccelerator, slots: list[Slot], how: str) -> None:
    started = one_step(accelerator, slots[0])
    if how == "ring":
        accelerator.reserve_ring(5 * NBYTES)
    elif how == "failed between":
        value = accelerator.upload(Op("x"), torch.ones(2))
        accelerator.launch(Op("bad"), fail, (value,))
        with pytest.raises(AcceleratorError, match="bad"):
            accelerator.synchronize()
    else:
        accelerator.begin_step([started])
        started = accelerator.prefetch_ahead(Op("ahead"), ROWS, slots[1], ())
        if how == "failed":
            accelerator.launch(Op("bad"), fail, (accelerator.upload(Op("x"), torch.ones(2)),))
            with pytest.raises(AcceleratorError, match="bad"):
                accelerator.end_step()
    assert not accelerator.holds(started)
    with pytest.raises(ScheduleError, match="begin_step takes over ahead"):
        accelerator.begin_step([started])
    accelerator.begin_step()
    slot = accelerator.slot(0, (8, 8), torch.float32)
    assert torch.equal(use(accelerator, accelerator.prefetch(Op("fetch"), ROWS, slot, ())), -ROWS)
    accelerator.end_step()


def test_its_source_lives_until_the_copy_is_over(
    accelerator: EmulatedAccelerator, slots: list[Slot], gate: Gate
) -> None:
    source = ROWS.clone()
    storage = weakref.ref(source.untyped_storage())
    started = one_step(accelerator, slots[0], source)
    del source
    assert storage() is not None
    gate.opened.set()
    accelerator.begin_step([started])
    assert torch.equal(use(accelerator, started), -ROWS)
    accelerator.end_step()
    assert storage() is None


@pytest.mark.parametrize("under_way", [True, False])
def test_closing_with_a_copy_for_a_step_that_never_comes(monkeypatch: pytest.MonkeyPatch, under_way: bool) -> None:
    accelerator = EmulatedAccelerator(1 << 20)
    accelerator.reserve_ring(NBYTES)
    gate = Gate(accelerator, monkeypatch)
    one_step(accelerator, accelerator.slot(0, (8, 8), torch.float32))
    assert gate.reached.wait(10)
    if under_way:
        threading.Timer(0.05, gate.opened.set).start()
    else:
        gate.opened.set()
    accelerator.close()
    assert not any(stream.thread.is_alive() for stream in accelerator._engine._streams.values())
