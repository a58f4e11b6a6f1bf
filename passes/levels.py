"""How deep each node of a placed graph lies: the order in which segments, Linears and host nodes can be issued."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import fx

from hetegen_compile.ir import IN_PARTS, info
from hetegen_compile.passes.plans import Placement

_Level = TypeVar("_Level", int, int | None)


class Levels:
    """Which level each node belongs to; ``group_segments`` has the rule.

    A host node that reads an accelerator value and feeds the accelerator again opens a level as a Linear
    does. Host nodes that feed nothing on the accelerator come last.
    """

    def __init__(self, nodes: list[fx.Node], placement: Placement) -> None:
        self._placement = placement
        self._level: dict[fx.Node, int] = {}
        self._host_level: dict[fx.Node, int | None] = {}
        self._writers: dict[int, list[fx.Node]] = {}
        self._feeding = _feeding_accelerator(nodes, placement)
        running = 0
        for node in nodes:
            running = self._assign(node, running)
        self.count = running + 1
        self._linears = _by_level(self._level, [node for node in nodes if node.target in IN_PARTS])
        self._members = _by_level(self._level, [node for node in nodes if node in placement.accelerator])
        self._hosts = _by_level(self._host_level, [node for node in nodes if node in self._host_level])

    def linears(self, level: int) -> list[fx.Node]:
        """What is computed in parts of one level, in program order."""
        return self._linears.get(level, [])

    def members(self, level: int) -> list[fx.Node]:
        """Accelerator nodes of one level in program order."""
        return self._members.get(level, [])

    def hosts(self, level: int | None) -> list[fx.Node]:
        """Host nodes of one level in program order; None: those that feed nothing on the accelerator."""
        return self._hosts.get(level, [])

    def _assign(self, node: fx.Node, running: int) -> int:
        if node.target in IN_PARTS:
            given = [one for one in node.all_input_nodes if one is not node.args[1]]
            self._level[node] = 1 + max(*map(self._depth, given), self._depth_of_writers(given))
            running = max(running, self._level[node])
        if node in self._placement.host:
            running = max(running, self._assign_host(node))
        if node in self._placement.accelerator:
            self._level[node] = running
        for key in info(node).writes:
            self._writers.setdefault(key, []).append(node)
        return running

    def _assign_host(self, node: fx.Node) -> int:
        if node not in self._feeding:
            self._host_level[node] = None
            return 0
        downloads = [n for n in node.all_input_nodes if n in self._level and n not in self._placement.host]
        above = [self._host_level.get(n) or 0 for n in node.all_input_nodes]
        level = max([0, *above, *(self._level[n] + 1 for n in downloads), *self._levels_before(node)])
        self._host_level[node] = level
        return level

    def _levels_before(self, node: fx.Node) -> list[int]:
        """Levels of earlier host nodes that share a storage with ``node`` which one of the two writes."""
        own = info(node).storages | info(node).reads
        levels = []
        for other, level in self._host_level.items():
            theirs = info(other).storages | info(other).reads
            if level is not None and (info(node).writes & theirs or info(other).writes & own):
                levels.append(level)
        return levels

    def _depth(self, node: fx.Node) -> int:
        return max(self._level.get(node, 0), self._host_level.get(node) or 0)

    def _depth_of_writers(self, given: Iterable[fx.Node]) -> int:
        keys = frozenset[int]().union(*(info(node).storages for node in given))
        return max([0, *(self._level.get(w, 0) for key in keys for w in self._writers.get(key, ()))])


def _by_level(level: Mapping[fx.Node, _Level], nodes: Iterable[fx.Node]) -> dict[_Level, list[fx.Node]]:
    found: dict[_Level, list[fx.Node]] = {}
    for node in nodes:
        found.setdefault(level[node], []).append(node)
    return found


def _feeding_accelerator(nodes: list[fx.Node], placement: Placement) -> set[fx.Node]:
    """Host nodes that some accelerator value depends on, through data or through a storage they write."""
    feeding: set[fx.Node] = set()
    touched: set[int] = set()
    written: set[int] = set()
    for node in reversed(nodes):
        if node not in placement.host:
            continue
        direct = node not in placement.accelerator and any(
            user.target in IN_PARTS or user in placement.accelerator for user in node.users
        )
        own = info(node).storages | info(node).reads
        if direct or any(user in feeding for user in node.users) or info(node).writes & touched or own & written:
            feeding.add(node)
            touched |= own
            written |= info(node).writes
    return feeding


__all__ = ["Levels"]
