"""Out of memory on the accelerator in the middle of a step: less stays resident, the step runs again, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.accelerators.base import Op
from hetegen_compile.errors import AcceleratorMemoryError
from tests.backend.modules import WIDTH, Mlp, random
from tests.models.harness import RecordingBackend, emulated, new_schedules

BUDGET = 48 << 10


def _accelerator(backend: RecordingBackend) -> EmulatedAccelerator:
    accelerator = backend.accelerator
    assert isinstance(accelerator, EmulatedAccelerator)
    return accelerator


class Fails:
    """Runs out of memory at the n-th launch from now, ``times`` in all, and does ``before`` just before."""

    def __init__(
        self, accelerator: EmulatedAccelerator, launch: int, times: int = 1, before: Callable[[], Any] = lambda: None
    ) -> None:
        self.left, self.times, self.before = launch, times, before
        self._work, accelerator._work.call = accelerator._work.call, self  # type: ignore[method-assign]

    def __call__(self, op: Op, call: Any, issued: Any) -> None:
        self.left -= 1
        if self.times and self.left <= 0:
            self.times -= 1
            self.before()
            raise AcceleratorMemoryError(f"{op.name} found no memory")
        self._work(op, call, issued)


class Cached(nn.Module):
    """Writes what it computes into a cache in place, in the way that ``write`` does."""

    def __init__(self, write: Callable[..., None]) -> None:
        super().__init__()
        self.write = write
        self.before, self.after = Mlp(2), Mlp(2)

    def forward(self, x: Tensor, cache: Tensor, place: Tensor) -> Any:
        y = self.before(x)
        self.write(cache, place, y)
        return self.after(y + cache[:4].sum(0))


def overwritten(cache: Tensor, place: Tensor, y: Tensor) -> None:
    """A static cache: rows are overwritten, a counter goes on."""
    cache.index_copy_(0, place, y)
    place.add_(1)


def added(cache: Tensor, place: Tensor, y: Tensor) -> None:
    """A second run would add twice."""
    cache[:1].add_(y)


def rolled(cache: Tensor, place: Tensor, y: Tensor) -> None:
    """A sliding cache: a second run would roll twice."""
    cache.copy_(torch.cat([cache[1:], y]))


def _model(write: Callable[..., None], rows: int) -> tuple[Cached, Callable[[], list[Tensor]], list[Tensor]]:
    torch.manual_seed(0)
    model = Cached(write).eval()
    state = [torch.zeros(rows, WIDTH), torch.tensor([0])]

    def step() -> list[Tensor]:
        with torch.no_grad():
            y = model(random(1, WIDTH), *state)
        return [y, *(tensor.clone() for tensor in state)]

    return model, step, state


def _reset(state: list[Tensor]) -> None:
    for tensor in state:
        tensor.zero_()


@pytest.mark.parametrize("launch", [1, 2, 5, 9])
@pytest.mark.parametrize(("write", "rows"), [(overwritten, 16), (added, 16), (rolled, 16), (overwritten, 1024)])
def test_a_step_that_ran_out_of_memory_is_run_again_and_writes_once(
    write: Callable[..., None], rows: int, launch: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, step, state = _model(write, rows)
    expected = [step() for _ in range(3)]
    _reset(state)
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=(BUDGET if rows < 100 else 600 << 10)))
    found = [step()]
    known = hetegen_compile.schedules()
    failing = Fails(_accelerator(backend), launch)
    with caplog.at_level(logging.WARNING, logger="hetegen_compile"):
        found += [step(), step()]
    assert failing.times == 0, "it did fail"
    for result, right in zip(found, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-5)
    assert any("run again" in record.message for record in caplog.records)
    (schedule,) = new_schedules(known)
    assert "found no memory" in schedule.explain()
    assert schedule.budget_bytes < (BUDGET if rows < 100 else 600 << 10)


def test_what_must_not_be_written_twice_is_not() -> None:
    """A cache too large to be copied before each step, whose roll has begun when memory runs out."""
    model, step, state = _model(rolled, 1024)
    expected = [step(), step()]
    _reset(state)
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=64 << 20))
    torch.testing.assert_close(step(), expected[0], rtol=1e-4, atol=1e-5)
    Fails(_accelerator(backend), 3, before=lambda: state[0].add_(0))
    with pytest.raises(AcceleratorMemoryError, match="cannot be run again"):
        step()
    torch.testing.assert_close(step(), expected[1], rtol=1e-4, atol=1e-5)


def test_a_second_failure_is_the_callers() -> None:
    model, step, state = _model(overwritten, 16)
    expected = step()
    _reset(state)
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
    step()
    _reset(state)
    Fails(_accelerator(backend), 3, times=2)
    with pytest.raises(AcceleratorMemoryError, match="found no memory"):
        step()
    assert not state[1].any(), "the counter is where it was"
    torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-5)


def test_memory_that_somebody_else_took_is_not_counted_on() -> None:
    torch.manual_seed(0)
    model, backend, x = Mlp(8).eval(), RecordingBackend(), random(2, WIDTH)
    known = hetegen_compile.schedules()
    with torch.no_grad():
        expected = model(x)
        model.compile(backend=backend, options=emulated(gpu_memory=80 << 10, split=0.0))
        model(x)
        before = new_schedules(known)[-1].resident_bytes
        accelerator = _accelerator(backend)
        left = 40 << 10
        accelerator.withdraw_memory(accelerator.memory_bytes - left)
        accelerator.counters.peak_bytes = 0
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        schedule = new_schedules(known)[-1]
        assert 0 < schedule.resident_bytes < before
        assert schedule.accelerator_peak_bytes <= left
        accelerator.withdraw_memory(left - 1000)
        with pytest.raises(AcceleratorMemoryError, match="nor does it fit with fewer .*smallest budget"):
            model(x)


def test_random_numbers_are_drawn_as_if_there_had_been_no_failure() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = Mlp(2), Mlp(2)

        def forward(self, x: Tensor) -> Any:
            return self.after(self.before(x) + torch.rand(x.shape))

    torch.manual_seed(0)
    model, backend = Noisy().eval(), RecordingBackend()

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            return [model(random(2, WIDTH)) for _ in range(2)]

    expected = run()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
    run()
    Fails(_accelerator(backend), 6)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
