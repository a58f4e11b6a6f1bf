"""Host work that only completes the results: it fits into the waits of the host instead of following the step.

Why: a cache that grows is returned to the caller, so the host appends the new keys and values to its copy, too. Nothing
on the accelerator needs that. At the end of the step it would come on top of everything; but the host waits for the
accelerator after each Linear that it took part in, and there the appending of a layer costs little or nothing. So
``insert_transfers`` lets such values come down with an activation, or some of them together, and ``reorder`` issues
their readers after the host parts that the same transfer is for and before the host waits for a later one. A transfer
that is for no host part comes behind the parts of the one before it: its source may be far from ready (attention beside
an MLP that reads the same input), and the host would wait for it with work at hand.

What needs nothing of the step (positions of the new tokens) could be anywhere. It is done where what needs it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import info
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.precedence import Precedence

RUN_AHEAD = 4
"""Downloads under way at once, after which the work that the first is for has to be done: each keeps its sources."""


def late_readers(graph: fx.Graph) -> set[fx.Node]:
    """What comes after the accelerator's last node: the output and the host nodes that only complete it."""
    late: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if info(node).side == "accelerator":
            break
        late.add(node)
    return late


def completing_s(values: Collection[fx.Node], late: Collection[fx.Node], context: Context) -> float:
    """Seconds of the late host nodes that need one of ``values``."""
    needs: set[fx.Node] = set(values)
    pending = list(values)
    while pending:
        found = [user for user in pending.pop().users if user in late and user not in needs and user.op != "output"]
        needs.update(found)
        pending += found
    return sum(node_work(node, context).seconds for node in needs.difference(values))


def complete_early(graph: fx.Graph, tasks: Precedence, context: Context) -> frozenset[fx.Node]:
    """Add edges to ``tasks`` that put completing work where the host waits longest, soon after it can begin.

    Returns that work; the caller ranks it behind accelerator work and before host parts. All other edges lead forward
    in program order, and these lead from what is complete at one place to work at a later place: there is no cycle.
    """
    late = late_readers(graph)
    work = [node for node in graph.nodes if node in late and _is_work(node)]
    if not work:
        return frozenset()
    placing = _Placing(_Waits(graph, context), tasks, context)
    for node in work:
        placing.add(node)
    return placing.complete()


class _Placing:
    """Late work on its way into the host's waits, in program order."""

    def __init__(self, waits: _Waits, tasks: Precedence, context: Context) -> None:
        self._waits = waits
        self._tasks = tasks
        self._context = context
        self._complete: dict[fx.Node, int] = {}
        self._free: dict[fx.Node, None] = {}

    def add(self, node: fx.Node) -> None:
        """Place a node, or leave it to what needs it if it could be at any place."""
        if all(one in self._free or self._waits.precedes(one) for one in self._tasks.before[node]):
            self._free[node] = None
        else:
            self._place(node)

    def complete(self) -> frozenset[fx.Node]:
        """All that has a place, once what nobody needed has one, too."""
        for node in self._free:
            if node not in self._complete:
                self._place(node)
        return frozenset(self._complete)

    def _place(self, node: fx.Node) -> None:
        """In one of the next waits after it can begin, together with what it needs that could be at any place."""
        group = self._free_before(node, {})
        group[node] = None
        before = {one for member in group for one in self._tasks.before[member]} - group.keys()
        ready = max((self._complete.get(one, self._waits.place[one]) for one in before), default=0)
        wait = self._waits.take(ready, sum(node_work(one, self._context).seconds for one in group))
        if wait is None:
            return
        for one in group:
            self._complete[one] = max([ready, *(self._waits.place[part] for part in wait.parts)])
            for part in wait.parts:
                self._tasks.add(part, one)
            for behind in wait.behind:
                self._tasks.add(one, behind)

    def _free_before(self, node: fx.Node, found: dict[fx.Node, None]) -> dict[fx.Node, None]:
        """What has no place yet and comes before ``node``, in order: each behind what it needs."""
        for one in self._tasks.before[node]:
            if one in self._free and one not in self._complete and one not in found:
                self._free_before(one, found)
                found[one] = None
        return found


def _is_work(node: fx.Node) -> bool:
    """Whether a late node computes on the host or keeps its result, and is no transfer."""
    return info(node).side == "host" and node.target not in (ir.TO_HOST, ir.WAIT_HOST) and node.op != "output"


@dataclass
class _Wait:
    """What the host has to wait after the host parts that a download is for, until the next download can begin.

    ``parts`` are those of the last download before it, if it is for none. ``meanwhile`` is what the accelerator does,
    ``taken_s`` what has been put there already. ``behind`` is accelerator work that comes after the last download
    before which the host must be done.
    """

    parts: list[fx.Node]
    meanwhile: list[fx.Node]
    behind: list[fx.Node]
    context: Context
    taken_s: float = 0.0

    @property
    def left_s(self) -> float:
        """What the accelerator does meanwhile, less what has been put there."""
        return self._meanwhile_s - self.taken_s

    @cached_property
    def _meanwhile_s(self) -> float:
        return sum(node_work(node, self.context).seconds for node in self.meanwhile)


class _Waits:
    """The host's waits in program order, as far as the accelerator's own work makes them."""

    def __init__(self, graph: fx.Graph, context: Context) -> None:
        self.place = {node: position for position, node in enumerate(graph.nodes)}
        downloads = graph.find_nodes(op="call_function", target=ir.TO_HOST)
        busy = [node for node in graph.nodes if node.op == "call_module" or node.target in ir.ACCELERATOR_PARTS]
        parts_of = _host_parts(graph)
        parts: list[list[fx.Node]] = []
        for download in downloads:
            parts.append(parts_of[download] or (parts[-1] if parts else []))
        self._begins = [self.place[download] for download in downloads]
        self._waits = [
            _Wait(
                parts=parts[i],
                meanwhile=self._between(busy, download, following),
                behind=self._first_after(busy, downloads[i + RUN_AHEAD :]),
                context=context,
            )
            for i, (download, following) in enumerate(pairwise([*downloads, None]))
        ]

    def precedes(self, node: fx.Node) -> bool:
        """Whether a node has its place before all waits."""
        return not self._begins or self.place[node] < self._begins[0]

    def take(self, ready: int, seconds: float) -> _Wait | None:
        """The wait with most room of the next ones after place ``ready``, its room less ``seconds``; None if there is
        no wait."""
        if not self._waits:
            return None
        first = max(0, bisect_right(self._begins, ready) - 1)
        found = max(self._waits[first : first + RUN_AHEAD], key=lambda wait: wait.left_s)
        found.taken_s += seconds
        return found

    def _between(self, busy: list[fx.Node], download: fx.Node, following: fx.Node | None) -> list[fx.Node]:
        """Accelerator work that the next download waits for and that does not run beside host parts."""
        end = len(busy) if following is None else bisect_right(busy, following)
        beside = {operand for one in (download, following) if one is not None for operand in one.all_input_nodes}
        between = busy[bisect_right(busy, download) : end]
        return [node for node in between if node.target not in ir.ACCELERATOR_PARTS or node.args[0] not in beside]

    def _first_after(self, busy: list[fx.Node], downloads: list[fx.Node]) -> list[fx.Node]:
        first = bisect_right(busy, downloads[0]) if downloads else len(busy)
        return busy[first : first + 1]


def _host_parts(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The host's parts of Linears by the last download that they need, directly or through other host work.

    Those of a block follow each other: the last one reads what the host makes of the others' results.
    """
    found: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.find_nodes(op="call_function", target=ir.TO_HOST)}
    last: dict[fx.Node, fx.Node] = {download: download for download in found}
    place = {download: position for position, download in enumerate(found)}
    for node in graph.nodes:
        needed = [last[operand] for operand in node.all_input_nodes if operand in last]
        if needed and node not in found and info(node).side == "host":
            last[node] = max(needed, key=place.__getitem__)
            if node.target in ir.HOST_PARTS:
                found[last[node]].append(node)
    return found


__all__ = ["RUN_AHEAD", "complete_early", "completing_s", "late_readers"]
