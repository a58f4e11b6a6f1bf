"""What no order of issue can beat, from the tasks alone: an oracle for simulated schedules."""

from __future__ import annotations

from collections.abc import Sequence

from hetegen_compile.cost_model import Task
from hetegen_compile.cost_model.timeline import busy_s


def lower_bound_s(tasks: Sequence[Task]) -> float:
    """Seconds below which no issue order of these tasks can finish.

    The larger of the most loaded resource's work and the critical path, from the tasks alone: no order of
    issue and no state of the simulation enters. A task's path begins with its own issue.
    """
    return max([0.0, _critical_path_s(tasks), *busy_s(tasks).values()])


def _critical_path_s(tasks: Sequence[Task]) -> float:
    """Longest path through ``after``, accumulated from the last task back (``after`` is topological)."""
    tail_s = [0.0] * len(tasks)
    longest_s = 0.0
    for index in range(len(tasks) - 1, -1, -1):
        task = tasks[index]
        path_s = task.duration_s + tail_s[index]
        longest_s = max(longest_s, path_s + task.issue_s)
        for earlier in task.after:
            tail_s[earlier] = max(tail_s[earlier], path_s)
    return longest_s
