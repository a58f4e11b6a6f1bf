"""The simulation: order, blocking, memory, and bounds that hold for any tasks."""

from __future__ import annotations

import math
from collections import defaultdict

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.cost_model import Task, simulate
from hetegen_compile.errors import ScheduleError
from tests.cost_model.lower_bound import lower_bound_s

RESOURCES = ("host", "accelerator", "up", "down", "pin")
times = st.just(0.0) | st.floats(1e-6, 10.0)


@st.composite
def task_lists(draw: st.DrawFn) -> list[Task]:
    tasks = []
    for index in range(draw(st.integers(0, 15))):
        after = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        resource = draw(st.sampled_from(RESOURCES))
        tasks.append(Task(f"t{index}", resource, draw(times), tuple(sorted(after)), draw(times)))
    return tasks


def reference(tasks: list[Task]) -> list[tuple[float, float]]:
    """The simulation's definition as equations, relaxed until nothing changes."""
    begin = [0.0] * len(tasks)
    issued = [0.0] * len(tasks)
    for _ in range(len(tasks) + 1):
        end = [begin[i] + tasks[i].duration_s for i in range(len(tasks))]
        for i, task in enumerate(tasks):
            blocked = [end[j] if tasks[j].resource == "host" else issued[j] for j in range(i)]
            issued[i] = max(blocked, default=0.0) + task.issue_s
            same = [end[j] for j in range(i) if tasks[j].resource == task.resource]
            begin[i] = max([issued[i], *same, *(end[j] for j in task.after)])
    return [(begin[i], begin[i] + tasks[i].duration_s) for i in range(len(tasks))]


@given(task_lists())
def test_the_simulation_solves_its_equations(tasks: list[Task]) -> None:
    timeline = simulate(tasks)
    for (start, end), (start_s, end_s) in zip(
        reference(tasks), zip(timeline.start_s, timeline.end_s, strict=True), strict=True
    ):
        assert (start_s, end_s) == pytest.approx((start, end))


@given(task_lists())
def test_dependencies_hold_and_a_resource_does_one_task_at_a_time_in_order(tasks: list[Task]) -> None:
    timeline = simulate(tasks)
    free_at_s: dict[str, float] = defaultdict(float)
    for index, task in enumerate(tasks):
        assert all(timeline.end_s[earlier] <= timeline.start_s[index] for earlier in task.after)
        assert free_at_s[task.resource] <= timeline.start_s[index]
        assert timeline.end_s[index] == timeline.start_s[index] + task.duration_s
        free_at_s[task.resource] = timeline.end_s[index]


@given(task_lists())
def test_no_schedule_beats_the_lower_bound(tasks: list[Task]) -> None:
    timeline = simulate(tasks)
    assert timeline.makespan_s >= lower_bound_s(tasks) * (1 - 1e-9)


@given(task_lists())
def test_the_lower_bound_is_the_larger_of_work_and_longest_path(tasks: list[Task]) -> None:
    work: dict[str, float] = defaultdict(float)
    graph = nx.DiGraph([("begin", "end", {"weight": 0.0})])
    for index, task in enumerate(tasks):
        work[task.resource] += task.duration_s
        work["host"] += task.issue_s
        graph.add_edge("begin", index, weight=task.issue_s)
        graph.add_edge(index, "end", weight=task.duration_s)
        for earlier in task.after:
            graph.add_edge(earlier, index, weight=tasks[earlier].duration_s)
    expected = max([nx.dag_longest_path_length(graph), *work.values()])
    assert lower_bound_s(tasks) == pytest.approx(expected)


def test_independent_resources_work_at_the_same_time() -> None:
    tasks = [Task("copy", "up", 3.0), Task("kernel", "accelerator", 2.0), Task("rows", "host", 4.0)]
    timeline = simulate(tasks)
    assert timeline.start_s == (0.0, 0.0, 0.0)
    assert timeline.makespan_s == 4.0
    assert timeline.busy_s == {"up": 3.0, "accelerator": 2.0, "host": 4.0}


def test_host_work_delays_what_is_issued_after_it() -> None:
    host, copy = Task("rows", "host", 4.0), Task("copy", "up", 3.0)
    assert simulate([host, copy]).makespan_s == 7.0
    assert simulate([copy, host]).makespan_s == 4.0


def test_issuing_takes_the_host_threads_time() -> None:
    copy, kernel = (Task(name, name, 1.0, issue_s=0.5) for name in ("up", "accelerator"))
    timeline = simulate([copy, kernel, Task("rows", "host", 1.0)])
    assert timeline.start_s == (0.5, 1.0, 1.0)
    assert timeline.busy_s == {"up": 1.0, "host": 2.0, "accelerator": 1.0}


def test_a_split_linear_takes_as_long_as_its_longer_side() -> None:
    tasks = [
        Task("prefetch", "up", 5.0),
        Task("to_host", "down", 0.5),
        Task("partial_linear", "accelerator", 1.0, after=(0,)),
        Task("host_linear", "host", 4.0, after=(1,)),
        Task("to_accelerator", "accelerator", 0.25, after=(3,)),
        Task("join", "accelerator", 0.25, after=(2, 4)),
    ]
    timeline = simulate(tasks)
    assert timeline.end_s == (5.0, 0.5, 6.0, 4.5, 6.25, 6.5)
    assert lower_bound_s(tasks) == 6.25


def test_an_empty_step_takes_no_time() -> None:
    timeline = simulate([])
    assert (timeline.makespan_s, timeline.busy_s) == (0.0, {})
    assert lower_bound_s([]) == 0.0


@pytest.mark.parametrize("after", [(1,), (2,), (-1,)])
def test_waiting_for_what_is_not_issued_yet_is_a_deadlock(after: tuple[int, ...]) -> None:
    tasks = [Task("first", "up", 1.0), Task("second", "up", 1.0, after=after), Task("third", "up", 1.0)]
    with pytest.raises(ScheduleError, match=r"task 1 \(second\) waits for"):
        simulate(tasks)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_times_are_finite_and_not_negative(value: float) -> None:
    for task in (Task("odd", "up", value), Task("odd", "up", 1.0, issue_s=value)):
        with pytest.raises(ScheduleError, match=r"task 0 \(odd\)"):
            simulate([task])
