"""Random models under random budgets, splits, dtypes and shapes: what a caller sees is eager's, the budget holds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties.compare import Case, check
from tests.properties.examples import random_models
from tests.properties.programs import Program, programs

SIZES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3)
SPLITS = st.sampled_from([0.5, "auto", 0.0, 1.0, 0.3])
ROOMS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 50.0]) | st.floats(0, 1)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """How to compile and call a program."""
    sizes = draw(SIZES)
    if draw(st.booleans()):  # the same size each time: one graph
        sizes = [sizes[0]] * len(sizes)
    return Case(
        dtype=draw(DTYPES), dynamic=draw(st.sampled_from([None, True, False])), sizes=tuple(sizes),
        split=draw(SPLITS), room=draw(ROOMS), seed=draw(st.none() | st.integers(0, 100)),
        inference_mode=draw(st.booleans()),
    )  # fmt: skip


@random_models(10)
@given(programs(), cases())
def test_a_random_model_is_like_eager(program: Program, case: Case) -> None:
    """Where the budget leaves no room for all weights, some rows were really computed on the host or streamed."""
    schedules = check(program, case)
    forced = case.split not in ("auto", 0.0) or case.room == 0.0
    on_host = all(schedule.title.endswith("on the host in eager mode") for schedule in schedules)
    if forced and not on_host and not all(schedule.whole_graph for schedule in schedules):
        moved = sum(schedule.host_bytes + schedule.streamed_bytes for schedule in schedules)
        linears = [row for schedule in schedules for row in schedule.rows if row.op == "linear"]
        assert moved > 0 or not linears
