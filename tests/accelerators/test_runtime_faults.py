"""Faults of the runtime and not of the schedule: a bound step that drops, repeats or mixes up an operation.

Each is an error of the emulated accelerator, whatever the timing was; without the fault the same step is eager's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.accelerators.base import Token, Transfer, Value
from hetegen_compile.errors import AcceleratorError, HetegenError, MissingWaitError, ScheduleError, SlotInUseError
from hetegen_compile.mirrors import Mirrors
from tests.passes.graphs import Case, quarters, scheduled
from tests.passes.mutants import STEPS, run_emulated

LAYERS = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
X = torch.randn(1, 64)
RING = 2 * 16 * 64 * 4


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


@pytest.fixture(scope="module")
def good() -> Case:
    return scheduled(chain, X, plan=quarters, ring_bytes=RING)


def run(found: Case, accelerator: EmulatedAccelerator) -> list[Any]:
    try:
        return run_emulated(found, found.inputs, accelerator)
    finally:
        accelerator.close()


@pytest.mark.parametrize("seed", range(4))
def test_without_a_fault_the_step_is_eagers(good: Case, seed: int) -> None:
    with torch.no_grad():
        expected = chain(X)
    results = run(good, EmulatedAccelerator(1 << 26, seed=seed))
    torch.testing.assert_close(results, [expected] * STEPS)


class SkipsWaits(EmulatedAccelerator):
    """Compute does not wait for what goes up."""

    def wait(self, op: Op, transfer: Transfer) -> Any:
        return list(transfer.values) if transfer.value is None else transfer.value


class SkipsTokens(EmulatedAccelerator):
    """A prefetch does not wait for the releases of its slot."""

    def prefetch(self, op: Op, source: Any, slot: Any, after: Sequence[Token]) -> Any:
        return super().prefetch(op, source, slot, ())


class ReleasesAtOnce(EmulatedAccelerator):
    """A slot is given up as soon as it has arrived."""

    def wait(self, op: Op, transfer: Transfer) -> Any:
        value = super().wait(op, transfer)
        if transfer.kind == "prefetch":
            super().release(op, transfer)
        return value


class KeepsSlots(EmulatedAccelerator):
    """Releases are forgotten."""

    def release(self, op: Op, transfer: Transfer) -> Any:
        return None


class SkipsHostWaits(EmulatedAccelerator):
    """The host takes the transfer for its result."""

    def wait_host(self, op: Op, transfer: Transfer) -> Any:
        return [transfer]


class SendsTheWrongRows(EmulatedAccelerator):
    """A prefetch of half the rows."""

    def prefetch(self, op: Op, source: Any, slot: Any, after: Sequence[Token]) -> Any:
        return super().prefetch(op, source[: len(source) // 2], slot, after)


class ReusesAnActivation(EmulatedAccelerator):
    """The host overwrites what it has sent up, while the accelerator may be reading it."""

    def to_accelerator(self, op: Op, tensors: Sequence[Tensor]) -> Any:
        transfer = super().to_accelerator(op, tensors)
        tensors[-1].zero_()
        return transfer


class UploadsInTheStep(EmulatedAccelerator):
    """The mirror of a host tensor is the host tensor itself."""

    def upload(self, op: Op, source: Tensor, *, into: Value | None = None) -> Any:
        return source


FAULTS: dict[type[EmulatedAccelerator], type[HetegenError]] = {
    SkipsWaits: MissingWaitError,
    SkipsTokens: SlotInUseError,
    ReleasesAtOnce: SlotInUseError,
    KeepsSlots: ScheduleError,
    SkipsHostWaits: MissingWaitError,
    SendsTheWrongRows: ScheduleError,
    ReusesAnActivation: MissingWaitError,
    UploadsInTheStep: ScheduleError,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_fault_is_an_error(good: Case, fault: type[EmulatedAccelerator], seed: int | None) -> None:
    with pytest.raises(FAULTS[fault]):
        run(good, fault(1 << 26, seed=seed))


def test_a_mirror_from_the_step_before_that_was_released(good: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of a slot kept as if it were a mirror is refused in the next step."""
    kept: list[Any] = []
    wait: Callable[..., Any] = EmulatedAccelerator.wait
    fetch = Mirrors.fetch

    def keeping(self: EmulatedAccelerator, op: Op, transfer: Transfer) -> Any:
        value = wait(self, op, transfer)
        if transfer.kind == "prefetch":
            kept.append(value)
        return value

    def mixed(self: Mirrors, requests: Any, limit_bytes: int) -> list[Any]:
        values = fetch(self, requests, limit_bytes)
        return [*values[:-1], kept[0]] if kept else values

    monkeypatch.setattr(EmulatedAccelerator, "wait", keeping)
    monkeypatch.setattr(Mirrors, "fetch", mixed)
    with pytest.raises(SlotInUseError, match="released its slot"):
        run(good, EmulatedAccelerator(1 << 26))


@pytest.mark.parametrize("lost", range(3))
def test_a_mirror_of_a_bias_that_is_lost(good: Case, lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``F.linear`` takes None for a bias: without the check the step would run and be wrong."""
    fetch = Mirrors.fetch

    def losing(self: Mirrors, requests: Any, limit_bytes: int) -> list[Any]:
        values = fetch(self, requests, limit_bytes)
        biases = [i for i, request in enumerate(requests) if request.tensor.shape == (64,)]
        assert len(biases) == len(LAYERS)
        values[biases[lost]] = None
        return values

    monkeypatch.setattr(Mirrors, "fetch", losing)
    with pytest.raises(ScheduleError, match="gets None for argument 2, which is a tensor in the schedule"):
        run(good, EmulatedAccelerator(1 << 26))


def test_a_stream_that_fails_leaves_no_result(good: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("the link is down")

    monkeypatch.setattr("hetegen_compile.accelerators.emulated.work.DeviceWork.fill_slot", broken)
    with pytest.raises(AcceleratorError, match="prefetch.* failed .*the link is down"):
        run(good, EmulatedAccelerator(1 << 26, seed=1))
