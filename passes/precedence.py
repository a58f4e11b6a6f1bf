"""What has to be issued before what: a directed graph of some ten thousand nodes, made for every schedule simulated.

Plain sets, since that is most of what making a schedule does; its order is that of
``networkx.lexicographical_topological_sort``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import fx

from hetegen_compile.errors import ScheduleError


class Precedence:
    """For each node those right before and right after it."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.before: dict[fx.Node, set[fx.Node]] = {node: set() for node in nodes}
        self.after: dict[fx.Node, set[fx.Node]] = {node: set() for node in self.before}

    def add(self, before: fx.Node, after: fx.Node) -> None:
        """Let ``before`` be issued before ``after``."""
        self.before[after].add(before)
        self.after[before].add(after)

    def needed_for(self, node: fx.Node) -> set[fx.Node]:
        """Everything that has to be issued before a node."""
        found: set[fx.Node] = set()
        pending = [node]
        while pending:
            earlier = self.before[pending.pop()] - found
            found |= earlier
            pending += earlier
        return found

    def bypass(self, node: fx.Node) -> None:
        """Take a node out; what was before it stays before what was after it."""
        earlier, later = self.before.pop(node), self.after.pop(node)
        for other in earlier:
            self.after[other].remove(node)
            self.after[other] |= later
        for other in later:
            self.before[other].remove(node)
            self.before[other] |= earlier

    def order(
        self, key: Mapping[fx.Node, tuple[int, int]], holds: Callable[[fx.Node], bool] = lambda node: False
    ) -> Iterator[fx.Node]:
        """Every node after all that are before it, those that are ready by their (different) keys.

        One that ``holds`` is asked about again when others have been issued; it follows when there are none.

        Raises:
            ScheduleError: some nodes wait for each other.
        """
        waits_for = {node: len(earlier) for node, earlier in self.before.items()}
        ready = [(key[node], node) for node, count in waits_for.items() if not count]
        heapq.heapify(ready)
        held: list[tuple[tuple[int, int], fx.Node]] = []
        while ready or held:
            must = not ready
            first = heapq.heappop(ready if ready else held)
            node = first[1]
            if not must and holds(node):
                heapq.heappush(held, first)
                continue
            del waits_for[node]
            yield node
            while held:
                heapq.heappush(ready, held.pop())
            for later in self.after[node]:
                waits_for[later] -= 1
                if not waits_for[later]:
                    heapq.heappush(ready, (key[later], later))
        if waits_for:
            raise ScheduleError(f"{', '.join(map(str, list(waits_for)[:5]))} wait for each other")


__all__ = ["Precedence"]
