"""Prefetches that would keep a large activation from going up are issued behind it.

Why: what the host makes of a prompt is too large to be read in place, so it goes up by the link's queue, behind the
prefetches that were issued before. As many of those as the ring holds may be, and while they come the host and the
accelerator wait for each other. So before a host part only as many are issued as keep the link at work until the host
is done; the others follow its result.

Before (``u`` waits for both prefetches):          After:

    t = prefetch(w, ...)                               t = prefetch(w, ...)
    t2 = prefetch(w2, ...)                             h = host_linear(...)        # as long as t takes
    h = host_linear(...)                               u = to_accelerator([h])
    u = to_accelerator([h])                            t2 = prefetch(w2, ...)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import INPUT_OPS
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.findings import Work
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.precedence import Precedence


def large_results(nodes: Iterable[fx.Node], context: Context) -> list[fx.Node]:
    """The transfers up of results of the host's parts that queue on the link."""
    sent = large_uploads(nodes, context)
    return [node for node in sent if any(made.target in ir.HOST_PARTS for made in node.all_input_nodes)]


def large_uploads(nodes: Iterable[fx.Node], context: Context) -> list[fx.Node]:
    """The transfers up that queue on the link."""
    sent = [node for node in nodes if node.target == ir.TO_ACCELERATOR]
    return [node for node in sent if node_work(node, context).resource == "up"]


class HeldPrefetches:
    """The step as it is issued, node by node, on a clock of its resources.

    ``any`` says whether one was held back. Where nothing large goes up none is, and no clock is kept.
    """

    def __init__(self, nodes: Sequence[fx.Node], tasks: Precedence, context: Context) -> None:
        self._tasks = tasks
        self._context = context
        self._work: dict[fx.Node, Work] = {}
        self._end_s: dict[fx.Node, float] = {}
        self._free_s: dict[str, float] = {}
        self._issued_s = 0.0
        self._uploads = deque(large_results(nodes, context))
        self._needed: set[fx.Node] | None = None
        self.any = False

    def issued(self, node: fx.Node) -> None:
        """Enter the next node of the step."""
        if not self._uploads:
            return
        work = self._work_of(node)
        self._issued_s += work.issue_s
        ready_s = max([self._issued_s, self._free_s.get(work.resource, 0.0), *map(self._end, node.all_input_nodes)])
        self._end_s[node] = self._free_s[work.resource] = ready_s + work.seconds
        if work.resource == "host":
            self._issued_s = self._end_s[node]
        if self._needed is not None:
            self._needed.discard(node)
        if node.target == ir.TO_ACCELERATOR and node in self._uploads:
            self._uploads.remove(node)
            self._needed = None

    def holds(self, node: fx.Node) -> bool:
        """Whether a node is a prefetch that the next large upload should go before."""
        if node.target != ir.PREFETCH or not self._uploads:
            return False
        if self._needed is None:
            self._needed = self._needed_for(self._uploads[0])
        needed = self._needed
        held = node not in needed and self._free_s.get("up", 0.0) >= self._made_at_s(needed)
        self.any |= held
        return held

    def _made_at_s(self, needed: set[fx.Node]) -> float:
        """About when the host has made what goes up: what it still needs takes place one after the other."""
        begin_s, seconds = self._issued_s, 0.0
        for node in needed:
            begin_s = max([begin_s, *(self._end_s.get(one, 0.0) for one in node.all_input_nodes)])
            seconds += self._work_of(node).seconds
        return begin_s + seconds

    def _needed_for(self, upload: fx.Node) -> set[fx.Node]:
        """What has to be issued before it and is not yet, without what is streamed."""
        found: set[fx.Node] = set()
        pending = [upload]
        while pending:
            before = self._tasks.before[pending.pop()]
            earlier = [one for one in before if one not in found and one not in self._end_s]
            found.update(earlier)
            pending += earlier
        return found

    def _end(self, node: fx.Node) -> float:
        """When a value is there; a wait that is issued with its reader ends with what it waits for."""
        if node in self._end_s or node.op in INPUT_OPS:
            return self._end_s.get(node, 0.0)
        return max(map(self._end, node.all_input_nodes), default=0.0)

    def _work_of(self, node: fx.Node) -> Work:
        if node not in self._work:
            self._work[node] = node_work(node, self._context)
        return self._work[node]


__all__ = ["HeldPrefetches", "large_results", "large_uploads"]
