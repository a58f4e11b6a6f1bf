"""What random models found once, in its smallest form."""

from __future__ import annotations

import pytest
import torch

from tests.properties.compare import Case, check
from tests.properties.programs import Program, Result, Step


def _case(**changes: object) -> Case:
    fields: dict[str, object] = {
        "dtype": torch.float32, "dynamic": None, "sizes": ((2, 3), (2, 3)), "split": 0.5, "room": 0.0, "seed": None,
        "inference_mode": False, **changes,
    }  # fmt: skip
    return Case(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("inference_mode", [False, True])
def test_random_draws_keep_their_order(inference_mode: bool) -> None:
    """A draw that nothing reads was moved behind one that something reads."""
    steps = (Step("noise", (0,)), Step("linear", (0,), (0,)), Step("noise", (2,)))
    (schedule,) = check(Program(33, ((64, 33),), steps, (Result("value", 3),)), _case(inference_mode=inference_mode))
    assert schedule.host_bytes > 0
    assert schedule.streamed_bytes > 0


@pytest.mark.parametrize("split", [1.0, 0.5, 0.0])
def test_a_linears_result_may_be_written_in_place(split: float) -> None:
    """A Linear that is wholly on the host left a view of the host's result, which a segment then wrote."""
    steps = (Step("linear", (0,), (0,)), Step("write", (1, 1), (), 2), Step("activation", (1,), (), 2))
    (schedule,) = check(Program(64, ((24, 64),), steps, (Result("value", 2),)), _case(split=split))
    assert (schedule.host_bytes > 0, schedule.streamed_bytes > 0) == (split > 0, split < 1)


def test_a_forward_that_outgrows_its_budget_names_one_that_works() -> None:
    steps = (Step("linear", (0,), (0,)), Step("cache", (0,), (), 1), Step("linear", (0,), (0,)))
    schedules = check(
        Program(64, ((64, 64),), steps, (Result("value", 3), Result("value", 2))),
        _case(sizes=((1, 1), (3, 9), (1, 2)), dynamic=True),
    )
    assert sum(schedule.streamed_bytes for schedule in schedules) > 0
