"""The host's figures: their units, by a clock of the tests' own, and the thread that competes for memory."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hetegen_compile.calibration import Effort, host
from hetegen_compile.calibration.beside import computing_with, repeatedly
from hetegen_compile.calibration.host import (
    Remaining,
    arithmetic_rate,
    host_steps,
    launch_s,
    measure_host,
    memory_bytes_per_s,
    memory_copy,
    remaining,
    rotation_bytes,
)
from hetegen_compile.calibration.kernels import make_arena
from hetegen_compile.calibration.linears import LinearFigures
from hetegen_compile.cost_model import KernelChoice, RateCurve, RateTable
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
    assert set(profile.linear_bytes_per_s) == set(profile.flops_per_s) == set(profile.linear_kernels)
    assert set(profile.flops_per_s) == {"float32", "bfloat16", "float16", "int8"} == set(figures.comparison)
    assert 0 < profile.contention <= 1
    assert profile.cores == torch.get_num_threads()


def test_arithmetic_is_never_slower_than_a_measured_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    table = RateTable(((64.0, RateCurve(((1.0, 1000.0), (32.0, 100.0)))),))
    figures = LinearFigures(table, KernelChoice(((1.0, "F.linear"),)), "")
    monkeypatch.setattr(host, "measure_linears", lambda arena, effort, fixed_s, step: figures)
    monkeypatch.setattr(host, "arithmetic_rate", lambda dtype, effort: 1700.0)
    monkeypatch.setattr(host, "remaining", lambda *_: Remaining(1.0, 1.0))
    flops = measure_host(TINY, None, lambda name: None).profile.flops_per_s
    widest = 2 * 32 * 100
    assert flops == {"float32": 1700.0, "bfloat16": widest / 2, "float16": widest / 2, "int8": widest}


def test_weights_of_every_dtype_lie_in_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a view of it reads as is a small number, and nothing of it is left over."""
    arenas: list[Tensor] = []

    def measured(arena: Tensor, *others: object) -> LinearFigures:
        arenas.append(arena)
        return FIGURES

    monkeypatch.setattr(host, "measure_linears", measured)
    monkeypatch.setattr(host, "remaining", lambda *_: Remaining(1.0, 1.0))
    measure_host(replace(TINY, rotate_bytes=2051), None, lambda name: None)
    assert [arena.dtype for arena in arenas] == list(host.DTYPES)
    assert {arena.data_ptr() for arena in arenas} == {arenas[0].data_ptr()}
    assert {arena.nbytes for arena in arenas} == {2056}
    assert all((arena == arena[0]).all() and 0.01 < arena[0].item() <= 60 for arena in arenas)


def test_not_all_of_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    def copy(nbytes: int) -> Callable[[], None]:
        copied.append(nbytes)
        return lambda: None

    def rate(nbytes: int, effort: Effort) -> float:
        copied.append(nbytes)
        return 1.0

    monkeypatch.setattr(host, "MIN_ROTATE_BYTES", 1000)
    monkeypatch.setattr(host, "memory_copy", copy)
    monkeypatch.setattr(host, "memory_bytes_per_s", rate)
    for rotate_bytes in (8192, 2048, 512):
        measure_host(replace(TINY, rotate_bytes=rotate_bytes), None, lambda name: None)
    assert copied == [2048, 2048, 1000, 1000, 512, 512]


FIGURES = LinearFigures(RateTable.of(RateCurve.constant(1.0)), KernelChoice(((1.0, "vectorised"),)), "")


def is_busy() -> bool:
    return any(thread.name.startswith("hetegen-calibrate") for thread in threading.enumerate())


def test_the_shares_compare_busy_with_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each copy moves on: by 2 s alone, by 5 s beside Linears, which wait for a whole one."""
    now_s, copied = 0.0, threading.Semaphore(0)

    def copy() -> None:
        nonlocal now_s
        now_s += 5.0 if is_busy() else 2.0
        copied.release()

    def rate(compute: object, weights: object, tokens: int, effort: Effort) -> float:
        if not is_busy():
            return 4.0
        while copied.acquire(blocking=False):
            pass
        assert all(copied.acquire(timeout=10) for _ in range(2))
        return 3.0

    monkeypatch.setattr(host, "kernel_rate", rate)
    effort = replace(TINY, clock=lambda: now_s)
    assert remaining(make_arena(torch.float32, 2048), FIGURES, copy, effort) == Remaining(linears=0.75, copies=0.4)


def test_linears_are_computed_until_a_copy_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow link: its copy ends behind the third measurement beside it."""
    now_s, busy, third = 0.0, 0, threading.Event()

    def copy() -> None:
        nonlocal now_s
        assert not is_busy() or third.wait(10)
        now_s += 5.0 if is_busy() else 2.0

    def rate(compute: object, weights: object, tokens: int, effort: Effort) -> float:
        nonlocal busy
        busy += is_busy()
        if busy == 3:
            third.set()
        return 1.0

    monkeypatch.setattr(host, "kernel_rate", rate)
    effort = replace(TINY, repeats=1, clock=lambda: now_s)
    assert remaining(make_arena(torch.float32, 2048), FIGURES, copy, effort).copies == 0.4
    assert busy >= 3


def test_a_round_that_fails_is_over() -> None:
    """Who waits for one does not wait for ever."""

    def fail() -> None:
        raise OSError("no copies")

    def wait(rounds_s: list[float]) -> None:
        deadline_s = time.monotonic() + 10
        while not rounds_s:
            assert time.monotonic() < deadline_s

    with pytest.raises(OSError, match="no copies"), repeatedly(fail) as rounds_s:
        wait(rounds_s)


def test_fewer_threads_compute_beside_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[bool, int]] = []

    def rate(compute: object, weights: object, tokens: int, effort: Effort) -> float:
        found.append((is_busy(), torch.get_num_threads()))
        return 1.0

    monkeypatch.setattr(host, "kernel_rate", rate)
    with computing_with(3):
        remaining(make_arena(torch.float32, 2048), FIGURES, lambda: None, TINY, threads=2)
        assert torch.get_num_threads() == 3
        assert found == [(False, 3), (True, 2)] * TINY.repeats
        found.clear()
        remaining(make_arena(torch.float32, 2048), FIGURES, lambda: None, TINY)
        assert {threads for _, threads in found} == {3}


def test_shares_are_at_most_1(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 2.0] * 3)
    monkeypatch.setattr(host, "kernel_rate", lambda *_: next(rates))
    monkeypatch.setattr(host, "median_s", lambda *_: 1e9)
    assert remaining(make_arena(torch.float32, 2048), FIGURES, lambda: None, TINY) == Remaining(1.0, 1.0)


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
    monkeypatch.setattr(host, "copy_bytes", lambda target, source: copies.append((target.nbytes, source.nbytes)))
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
    assert rotation_bytes(replace(effort, weight_bytes=(1 << 20, 80 << 20))) == 160 << 20
    monkeypatch.setattr(host, "last_level_cache_bytes", lambda: 256 << 20)
    assert rotation_bytes(effort) == 4 << 30
    monkeypatch.setattr(host, "host_memory_bytes", lambda: 32 << 30)
    assert rotation_bytes(effort) == 2 << 30
    assert not caplog.records, "eight times the cache"
    monkeypatch.setattr(host, "host_memory_bytes", lambda: 1 << 30)
    with caplog.at_level(logging.WARNING, logger="hetegen_compile"):
        assert rotation_bytes(effort) == 64 << 20
    assert "64 MiB only" in caplog.text
