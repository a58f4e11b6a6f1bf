"""How long a step of the scheduled graph takes: its operations as tasks of the timeline's simulation.

Where the end of a step prefetches for the next one, it is the second of two consecutive steps: the host
begins it when everything of the first is over but those prefetches.

Why: the scheduler is judged by it, the table shows it, and the emulated accelerator paces itself to the
same seconds, so that a prediction and a measurement are about the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from torch import fx

from hetegen_compile import ir
from hetegen_compile.cost_model import Task, simulate
from hetegen_compile.cost_model.timeline import HOST, busy_s
from hetegen_compile.ir import info
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.findings import Prediction, Work
from hetegen_compile.passes.node_work import lost_s, node_work

_FEEDS = {ir.STAGE, ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED}
"""What the link works for, and the pin thread."""

_IDLE = 0.01  # of the step: a lane that idles for less works all the time


def predict_step(module: fx.GraphModule, context: Context) -> Prediction:
    """Simulate one step of a scheduled graph on the context's hardware."""
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    work = {node: node_work(node, context) for node in nodes}
    if context.profile.link.contention < 1.0:
        _slow_down_link(work, context)
    index = {node: position for position, node in enumerate(nodes)}
    tasks = [_task(node, work[node], index) for node in nodes]
    step = _step(nodes, tasks)
    while clashes := _read_at_once(nodes, step):
        tasks = _one_behind_the_other(tasks, clashes)
        step = _step(nodes, tasks)
    return Prediction(
        work=work,
        start_s=dict(zip(nodes, step.start_s, strict=True)),
        end_s=dict(zip(nodes, step.end_s, strict=True)),
        step_s=step.seconds,
        busy_s=step.busy_s,
        beside_link_s=_at_once(nodes, tasks).seconds if step.link_is_busy else step.seconds,
    )


def _slow_down_link(work: dict[fx.Node, Work], context: Context) -> None:
    """What is streamed takes longer by what the link loses while the host reads weights, each prefetch as much.

    Where the host reads longer than the link works, all of the link's work is beside it.
    """
    fed = [node for node in work if node.target in (ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED)]
    link_s = sum(work[node].seconds for node in fed if node.target != ir.PREFETCH_AHEAD)  # carried in the next step
    all_lost_s = sum(lost_s(node, context) for node in work if node.target in ir.HOST_PARTS)
    longest = 1.0 / context.profile.link.contention
    longer = min(longest, 1.0 + all_lost_s / link_s) if link_s > 0 else longest
    for node in fed:
        work[node] = work[node]._replace(seconds=longer * work[node].seconds)


class _Step(NamedTuple):
    """A simulated step; ``start_s`` and ``end_s`` by task."""

    start_s: Sequence[float]
    end_s: Sequence[float]
    seconds: float
    busy_s: Mapping[str, float]

    @property
    def link_is_busy(self) -> bool:
        """Whether link or pin thread work all the time."""
        return max(self.busy_s.get(lane, 0.0) for lane in ("up", "pin")) > (1 - _IDLE) * self.seconds


def _at_once(nodes: list[fx.Node], tasks: list[Task]) -> _Step:
    """The step if what is streamed takes no time."""
    pairs = zip(nodes, tasks, strict=True)
    return _step(nodes, [task._replace(duration_s=0.0) if node.target in _FEEDS else task for node, task in pairs])


def _step(nodes: list[fx.Node], tasks: list[Task]) -> _Step:
    if any(node.target == ir.CARRIED for node in nodes):
        return _second_of_two(nodes, tasks)
    timeline = simulate(tasks)
    return _Step(timeline.start_s, timeline.end_s, timeline.makespan_s, timeline.busy_s)


def _task(node: fx.Node, work: Work, index: Mapping[fx.Node, int]) -> Task:
    after = tuple(index[operand] for operand in node.all_input_nodes if operand in index)
    return Task(node.name, work.resource, work.seconds, after, work.issue_s)


def _read_at_once(nodes: list[fx.Node], step: _Step) -> list[tuple[int, int]]:
    """Parts of Linears that the worker and the issuing thread have at the same time, in pairs in issue order.

    Each reads memory at the rate that all of it has.
    """
    parts: tuple[list[int], list[int]] = [], []
    for i, node in enumerate(nodes):
        if node.target in ir.HOST_PARTS:
            parts[info(node).ahead].append(i)
    return [
        (min(i, j), max(i, j))
        for i, j in product(*parts)
        if step.start_s[i] < step.end_s[j] and step.start_s[j] < step.end_s[i]
    ]


def _one_behind_the_other(tasks: list[Task], pairs: Sequence[tuple[int, int]]) -> list[Task]:
    found = list(tasks)
    for earlier, later in pairs:
        found[later] = found[later].behind((*found[later].after, earlier))
    return found


def _second_of_two(nodes: list[fx.Node], first: list[Task]) -> _Step:
    """A step after another one. The first starts its carried prefetches itself; the second finds them started.

    Nobody waits for the prefetches for a third step. No two steps follow each other faster than their busiest
    resource works, so it is not shorter than that.
    """
    border = len(first)
    ahead: list[int] = []
    carried: list[int] = []
    own: list[int] = []
    for i, node in enumerate(nodes):
        (carried if node.target == ir.CARRIED else own).append(i)
        if node.target == ir.PREFETCH_AHEAD:
            ahead.append(i)
    place = dict(zip(own, range(border + 1, border + 1 + len(own)), strict=True))
    place.update(zip(carried, ahead, strict=True))
    waited_for = set(range(border)).difference(ahead)
    over = Task("end of the step", HOST, 0.0, tuple(waited_for))
    second = [first[i].behind(tuple([place[earlier] for earlier in first[i].after])) for i in own]
    timeline = simulate([*first, over, *second])
    begin_s = timeline.end_s[border]
    start_s = [max(0.0, timeline.start_s[place[i]] - begin_s) for i in range(border)]
    end_s = [max(0.0, timeline.end_s[place[i]] - begin_s) for i in range(border)]
    busy = busy_s(second)
    seconds = max([*(end_s[i] for i in waited_for), *busy.values()])
    return _Step(start_s, end_s, seconds, busy)


__all__ = ["predict_step"]
