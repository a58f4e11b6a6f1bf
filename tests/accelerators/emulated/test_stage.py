"""Staging on the emulated accelerator: results, bytes, order, and the rules that are checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.errors import AcceleratorError, MissingWaitError, ScheduleError, SlotInUseError

ROWS, WIDTH = 8, 64
SLOT_BYTES = ROWS * WIDTH * 4


@pytest.fixture
def accelerator() -> Iterator[EmulatedAccelerator]:
    """With random delays, two slots on the accelerator and two pinned ones."""
    accelerator = EmulatedAccelerator(1 << 28, seed=1)
    accelerator.reserve_ring(2 * SLOT_BYTES)
    accelerator.reserve_pinned(2 * SLOT_BYTES)
    yield accelerator
    accelerator.close()


class Rings:
    """Two slots of each ring, and one weight's way through both."""

    def __init__(self, accelerator: EmulatedAccelerator) -> None:
        shape = (ROWS, WIDTH)
        self.accelerator = accelerator
        self.pinned = [accelerator.pinned_slot(i * SLOT_BYTES, shape, torch.float32) for i in range(2)]
        self.device = [accelerator.slot(i * SLOT_BYTES, shape, torch.float32) for i in range(2)]

    def step(self, weights: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        acc = self.accelerator
        acc.begin_step()
        value = acc.upload(Op("x"), x)
        fetched: list[Any] = []
        tokens: list[Any] = []
        results: list[Any] = []
        for i, weight in enumerate(weights):
            stage = acc.stage(Op(f"s{i}", category="weights"), weight, self.pinned[i % 2], fetched[-2:-1])
            fetched.append(acc.prefetch(Op(f"w{i}", category="weights"), stage, self.device[i % 2], tokens[-2:-1]))
            results.append(acc.launch(Op(f"y{i}"), F.linear, (value, acc.wait(Op(f"a{i}"), fetched[-1]))))
            tokens.append(acc.release(Op(f"r{i}"), fetched[-1]))
        downloads = [acc.download(Op(f"d{i}"), result) for i, result in enumerate(results)]
        acc.end_step()
        return downloads


@pytest.fixture
def rings(accelerator: EmulatedAccelerator) -> Rings:
    return Rings(accelerator)


@pytest.fixture
def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(7)]


def test_many_weights_through_two_slots(rings: Rings, weights: list[torch.Tensor]) -> None:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for result, weight in zip(rings.step(weights, x), weights, strict=True):
            torch.testing.assert_close(result, F.linear(x, weight))
    counters = rings.accelerator.counters
    assert counters.staged_bytes == {"weights": 3 * 7 * SLOT_BYTES}
    assert counters.uploaded_bytes["weights"] == 3 * 7 * SLOT_BYTES
    assert rings.accelerator.pinned_bytes == 2 * SLOT_BYTES


def test_stages_have_a_lane_of_their_own(rings: Rings, weights: list[torch.Tensor]) -> None:
    rings.accelerator.trace(True)
    rings.step(weights[:2], torch.ones(1, WIDTH))
    spans = {span.name: span for span in rings.accelerator.trace(False)}
    assert [spans[name].resource for name in ("s0", "w0", "s1")] == ["pin", "up", "pin"]
    assert spans["s0"].end_s <= spans["w0"].start_s


def test_a_pinned_slot_is_poisoned_once_it_was_read(rings: Rings, weights: list[torch.Tensor]) -> None:
    acc = rings.accelerator
    acc.begin_step()
    stage = acc.stage(Op("s"), weights[0], rings.pinned[0], ())
    acc.prefetch(Op("w"), stage, rings.device[0], ())
    acc.synchronize()
    assert acc._prefetches.pinned.view(rings.pinned[0]).isnan().all()


def test_overwriting_a_pinned_slot_that_nobody_read(rings: Rings, weights: list[torch.Tensor]) -> None:
    rings.accelerator.stage(Op("first"), weights[0], rings.pinned[0], ())
    with pytest.raises(SlotInUseError, match="second overwrites the slot of first, which is not released"):
        rings.accelerator.stage(Op("second"), weights[1], rings.pinned[0], ())


def test_overwriting_a_pinned_slot_without_waiting_for_its_reader(rings: Rings, weights: list[torch.Tensor]) -> None:
    acc = rings.accelerator
    stage = acc.stage(Op("first"), weights[0], rings.pinned[0], ())
    fetched = acc.prefetch(Op("read"), stage, rings.device[0], ())
    with pytest.raises(SlotInUseError, match=r"second overwrites the slot of first without .* \(read\)"):
        acc.stage(Op("second"), weights[1], rings.pinned[0], ())
    acc.stage(Op("third"), weights[1], rings.pinned[0], [fetched])


def test_two_prefetches_of_one_stage(rings: Rings, weights: list[torch.Tensor]) -> None:
    acc = rings.accelerator
    stage = acc.stage(Op("s"), weights[0], rings.pinned[0], ())
    acc.prefetch(Op("one"), stage, rings.device[0], ())
    with pytest.raises(SlotInUseError, match="two reads the pinned slot of s, which one gave up already"):
        acc.prefetch(Op("two"), stage, rings.device[1], ())


def test_what_a_stage_may_be_used_for(rings: Rings, weights: list[torch.Tensor]) -> None:
    acc = rings.accelerator
    stage = acc.stage(Op("s"), weights[0], rings.pinned[0], ())
    with pytest.raises(ScheduleError, match="a waits for s, which is a stage"):
        acc.wait(Op("a"), stage)
    with pytest.raises(ScheduleError, match="r releases s, which is no prefetch"):
        acc.release(Op("r"), stage)
    with pytest.raises(MissingWaitError, match="h uses s without the wait it owes"):
        acc.host(Op("h"), torch.neg, (stage,), {})
    with pytest.raises(ScheduleError, match="s2 waits for s, which is a stage"):
        acc.stage(Op("s2"), weights[1], rings.pinned[1], [stage])
    fetched = acc.prefetch(Op("w"), stage, rings.device[0], ())
    with pytest.raises(ScheduleError, match="w2 waits for w, which is a prefetch"):
        acc.prefetch(Op("w2"), fetched, rings.device[1], ())


def test_rows_that_do_not_fit_the_pinned_slot(rings: Rings, weights: list[torch.Tensor]) -> None:
    with pytest.raises(ScheduleError, match="s copies"):
        rings.accelerator.stage(Op("s"), weights[0][1:], rings.pinned[0], ())
    with pytest.raises(ScheduleError, match="does not fit the ring of 4096"):
        rings.accelerator.pinned_slot(2 * SLOT_BYTES, (ROWS, WIDTH), torch.float32)


def test_a_failed_stage_names_its_node_and_the_next_step_works(rings: Rings, weights: list[torch.Tensor]) -> None:
    acc = rings.accelerator
    acc.begin_step()
    broken = torch.empty(ROWS, WIDTH, device="meta")
    stage = acc.stage(Op("broken"), broken, rings.pinned[0], ())
    fetched = acc.prefetch(Op("w"), stage, rings.device[0], ())
    acc.wait(Op("a"), fetched)
    with pytest.raises(AcceleratorError, match="broken failed on the accelerator"):
        acc.end_step()
    x = torch.ones(2, WIDTH)
    for result, weight in zip(rings.step(weights, x), weights, strict=True):
        torch.testing.assert_close(result, F.linear(x, weight))


def test_a_longer_pinned_ring_replaces_the_old_one(accelerator: EmulatedAccelerator) -> None:
    accelerator.reserve_pinned(8 * SLOT_BYTES)
    accelerator.reserve_pinned(SLOT_BYTES)
    assert accelerator.pinned_bytes == 8 * SLOT_BYTES
    accelerator.close()
    assert accelerator.pinned_bytes == 0


def test_memory_beyond_the_limit_is_refused_with_cudas_code() -> None:
    accelerator = EmulatedAccelerator(1 << 20, pin_limit_bytes=4096)
    fits, too_much = (torch.ones(1024) for _ in range(2))
    codes = []
    for tensor in (fits, too_much):
        storage = tensor.untyped_storage()
        codes.append(accelerator.pin(storage, storage.data_ptr(), storage.nbytes()))
    assert codes == [0, 2]
    accelerator.close()
