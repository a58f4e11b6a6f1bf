"""Repeats, budgets and medians, by a clock of the tests' own; no real time is measured."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hetegen_compile.calibration.timing import MAX_REPEATS, Effort, durations_s, median_s, plain_torch
from tests.calibration.tiny import Clock


def effort_with(clock: Clock, *, budget_s: float, repeats: int = 3) -> Effort:
    return Effort(clock=clock, budget_s=budget_s, repeats=repeats)


def test_the_minimum_of_calls_is_made_however_slow_they_are() -> None:
    clock, calls = Clock(), list[int]()

    def slow(index: int) -> None:
        calls.append(index)
        clock.advance(10.0)

    assert durations_s(slow, effort_with(clock, budget_s=1.0)) == [10.0] * 3
    assert calls == [0, 0, 1, 2]  # a warm-up, then in turn


def test_calls_go_on_until_the_budget_is_spent() -> None:
    clock = Clock()
    assert len(durations_s(lambda _: clock.advance(0.125), effort_with(clock, budget_s=1.0))) == 8


def test_calls_that_take_no_time_end_and_have_a_positive_duration() -> None:
    durations = durations_s(lambda _: None, effort_with(Clock(), budget_s=1.0))
    assert len(durations) == MAX_REPEATS
    assert min(durations) > 0


def test_the_median_ignores_an_outlier_and_the_warm_up() -> None:
    clock, seconds = Clock(), iter([99.0, 1.0, 50.0, 2.0])
    assert median_s(lambda: clock.advance(next(seconds)), effort_with(clock, budget_s=0.0)) == 2.0


def test_plain_torch_leaves_fake_tensors_gradients_and_autocast() -> None:
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(torch.ones(2), FakeTensor)
        with plain_torch():
            product = torch.ones((2, 2), requires_grad=True) @ torch.ones((2, 2))
            assert not isinstance(product, FakeTensor)
            assert product.dtype == torch.float32
            assert not product.requires_grad
        assert isinstance(torch.ones(2), FakeTensor)
