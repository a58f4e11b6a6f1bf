"""Pacing by accumulated debt, and spans of every lane."""

import time

import pytest
import torch

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.accelerators.emulated.clocks import HOST, UP
from hetegen_compile.accelerators.emulated.pacing import Pacer
from hetegen_compile.ir import SMALL_UPLOAD_BYTES

SHORT_S = 2e-4
COUNT = 100
PACE = 30.0


def run_lanes(accelerator: EmulatedAccelerator, seconds: float) -> float:
    """Wall-clock seconds of COUNT operations on each of three lanes at once."""
    accelerator.reserve_ring(256)
    x, large = torch.ones(4), torch.ones((SMALL_UPLOAD_BYTES >> 2) + 1)
    accelerator.begin_step()
    start_s = time.perf_counter()
    for i in range(COUNT):
        accelerator.launch(Op(f"launch{i}", seconds), torch.ones, (4,))
        accelerator.to_accelerator(Op(f"up{i}", seconds), [large])
        accelerator.host(Op(f"host{i}", seconds), torch.neg, (x,), {})
    accelerator.end_step()
    return time.perf_counter() - start_s


def test_paced_lanes_take_their_time_and_overlap() -> None:
    accelerator = EmulatedAccelerator(pace=PACE)
    elapsed_s = run_lanes(accelerator, SHORT_S)
    accelerator.close()
    paced_s = COUNT * SHORT_S * PACE
    assert paced_s * 0.95 <= elapsed_s < paced_s * 2.5  # three lanes one after another would be 3


def test_the_host_thread_takes_its_time_to_issue() -> None:
    accelerator = EmulatedAccelerator(pace=1.0)
    accelerator.begin_step()
    start_s = time.perf_counter()
    for i in range(COUNT):
        accelerator.launch(Op(f"launch{i}", issue_s=SHORT_S), torch.ones, (4,))
    issued_s = time.perf_counter() - start_s
    accelerator.end_step()
    accelerator.close()
    assert issued_s >= COUNT * SHORT_S * 0.9


def test_a_small_upload_takes_the_devices_time_not_the_links() -> None:
    accelerator = EmulatedAccelerator(pace=1.0)
    accelerator.trace(True)
    accelerator.begin_step()
    up = accelerator.to_accelerator(Op("up", 100 * SHORT_S), [torch.ones(4)])
    (value,) = accelerator.wait(Op("wait"), up)
    accelerator.launch(Op("read"), torch.neg, (value,))
    accelerator.end_step()
    spans = {span.name: span for span in accelerator.trace(False)}
    accelerator.close()
    assert spans["up"].resource == "accelerator"
    assert spans["read"].start_s - spans["up"].start_s >= 100 * SHORT_S


def test_without_pace_nothing_sleeps(accelerator: EmulatedAccelerator) -> None:
    start_s = time.perf_counter()
    accelerator.host(Op("host", 60.0), torch.ones, (1,), {})
    accelerator.launch(Op("launch", 60.0), torch.ones, (1,))
    accelerator.synchronize()
    assert time.perf_counter() - start_s < 30.0


def test_debt_below_a_millisecond_is_kept_not_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    pacer = Pacer(2.0)
    pacer.charge(UP, 10.0, 4e-4)
    pacer.charge(HOST, 10.0, 4e-4)
    assert slept == []
    pacer.charge(UP, 10.0, 4e-4)
    assert slept == [pytest.approx(1.6e-3)]


def test_an_operation_longer_than_predicted_owes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    Pacer(1.0).charge(UP, 9.0, 0.5)
    assert slept == []


def test_trace_has_spans_of_all_lanes(accelerator: EmulatedAccelerator) -> None:
    accelerator.reserve_ring(256)
    slot = accelerator.slot(0, (4,), torch.float32)
    assert accelerator.trace(True) == []
    fetched = accelerator.prefetch(Op("fetch"), torch.ones(4), slot, ())
    value = accelerator.launch(Op("neg"), torch.neg, (accelerator.wait(Op("wait"), fetched),))
    accelerator.host(Op("host"), torch.ones, (1,), {})
    accelerator.download(Op("down"), value)
    accelerator.synchronize()
    spans = {span.name: span for span in accelerator.trace(False)}
    resources = {name: span.resource for name, span in spans.items()}
    assert resources == {"fetch": "up", "neg": "accelerator", "host": "host", "down": "down"}
    assert spans["fetch"].end_s <= spans["neg"].start_s <= spans["neg"].end_s <= spans["down"].start_s
    accelerator.launch(Op("untraced"), torch.ones, (1,))
    accelerator.synchronize()
    assert accelerator.trace(False) == []
