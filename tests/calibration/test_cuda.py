"""The CUDA measurements against stand-ins for torch.cuda on host memory.

This finds wrong calls and wrong units. It says nothing about a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import Op
from hetegen_compile.calibration import cuda, gating, host, runner
from hetegen_compile.calibration.beside import computing_with
from hetegen_compile.calibration.cuda import CudaMeter, CudaSizes, measure_cuda
from hetegen_compile.calibration.gating import Answer
from hetegen_compile.calibration.host import Remaining
from hetegen_compile.cost_model import profile_from_json, profile_to_json, unsourced_fields
from hetegen_compile.host_kernels import vectorised
from hetegen_compile.passes.segment_calls import CompiledCall
from tests.calibration.tiny import TINY
from tests.models.harness import through_inductor

SIZES = CudaSizes(square=8, memory_bytes=1024, transfer_bytes=(1000, 20_000))
LOG: list[str] = []


class FakeEvent:
    """Two milliseconds lie between any two recorded events."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = False

    def record(self, stream: object) -> None:
        self.recorded = True
        LOG.append("record")

    def synchronize(self) -> None:
        assert self.recorded

    def query(self) -> bool:
        assert self.recorded
        return True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.recorded
        assert end.recorded
        return 2.0


class Issuing:
    """An accelerator of which only launches are asked."""

    def begin_step(self) -> None:
        LOG.append("begin step")

    def launch(self, op: Op, function: Callable[[], object], args: tuple[object, ...]) -> None:
        LOG.append(op.name)
        function(*args)

    def host(self, op: Op, function: Callable[..., object], args: Any, kwargs: Any) -> None:
        LOG.append("host")
        function(*args, **kwargs)

    def end_step(self) -> None:
        LOG.append("end step")

    def close(self) -> None:
        LOG.append("close")


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> CudaMeter:
    LOG.clear()
    parts = SimpleNamespace(
        Event=FakeEvent,
        _sleep=lambda cycles: LOG.append("spin"),
        is_available=lambda: True,
        current_device=lambda: 0,
        current_stream=lambda device: None,
        synchronize=lambda device: LOG.append("synchronize"),
        empty_cache=lambda: LOG.append("empty_cache"),
        get_device_name=lambda device: "a fake GPU",
        get_device_properties=lambda device: SimpleNamespace(total_memory=123),
    )
    for name, part in vars(parts).items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(cuda, "pinned_zeros", lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(cuda, "cuda_view", lambda buffer, device: buffer)
    monkeypatch.setattr(cuda, "last_level_cache_bytes", lambda: 30_000)
    monkeypatch.setattr(CudaMeter, "accelerator", Issuing)
    monkeypatch.setattr(cuda, "small_segment", lambda device: (torch.add, (torch.ones(1), torch.ones(1))))
    return CudaMeter(torch.device("cpu"), TINY, SIZES)


def test_queued_work_is_issued_behind_a_spin_and_between_the_events(meter: CudaMeter) -> None:
    assert meter.queued_s(lambda: LOG.append("work"), batch=2) == pytest.approx(2e-3 / 2)
    assert LOG[:5] == ["spin", "record", "work", "work", "record"]
    assert LOG.count("spin") == 1 + TINY.repeats


def test_blocking_work_ends_with_the_device(meter: CudaMeter) -> None:
    meter.blocking_s(lambda: LOG.append("work"))
    expected = ["work", "synchronize"] * (1 + TINY.repeats)
    assert expected == LOG


def test_rates_come_from_events(meter: CudaMeter) -> None:
    assert meter.gemm_flops_per_s(torch.float32) == pytest.approx(2 * 8**3 / 1e-3)
    assert meter.memory_bytes_per_s() == pytest.approx(2 * 1024 / (2e-3 / 8))
    up = meter.direction(up=True, step=lambda name: None)
    assert up.latency_s == pytest.approx(2e-3 / 8)
    assert [x for x, _ in up.pinned.points] == [1000.0, 20_000.0]
    assert [rate for _, rate in up.pinned.points] == pytest.approx([4e6, 8e7])


def test_copies_go_the_way_they_say(meter: CudaMeter) -> None:
    meter._on_device.fill_(7)
    meter._copy(meter._pinned, 100, up=False)()
    assert meter._pinned[:101].tolist() == [7] * 100 + [0]
    meter._pageable.fill_(9)
    meter._copy(meter._pageable, 50, up=True)()
    assert meter._on_device[:51].tolist() == [9] * 50 + [7]


@through_inductor
def test_a_small_segment_is_compiled() -> None:
    with torch.no_grad(), mock.patch.object(CompiledCall, "__call__", autospec=True, side_effect=_through) as layers:
        segment, (x, y) = cuda.small_segment(torch.device("cpu"))
        for _ in range(3):
            (found,) = segment(x, y)
            assert torch.allclose(found, torch.ones_like(x))
    assert layers.call_count == 1, "it is called as steps call it"


def _through(call: CompiledCall, *args: Tensor) -> Any:
    return call.function(*args)


def test_all_figures(meter: CudaMeter) -> None:
    steps: list[str] = []
    figures = measure_cuda(meter, steps.append)
    assert len(steps) == cuda.STEPS - 2 * (len(cuda.TRANSFER_BYTES) - len(SIZES.transfer_bytes))
    assert figures.accelerator.name == "a fake GPU"
    assert figures.accelerator.memory_bytes == 123
    assert figures.link.view_s == pytest.approx(2e-3 / 8)
    issued = [one for one in LOG if one in ("begin step", "host", "calibration", "end step", "close")]
    a_round = ["host", *["calibration"] * cuda._ISSUES]
    assert issued == ["begin step", *a_round * cuda._ROUNDS, "end step", "close"] * 2
    assert figures.accelerator.issue_s > 0
    assert figures.accelerator.segment_issue_s > 0


def test_issuing_counts_as_a_linear_where_no_segment_can_be_compiled(
    meter: CudaMeter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(device: object) -> None:
        raise RuntimeError("no Triton")

    monkeypatch.setattr(cuda, "small_segment", failing)
    accelerator = measure_cuda(meter, lambda name: None).accelerator
    assert accelerator.segment_issue_s == 0
    assert accelerator.issuing_s(segment=True) == accelerator.issuing_s(segment=False) == accelerator.issue_s > 0
    assert "no Triton" in caplog.text


def test_without_views_the_link_is_used(
    meter: CudaMeter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def copied(buffer: object, device: object) -> torch.Tensor:
        raise RuntimeError("torch copied a pinned buffer")

    monkeypatch.setattr(cuda, "cuda_view", copied)
    link = measure_cuda(meter, lambda name: None).link
    assert link.view_s == link.up.latency_s
    assert "cannot be viewed" in caplog.text


@pytest.mark.parametrize("gates", [Answer(4e-6, times="faster"), Answer(0.0, "no faster")])
def test_a_profile_of_a_machine_with_cuda(meter: CudaMeter, monkeypatch: pytest.MonkeyPatch, gates: Answer) -> None:
    def same_meter(*_: object) -> CudaMeter:
        return meter

    def ask(device: torch.device) -> Answer:
        assert vectorised._build.cache_info().currsize, "the host's kernels are built: the other process has a limit"
        LOG.append("gates")
        return gates

    vectorised.library.cache_clear()
    vectorised._build.cache_clear()
    monkeypatch.setattr(runner, "CudaMeter", same_meter)
    monkeypatch.setattr(gating, "ask", ask)
    found: list[int | None] = []

    def remaining(*arguments: object) -> Remaining:
        found[:] = [arguments[-1]]  # type: ignore[list-item]
        return Remaining(0.8, 0.9)

    monkeypatch.setattr(host, "remaining", remaining)
    with computing_with(16):
        profile = runner.calibrate(accelerator="cuda", progress=False, effort=TINY)
    assert profile_from_json(profile_to_json(profile), "here") == profile
    assert unsourced_fields(profile) == ()
    assert profile.inferred == ()
    assert "a fake GPU" in profile.description
    assert profile.accelerator.gate_s == gates.gate_s
    assert (profile.host.contention, profile.link.contention) == (0.8, 0.9)
    assert found == [14 if gates.gate_s else 16], "of 16: a worker's threads, if there will be one"
    assert profile.sources["accelerator"].endswith("measured; faster" if gates.gate_s else "ahead: no faster")
    assert LOG[-1] == "empty_cache"


def test_the_load_during_contention_is_uploads(meter: CudaMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    directions: list[bool] = []

    def spy(host: object, nbytes: int, *, up: bool) -> Callable[[], object]:
        directions.append(up)
        return lambda: None

    monkeypatch.setattr(meter, "_copy", spy)
    meter.load()
    assert len(directions) == cuda._BATCH, "more than the caches hold"
    assert all(directions)
