"""What a trace shows of an operation: itself, or the parts that it stands for."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.accelerators import Op
from hetegen_compile.rows import Span


def test_an_operation_of_one_node_is_one_span() -> None:
    assert Op("n", parts=("a", "b")).spans("host", 1.0, 3.0) == [Span("n", "host", 1.0, 3.0)]


def test_an_operation_of_several_nodes_is_a_span_of_each() -> None:
    op = Op("c", parts=("a", "b", "c"), shares=lambda: [0.5, 0.0, 0.5])
    assert op.spans("worker", 1.0, 3.0) == [
        Span("a", "worker", 1.0, 2.0), Span("b", "worker", 2.0, 2.0), Span("c", "worker", 2.0, 3.0),
    ]  # fmt: skip


def test_shares_are_those_of_the_run_that_is_over() -> None:
    shares = [0.25, 0.75]
    op = Op("b", parts=("a", "b"), shares=lambda: shares)
    assert [span.end_s for span in op.spans("host", 0.0, 4.0)] == [1.0, 4.0]
    shares.reverse()
    assert [span.end_s for span in op.spans("host", 4.0, 8.0)] == [7.0, 8.0]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8), st.floats(0.0, 1e6), st.floats(1e-6, 10.0))
def test_parts_follow_each_other_and_fill_the_time(weights: list[float], start_s: float, took_s: float) -> None:
    total = sum(weights) or 1.0
    shares = [weight / total for weight in weights] if sum(weights) else [1.0] + [0.0] * (len(weights) - 1)
    op = Op("n", parts=tuple(map(str, range(len(weights)))), shares=lambda: shares)
    spans = op.spans("host", start_s, start_s + took_s)
    assert [span.name for span in spans] == list(op.parts)
    assert all(before.end_s == after.start_s for before, after in pairwise(spans))
    assert all(span.start_s <= span.end_s for span in spans)
    assert spans[0].start_s == start_s
    assert spans[-1].end_s == pytest.approx(start_s + took_s)


def test_every_part_has_a_share() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        Op("b", parts=("a", "b"), shares=lambda: [1.0]).spans("host", 0.0, 1.0)
