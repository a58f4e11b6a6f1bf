"""The ledger of resident weights when weights are moved into other storages, as adopted ones are, or die."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.mirrors import WEIGHTS, Mirrors, Request
from hetegen_compile.passes.claims import Claim, weight_key
from hetegen_compile.passes.plans import ACTIVATIONS, Residency
from hetegen_compile.residency import OtherPlans, ResidencyLedger

ROW_BYTES = 64 * 4


@pytest.fixture
def accelerator() -> Iterator[EmulatedAccelerator]:
    opened = EmulatedAccelerator(1 << 20)
    yield opened
    opened.close()


class Owner:
    """Somebody's plans."""


def enter(
    ledger: ResidencyLedger, owner: Owner, part: str, weight: Tensor, first: int, anchor: StorageWeakRef | None = None,
    step_bytes: int = 0,
) -> None:  # fmt: skip
    key = weight_key(weight)
    claim = Claim(key, len(weight), 0, ROW_BYTES, gain_s_per_byte=1.0)
    budget = {ACTIVATIONS: step_bytes}
    residency = Residency({"w": first}, 0, 0, budget, claims=(claim,), first_rows={key: first})
    ledger.enter(owner, part, residency, 1 << 20, anchor)


def resident(mirrors: Mirrors, weight: Tensor, first: int) -> Any:
    mirrors.begin_step()
    (value,) = mirrors.fetch([Request(weight.detach()[first:], "w", WEIGHTS, watched=True)], 1 << 20)
    return value


def test_rows_of_a_moved_weight_leave_when_another_plan_wants_others(accelerator: EmulatedAccelerator) -> None:
    """Otherwise they would stay beside the new ones, kept by plan, and exceed what the plans counted on."""
    mirrors = Mirrors(accelerator)
    ledger, owner, weight = ResidencyLedger(mirrors), Owner(), torch.nn.Parameter(torch.ones(64, 64))
    enter(ledger, owner, "prefill", weight, 32)
    old = weight.untyped_storage()
    weight.data = weight.data.clone()  # as adoption does
    ledger.storages_moved({int(old._cdata): int(weight.untyped_storage()._cdata)})
    assert ledger.has([(weight_key(weight), 32)], 0)
    assert [claim.key for claims in ledger.others(owner, "decode").claims() for claim in claims] == [weight_key(weight)]
    resident(mirrors, weight, 32)
    assert mirrors.held_bytes(WEIGHTS) == ledger.resident_bytes == 32 * ROW_BYTES
    enter(ledger, owner, "decode", weight, 16)
    resident(mirrors, weight, 16)
    assert mirrors.held_bytes(WEIGHTS) == ledger.resident_bytes == 48 * ROW_BYTES


def test_plans_look_again_after_a_move(accelerator: EmulatedAccelerator) -> None:
    ledger, owner, weight = ResidencyLedger(Mirrors(accelerator)), Owner(), torch.ones(64, 64)
    enter(ledger, owner, "prefill", weight, 32)
    epoch = ledger.epoch
    ledger.storages_moved({int(weight.untyped_storage()._cdata): 1})
    assert ledger.epoch > epoch
    assert not ledger.has([(weight_key(weight), 32)], 0)


def test_who_planned_for_a_model_that_is_gone_hears_of_it_whoever_plans_next(accelerator: EmulatedAccelerator) -> None:
    ledger, owner, other = ResidencyLedger(Mirrors(accelerator)), Owner(), Owner()
    weight, kept = torch.ones(64, 64), torch.ones(64, 64)
    enter(ledger, owner, "of the gone", weight, 32, StorageWeakRef(weight.untyped_storage()))
    enter(ledger, owner, "of the kept", kept, 32, StorageWeakRef(kept.untyped_storage()))
    del weight
    claims = ledger.others(other, "another's").claims()
    assert [claim.key for graph in claims for claim in graph] == [weight_key(kept)]
    enter(ledger, other, "another's", kept, 16)
    assert ledger.take_dead_parts(other) == []
    assert ledger.take_dead_parts(owner) == ["of the gone"]
    assert ledger.take_dead_parts(owner) == []


def test_a_plan_has_more_when_anothers_step_needs_clearly_less(accelerator: EmulatedAccelerator) -> None:
    """What it has offloaded counts: all that comes free is the plan's here, whose own step needs nothing."""
    ledger, owner, other = ResidencyLedger(Mirrors(accelerator)), Owner(), Owner()
    weight, foreign = torch.ones(64, 64), torch.ones(0, 64)
    limit = 64 * ROW_BYTES
    enter(ledger, other, "decode", foreign, 0, step_bytes=32 * ROW_BYTES)
    enter(ledger, owner, "decode", weight, 32)
    assert not ledger.has_more(owner, "decode", limit), "that is what was decided"
    enter(ledger, other, "decode", foreign, 0, step_bytes=30 * ROW_BYTES)
    assert not ledger.has_more(owner, "decode", limit), "two rows of 32 that are offloaded"
    epoch = ledger.epoch
    enter(ledger, other, "decode", foreign, 0, step_bytes=16 * ROW_BYTES)
    assert ledger.epoch > epoch, "it is looked at"
    assert ledger.has_more(owner, "decode", limit)
    assert not ledger.has_more(other, "decode", limit), "it asks for nothing"
    enter(ledger, owner, "decode", weight, 16)
    assert not ledger.has_more(owner, "decode", limit)


def test_what_is_out_of_date_keeps_no_ring_and_an_interrupted_plan_nothing(accelerator: EmulatedAccelerator) -> None:
    ledger, owner, weight = ResidencyLedger(Mirrors(accelerator)), Owner(), torch.ones(64, 64)
    residency = Residency({}, 1024, 0, {})
    for part in ("prefill", "decode"):
        ledger.enter(owner, part, residency, 1 << 20, None)
    ledger.outdate(owner, ["prefill", "never planned"])
    assert ledger.others(owner, "decode").ring_within(1 << 20) == 0
    assert ledger.others(owner, "prefill").ring_within(1 << 20) == 1024
    enter(ledger, owner, "decode", weight, 32)
    ledger.leave(owner, ["decode"])
    assert [list(claims) for claims in ledger.others(None, None).claims()] == [[]]


def test_of_others_rings_the_longest_that_fits_is_shared() -> None:
    """Not the longest or none: a target and its draft then ended each other's plans at every switch."""
    entries: Any = tuple(SimpleNamespace(ring_bytes=nbytes) for nbytes in (1000, 360, 65))
    others = OtherPlans(entries)
    assert [others.ring_within(nbytes) for nbytes in (1000, 999, 360, 70, 10)] == [1000, 360, 360, 65, 0]
