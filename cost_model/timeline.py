"""Discrete-event simulation of one step: when each task runs on its resource.

The model of an asynchronous device: one host thread issues the tasks in order; each resource executes its
tasks in that order; a task starts once it has been issued, its resource is free and everything in ``after``
has ended. Tasks on ``HOST`` are executed by the issuing thread itself, so nothing is issued meanwhile.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hetegen_compile.errors import ScheduleError

HOST = "host"
"""The resource whose tasks block the issuing thread."""


class Task(NamedTuple):
    """One operation; its id is its position in the issue order. (A tuple: a search makes hundreds of thousands.)

    Attributes:
        name: for reports and errors.
        resource: "host", "accelerator", "up", "down", "pin" or any other name.
        duration_s: how long it occupies its resource.
        after: ids of the earlier tasks that must have ended.
        issue_s: what issuing it costs the host thread.
    """

    name: str
    resource: str
    duration_s: float
    after: tuple[int, ...] = ()
    issue_s: float = 0.0

    def behind(self, after: tuple[int, ...]) -> Task:
        """The same task waiting for others (``_replace`` takes twice as long)."""
        return Task(self.name, self.resource, self.duration_s, after, self.issue_s)


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes:
        tasks: in issue order.
        start_s, end_s: by task id, in seconds from the first issue.
    """

    tasks: Sequence[Task]
    start_s: tuple[float, ...]
    end_s: tuple[float, ...]

    @property
    def makespan_s(self) -> float:
        """End of the last task."""
        return max(self.end_s, default=0.0)

    @property
    def busy_s(self) -> dict[str, float]:
        """By resource, the time that it works; the host's includes issuing."""
        return busy_s(self.tasks)


def simulate(tasks: Sequence[Task]) -> Timeline:
    """Run the tasks in issue order.

    Raises ScheduleError for a task that waits for itself or a later one (the device would deadlock) and
    for times that are negative or not finite.
    """
    _check(tasks)
    start_s: list[float] = []
    end_s: list[float] = []
    free_at_s: dict[str, float] = defaultdict(float)
    issued_s = 0.0
    for _, resource, duration_s, after, issue_s in tasks:
        issued_s += issue_s
        begin = max(issued_s, free_at_s[resource])
        for earlier in after:
            if end_s[earlier] > begin:
                begin = end_s[earlier]
        end = begin + duration_s
        start_s.append(begin)
        end_s.append(end)
        free_at_s[resource] = end
        if resource == HOST:
            issued_s = end
    return Timeline(tasks, tuple(start_s), tuple(end_s))


def _check(tasks: Sequence[Task]) -> None:
    for index, task in enumerate(tasks):
        if not (0.0 <= task.duration_s < math.inf and 0.0 <= task.issue_s < math.inf):
            times = f"duration {task.duration_s}, issue {task.issue_s}"
            raise ScheduleError(f"task {index} ({task.name}): {times}; both must be finite and not negative")
        for earlier in task.after:
            if not 0 <= earlier < index:
                raise ScheduleError(f"task {index} ({task.name}) waits for {earlier}, not issued before it")


def busy_s(tasks: Iterable[Task]) -> dict[str, float]:
    """By resource, the time that it works; the host's includes issuing."""
    seconds: dict[str, float] = defaultdict(float)
    for task in tasks:
        seconds[task.resource] += task.duration_s
        if task.issue_s:
            seconds[HOST] += task.issue_s
    return dict(seconds)
