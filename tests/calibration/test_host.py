"""The host's figures: their units, by a clock of the tests' own, and the thread that competes for memory."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
import torch

from hetegen_compile.calibration import Effort, host
from hetegen_compile.calibration.host import (
    arithmetic_rate,
    host_steps,
    launch_s,
    measure_host,
    memory_bytes_per_s,
    memory_copy,
    remaining_share,
    repeatedly,
    rotation_bytes,
)
from hetegen_compile.calibration.kernels import make_weights
from tests.calibration.tiny import TINY


@pytest.fixture
def half_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every median is half a second."""
    monkeypatch.setattr(host, "median_s", lambda call, effort: 0.5)


@pytest.mark.usefixtures("half_second")
def test_units() -> None:
    assert arithmetic_rate(torch.float32, TINY) == 2 * 8**3 / 0.5
    assert memory_bytes_per_s(1000, TINY) == 2 * 1000 / 0.5
    assert launch_s(TINY) == 0.5 / 100


def test_measuring_reports_as_many_steps_as_announced() -> None:
    steps: list[str] = []
    figures = measure_host(TINY, None, steps.append)
    assert len(steps) == host_steps(TINY)
    assert len(set(steps)) == len(steps)
    profile = figures.profile
    assert set(profile.linear_bytes_per_s) == set(profile.flops_per_s) == {"float32", "bfloat16", "float16"}
    assert [x for x, _ in profile.linear_bytes_per_s["float16"].points] == [1.0, 2.0]
    assert 0 < profile.contention <= 1
    assert profile.cores == torch.get_num_threads()
    assert all("1 token(s): " in text for text in figures.fastest.values())


def test_arithmetic_is_never_slower_than_a_measured_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "kernel_rates", lambda kernel, weights, tokens, effort: [1000.0])
    monkeypatch.setattr(host, "arithmetic_rate", lambda dtype, effort: 1.0)
    flops = measure_host(TINY, None, lambda name: None).profile.flops_per_s
    assert flops == {"float32": 2 * 2 * 1000 / 4, "bfloat16": 2 * 2 * 1000 / 2, "float16": 2 * 2 * 1000 / 2}


def test_a_burst_of_other_load_does_not_decide_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def rates(kernel: object, weights: object, tokens: int, effort: Effort) -> list[float]:
        calls.append(tokens)
        return [1.0, 1.0] if len(calls) in (5, 6) else [50.0, 50.0]  # the third round is disturbed

    monkeypatch.setattr(host, "kernel_rates", rates)
    curves = measure_host(TINY, None, lambda name: None).profile.linear_bytes_per_s
    assert calls[:6] == [1, 2] * 3
    assert curves["float32"].points == ((1.0, 50.0), (2.0, 50.0))


def test_the_share_compares_busy_with_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    copying = threading.Event()

    def rate(kernel: object, weights: object, tokens: int, effort: Effort) -> float:
        busy = any(thread.name.startswith("hetegen-calibrate") for thread in threading.enumerate())
        return 3.0 if busy else 4.0

    monkeypatch.setattr(host, "kernel_rate", rate)
    weights = make_weights(((4, 8),), torch.float32, 64)
    assert remaining_share(weights, copying.set, TINY) == 0.75
    assert copying.is_set()


def test_a_share_is_at_most_1(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 2.0] * 3)
    monkeypatch.setattr(host, "kernel_rate", lambda *_: next(rates))
    assert remaining_share(make_weights(((4, 8),), torch.float32, 64), lambda: None, TINY) == 1.0


def test_work_runs_again_and_again_and_ends_with_the_block() -> None:
    rounds = threading.Semaphore(0)
    with repeatedly(rounds.release):
        assert all(rounds.acquire(timeout=10) for _ in range(3))
    assert not [t for t in threading.enumerate() if t.name.startswith("hetegen-calibrate")]


def test_an_error_of_the_work_is_raised() -> None:
    def fail() -> None:
        raise OSError("no copies")

    with pytest.raises(OSError, match="no copies"), repeatedly(fail):
        pass


def test_an_error_of_the_block_stops_the_work() -> None:
    with pytest.raises(KeyError), repeatedly(lambda: None):
        raise KeyError("block")


def test_the_stand_in_for_uploads_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[int, int]] = []
    monkeypatch.setattr(
        host, "copy_bytes", lambda target, source: copies.append((target.nbytes, source.nbytes))
    )
    memory_copy(100)()
    assert copies == [(100, 100)]


def test_bytes_are_copied() -> None:
    source, target = torch.arange(9.0), torch.zeros(9)
    host.copy_bytes(target, source)
    assert torch.equal(source, target)


def test_the_rotation_exceeds_the_cache_and_spares_main_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    effort = replace(TINY, rotate_bytes=None)
    monkeypatch.setattr(host, "host_memory_bytes", lambda: 64 << 30)
    monkeypatch.setattr(host, "last_level_cache_bytes", lambda: 1 << 20)
    assert rotation_bytes(effort) == 128 << 20
    monkeypatch.setattr(host, "last_level_cache_bytes", lambda: 256 << 20)
    assert rotation_bytes(effort) == 384 << 20
    assert not caplog.records
    monkeypatch.setattr(host, "host_memory_bytes", lambda: 1 << 30)
    with caplog.at_level(logging.WARNING, logger="hetegen_compile"):
        assert rotation_bytes(effort) == 64 << 20
    assert "64 MiB only" in caplog.text
