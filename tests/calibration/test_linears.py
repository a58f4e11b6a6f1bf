"""Which kernel is recorded for which number of tokens, and whose rates make the table; by a clock of the tests' own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hetegen_compile.calibration import linears
from hetegen_compile.calibration.kernels import make_arena
from hetegen_compile.calibration.linears import (
    contradiction,
    linear_steps,
    measure_linears,
    points,
    seems_disturbed,
    usable_kernels,
)
from hetegen_compile.cost_model import RateCurve, RateTable, load_profile
from hetegen_compile.errors import HostKernelUnavailableError
from hetegen_compile.host_kernels import INT8PACK, KERNELS, LINEAR, TILED, TILED_THROUGH_L2, VECTORISED, HostKernel
from tests.calibration.tiny import TINY, Clock

Seconds = Callable[[str, int, int], float]
PROFILE = load_profile("a10-xeon")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable[[Seconds], None]:
    """Make the registry's kernels take the seconds that a function of (name, tokens, bytes) says."""

    def install(seconds: Seconds) -> None:
        def fake(kernel: HostKernel) -> HostKernel:
            def run(x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int) -> Tensor:
                clock.advance(seconds(kernel.name, x.shape[0], rows.nbytes))
                return x

            return replace(kernel, run=run)

        for name in list(KERNELS):
            monkeypatch.setitem(KERNELS, name, fake(KERNELS[name]))

    monkeypatch.setattr(linears, "copying_kernels", lambda dtype: ())
    return install


def measure(clock: Clock, launch_s: float = 0.0, steps: list[str] | None = None) -> linears.LinearFigures:
    """Of weights of as many bytes as they are to have: a row of 32 columns would have more than 64."""
    said: list[str] = [] if steps is None else steps
    effort = replace(TINY, clock=clock, columns=(16,))
    return measure_linears(make_arena(torch.float32, 2048), effort, launch_s, said.append)


def test_many_tokens_are_timed_at_one_size() -> None:
    assert points(TINY) == [(1, 64), (2, 64), (32, 64), (1, 512), (2, 512)]


def test_each_number_of_tokens_gets_the_fastest_kernel_and_its_rates(
    clock: Clock, timed: Callable[[Seconds], None]
) -> None:
    fast = {("vectorised", 1), ("vectorised", 2), ("F.linear", 32)}
    timed(lambda name, tokens, nbytes: nbytes * tokens * (1.0 if (name, tokens) in fast else 4.0))
    figures = measure(clock)
    assert figures.kernels.points == ((1.0, "vectorised"), (2.0, "vectorised"), (32.0, "F.linear"))
    small, large = figures.table.curves
    assert small == (64.0, small[1])
    assert small[1].points == ((1.0, 1.0), (2.0, 1 / 2), (32.0, 1 / 32))
    assert large[1].points == small[1].points  # at 32 tokens the rate of the size that was timed
    others = "vectorised, tiled 2.5e-10, vectorised, tiled through L2 2.5e-10"
    assert figures.comparison == f"1 token(s): F.linear 2.5e-10, vectorised 1e-09, {others}"


@pytest.mark.parametrize(("small", "large", "chosen"), [(0.1, 1.5, "F.linear"), (4.0, 0.5, "vectorised")])
def test_the_largest_weights_decide(
    clock: Clock, timed: Callable[[Seconds], None], small: float, large: float, chosen: str
) -> None:
    """``vectorised`` takes so many times what the others take."""
    times = {("vectorised", 64): small, ("vectorised", 512): large}
    timed(lambda name, tokens, nbytes: nbytes * times.get((name, nbytes), 1.0))
    kernels = measure(clock).kernels
    assert [kernels.at(tokens) for tokens in (1, 2)] == [chosen] * 2
    assert kernels.at(32) == ("vectorised" if small < 1.0 else "F.linear"), "timed at the small size alone"


def test_measurements_begin_at_weights_all_over_the_memory(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []

    def timed_from(*given: object, start: float) -> list[tuple[int, float]]:
        starts.append(start)
        return [(64, 1.0)]

    monkeypatch.setattr(linears, "call_durations_s", timed_from)
    measure(clock)
    assert len(starts) == TINY.repeats * len(points(TINY)) * len(usable_kernels(torch.float32))
    assert all(0.3 < (after - before) % 1.0 < 0.7 for before, after in pairwise(starts)), "far from the one before"
    gaps = [after - before for before, after in pairwise([0.0, *sorted(starts), 1.0])]
    assert max(gaps) < 3 / len(starts)


def test_a_hopeless_kernel_is_timed_in_the_first_round_only(clock: Clock, timed: Callable[[Seconds], None]) -> None:
    """By the number of tokens; one that is slow at small weights, which hardly count, stays."""
    calls: Counter[tuple[str, int, int]] = Counter()
    slow = {("F.linear", 1): 4.1, ("vectorised", 2): 3.9}

    def seconds(name: str, tokens: int, nbytes: int) -> float:
        calls[name, tokens, nbytes] += 1
        small = 9.0 if (name, nbytes) == ("vectorised, tiled", 64) else 1.0
        return nbytes * small * slow.get((name, tokens), 1.0)

    timed(seconds)
    figures = measure(clock)
    rounds = {point: count / calls["vectorised, tiled through L2", *point[1:]] for point, count in calls.items()}
    hopeless = {(name, tokens) for (name, tokens, _), share in rounds.items() if share < 1.0}
    assert hopeless == {("F.linear", 1), ("vectorised, tiled", 32)}
    assert all(share == 1 / TINY.repeats for share in rounds.values() if share < 1.0)
    assert "1 token(s): F.linear 2.44e-10, " in figures.comparison


@pytest.mark.parametrize(
    ("small_s", "large_s", "told"),
    [
        (8e-3, 8e-3, "a host Linear of 64 B took 8 ms and one of 512 B 8 ms (1 token(s))"),
        (8e-3, 15.9e-3, "a host Linear of 64 B took 8 ms and one of 512 B 15.9 ms (1 token(s))"),
        (8e-3, 16.1e-3, ""),
        (0.9e-3, 0.9e-3, ""),
    ],
)
def test_sizes_that_contradict_each_other(small_s: float, large_s: float, told: str) -> None:
    curves = ((64.0, RateCurve(((1.0, 64 / small_s),))), (512.0, RateCurve(((1.0, 512 / large_s),))))
    assert contradiction(RateTable(curves)) == told
    host = replace(PROFILE.host, linear_bytes_per_s={"int8": RateTable(curves[:1]), "float32": RateTable(curves)})
    assert seems_disturbed(replace(PROFILE, host=host)) == (f"float32: {told}" if told else "")
    (_, small), (_, large) = curves
    assert not contradiction(RateTable(((64.0, small), (128.0, large)))), "of sizes that are nearly alike"


@pytest.mark.parametrize("lasts", [False, True])
def test_what_was_timed_beside_other_work_is_timed_once_more(
    clock: Clock, timed: Callable[[Seconds], None], lasts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    whole = TINY.repeats * len(points(TINY)) * len(usable_kernels(torch.float32))

    def seconds(name: str, tokens: int, nbytes: int) -> float:
        calls.append(name)
        return nbytes / 64 if len(calls) > 2 * whole and not lasts else 1.0

    timed(seconds)
    with caplog.at_level(logging.WARNING, logger="hetegen_compile"):
        table = measure(clock).table
    assert caplog.text.count("); host Linears are timed once more") == 1
    assert ("run hetegen calibrate again" in caplog.text) == lasts
    assert bool(contradiction(table)) == lasts


def test_the_size_is_an_axis(clock: Clock, timed: Callable[[Seconds], None]) -> None:
    timed(lambda name, tokens, nbytes: 3.0 + nbytes / 64)
    table = measure(clock).table
    assert table.at(1, 64) == 64 / 4.0
    assert table.at(1, 512) == 512 / 11.0


def test_the_launch_is_taken_off_but_at_most_half(clock: Clock, timed: Callable[[Seconds], None]) -> None:
    timed(lambda name, tokens, nbytes: nbytes / 64)
    table = measure(clock, launch_s=2.0).table
    assert table.at(1, 512) == 512 / 6.0
    assert table.at(1, 64) == 64 / 0.5


def test_a_burst_of_other_load_does_not_decide_a_point(clock: Clock, timed: Callable[[Seconds], None]) -> None:
    steps: list[str] = []
    timed(lambda name, tokens, nbytes: 9.0 if steps[-1].endswith("round 2") else 1.0)
    assert measure(clock, steps=steps).table.at(1, 64) == 64.0


def test_as_many_steps_as_announced(clock: Clock) -> None:
    steps: list[str] = []
    measure(clock, steps=steps)
    assert len(steps) == linear_steps((torch.float32,), TINY)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise HostKernelUnavailableError("no compiler")

    for kernel in (VECTORISED, TILED, TILED_THROUGH_L2):
        monkeypatch.setitem(KERNELS, kernel.name, replace(kernel, prepare=fail))


@pytest.mark.usefixtures("no_compiler")
def test_a_kernel_that_cannot_be_built_is_neither_timed_nor_recorded(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hetegen_compile"):
        figures = measure(clock)
    assert {name for _, name in figures.kernels.points} == {"F.linear"}
    assert "'vectorised' is not measured for float32: no compiler" in caplog.text


def test_what_is_timed_for_a_dtype() -> None:
    assert usable_kernels(torch.bfloat16) == (LINEAR, VECTORISED, TILED, TILED_THROUGH_L2)
    assert usable_kernels(torch.int8) == (INT8PACK,)
