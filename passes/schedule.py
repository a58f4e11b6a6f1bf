"""The issue order: which operation the host thread issues when, and which slot each prefetch gets.

Why: the order of nodes is the order of issue, and the host thread is also the host's worker. So whatever
runs by itself is issued before the host starts to compute: prefetches as soon as their slot is free, then
downloads and accelerator work, host work last. Waits of the host come when nothing else can be issued.

Before:                                       After (two slots):

    t = prefetch(w, ...)                          t = prefetch(w, ..., offset=0, after=[])
    s = partial_linear(x, wait(t), ...)           t2 = prefetch(w2, ..., offset=4096, after=[])
    release(t)                                    d = to_host([x])
    d = to_host([x]); v = wait_host(d)            s = partial_linear(x, wait(t), ...)
    h = host_linear(v[0], ...)                    r = release(t)
    t2 = prefetch(w2, ...)                        t3 = prefetch(w3, ..., offset=0, after=[r])
    ...                                           v = wait_host(d); h = host_linear(v[0], ...)
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from itertools import pairwise, takewhile
from typing import Any

from torch import fx

from hetegen_compile import ir
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import info
from hetegen_compile.passes.choose_residency import SLOT_ALIGNMENT, aligned
from hetegen_compile.passes.completing import RUN_AHEAD, complete_early
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.fit_ring import LEAST_USED
from hetegen_compile.passes.hold_prefetches import HeldPrefetches
from hetegen_compile.passes.insert_transfers import operand_side
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.precedence import Precedence
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.tensors import tensors_in

_RANK: dict[Any, int] = {
    ir.MIRROR: 0,
    ir.RESIDENT: 0,
    ir.STAGE: 1,
    ir.PREFETCH: 1,
    ir.TO_HOST: 2,
    ir.TO_ACCELERATOR: 2,
}
_ACCELERATOR_RANK = 3
_COMPLETING_RANK = 4
_HOST_RANK = 5

_PARTS = (*ir.HOST_PARTS, *ir.ACCELERATOR_PARTS)
_WAITS = (ir.WAIT, ir.WAIT_HOST, ir.WAIT_ACCELERATOR)

PINNED_WINDOW = 4
"""Slots of the largest size that the pinned ring holds."""


def schedule(module: fx.GraphModule, context: Context) -> None:
    """Assign slots and put the graph's nodes into issue order."""
    residency = require(context.residency, "choose_residency")
    sizes = [slot_bytes(node) for node in module.graph.find_nodes(op="call_function", target=ir.PREFETCH)]
    assign_slots(module.graph, shortest_ring(sizes, residency.ring_bytes))
    assign_slots(module.graph, pinned_ring_bytes(module.graph), ir.STAGE, freed_by=prefetch_of)
    program = list(module.graph.nodes)
    if reorder(module.graph, context):
        _take_the_shorter(module, program, context)


def _take_the_shorter(module: fx.GraphModule, program: list[fx.Node], context: Context) -> None:
    """The order that the nodes are in, or that in which no prefetch is held back; ``program`` is that of before."""
    held, held_s = list(module.graph.nodes), predict_step(module, context).step_s
    _put(module.graph, program)
    reorder(module.graph, context, hold=False)
    if held_s <= predict_step(module, context).step_s:
        _put(module.graph, held)


def _put(graph: fx.Graph, order: list[fx.Node]) -> None:
    output = graph.output_node()
    for node in order:
        if node is not output:
            output.prepend(node)


def assign_slots(
    graph: fx.Graph, ring_bytes: int, target: Any = ir.PREFETCH, freed_by: Callable[[fx.Node], fx.Node] | None = None
) -> None:
    """Give each prefetch an offset in the staging ring and the releases that it has to wait for.

    Slots follow each other around the ring in the order of use. A prefetch waits for the releases of
    the slots whose bytes it overwrites; older ones are covered because prefetches are issued in order.
    The same for stages in the pinned ring, whose slots are freed by the prefetch that reads them.
    """
    freed_by = freed_by or release_of
    live: list[tuple[int, int, fx.Node]] = []
    head = 0
    for fill in graph.find_nodes(op="call_function", target=target):
        nbytes = slot_bytes(fill)
        if nbytes > ring_bytes:
            raise ScheduleError(f"{fill.name} needs a slot of {nbytes} bytes; the ring has {ring_bytes}")
        lo = head if head + nbytes <= ring_bytes else 0
        hi = lo + nbytes
        overwritten = [slot for slot in live if slot[0] < hi and lo < slot[1]]
        live = [slot for slot in live if slot not in overwritten]
        live.append((lo, hi, freed_by(fill)))
        ir.set_args(fill, (*fill.args[:3], lo, [free for _, _, free in overwritten]))
        head = hi


def first_lap(graph: fx.Graph) -> list[fx.Node]:
    """The prefetches up to the first that overwrites a slot of its step: with them the ring is full."""
    prefetches = graph.find_nodes(op="call_function", target=ir.PREFETCH)
    return [*takewhile(lambda prefetch: not prefetch.args[4], prefetches)]


def shortest_ring(sizes: list[int], ring_bytes: int) -> int:
    """The least bytes of a ring in which slots of these sizes take as many laps as in one of ``ring_bytes``.

    The last slot of a step then ends near its end, where the first slot of the next step begins. All of the ring if
    that leaves too much of it unused.
    """
    laps = _laps(sizes, ring_bytes)
    candidates = range(max(sizes, default=0), ring_bytes, SLOT_ALIGNMENT)
    found = bisect_left(candidates, True, key=lambda length: _laps(sizes, length) <= laps)
    used = candidates[found] if found < len(candidates) else ring_bytes
    return used if used >= LEAST_USED * ring_bytes or laps == 1 else ring_bytes


def _laps(sizes: list[int], ring_bytes: int) -> int:
    laps, head = 1, 0
    for nbytes in sizes:
        laps, head = (laps, head + nbytes) if head + nbytes <= ring_bytes else (laps + 1, nbytes)
    return laps


def slot_bytes(prefetch: fx.Node) -> int:
    """Bytes of the slot that a prefetch or a stage fills, rounded up to the ring's alignment."""
    (rows,) = tensors_in(info(prefetch).value)
    return aligned(int(rows.numel()) * rows.element_size())


def release_of(prefetch: fx.Node) -> fx.Node:
    """The release of the slot that a prefetch fills."""
    return next(user for user in prefetch.users if user.target == ir.RELEASE)


def prefetch_of(stage: fx.Node) -> fx.Node:
    """The prefetch that reads what a stage puts into the pinned ring."""
    return next(user for user in stage.users if user.target == ir.PREFETCH)


def pinned_ring_bytes(graph: fx.Graph) -> int:
    """Bytes of the pinned ring: some of the largest slot, so that pin thread and link seldom wait for each other."""
    stages = graph.find_nodes(op="call_function", target=ir.STAGE)
    return PINNED_WINDOW * max(map(slot_bytes, stages), default=0)


def reorder(graph: fx.Graph, context: Context, *, hold: bool = True) -> bool:
    """Sort the nodes topologically, by rank and then by program order among those that are ready.

    Returns whether prefetches were held back for large activations to go up first; not unless ``hold``.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    tasks = task_graph(nodes)
    output = graph.output_node()
    _slots_in_program_order(graph, tasks)
    _inputs_before_prefetches(graph, tasks, context)
    completing = complete_early(graph, tasks, context)
    late = _late_nodes(nodes, tasks)
    key = {node: (_rank(node, completing), position) for position, node in enumerate(nodes)}
    pending: deque[fx.Node] = deque()
    held = HeldPrefetches(nodes if hold else (), tasks, context)
    for node in tasks.order(key, held.holds):
        held.issued(node)
        for wait in _waits_of(node, late):
            output.prepend(wait)
        output.prepend(node)
        if node.target == ir.TO_HOST:
            pending.append(node)
            if len(pending) > RUN_AHEAD:
                _wait_for(pending.popleft(), late, output)
    for wait in _waits_of(output, late):
        output.prepend(wait)
    return held.any


def _wait_for(download: fx.Node, late: set[fx.Node], output: fx.Node) -> None:
    """Wait for a download now if nothing has yet: what it reads is kept on the accelerator until then."""
    for wait in download.users:
        if wait in late:
            late.remove(wait)
            output.prepend(wait)


def _late_nodes(nodes: list[fx.Node], tasks: Precedence) -> set[fx.Node]:
    """Take the waits that only order their own readers out of ``tasks``: each is issued just before its first reader.

    A wait holds up everything that is issued to its stream (or to the host) after it.
    """
    late: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.target not in _WAITS and not (node.target is operator.getitem and _source(node).target in _WAITS):
            continue
        others = tasks.after[node] - node.users.keys() - _readers_of_late(node, late)
        if all(other.target == ir.RELEASE for other in others):  # a release follows the readers anyway
            tasks.bypass(node)
            late.add(node)
    return late


def _readers_of_late(node: fx.Node, late: set[fx.Node]) -> set[fx.Node]:
    """Readers of the late nodes that read ``node`` (they took over its edges)."""
    return {reader for user in node.users if user in late for reader in user.users}


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _waits_of(node: fx.Node, late: set[fx.Node]) -> list[fx.Node]:
    """The late nodes that ``node`` reads and that are not issued yet, in order."""
    found: list[fx.Node] = []
    for operand in node.all_input_nodes:
        if operand in late:
            late.remove(operand)
            found += [*_waits_of(operand, late), operand]
    return found


def _slots_in_program_order(graph: fx.Graph, tasks: Precedence) -> None:
    """Prefetches follow each other, and so do stages: a slot's place in its ring is only right in that order."""
    for target in (ir.PREFETCH, ir.STAGE):
        for before, after in pairwise(graph.find_nodes(op="call_function", target=target)):
            tasks.add(before, after)


def _inputs_before_prefetches(graph: fx.Graph, tasks: Precedence, context: Context) -> None:
    """What the accelerator begins with goes up first if it is so large that it queues with the prefetches.

    A prompt's embeddings would come behind as many of those as the ring holds. Only what is needed before the first
    prefetch is (that keeps all edges in program order), and the link waits neither for Linears nor longer than it would
    take to fill the ring.
    """
    prefetches = graph.find_nodes(op="call_function", target=ir.PREFETCH)
    fills = [*graph.find_nodes(op="call_function", target=ir.STAGE)[:1], *prefetches[:1]]
    ring_s = sum(node_work(node, context).seconds for node in first_lap(graph))
    before: set[fx.Node] = set()
    for node in graph.nodes:
        if node in fills:
            return
        if node.target == ir.TO_ACCELERATOR and node_work(node, context).resource == "up":
            before |= tasks.needed_for(node)
            seconds = sum(node_work(one, context).seconds for one in before)
            if seconds >= ring_s or any(one.target in _PARTS for one in before):
                return
            for first in fills:
                tasks.add(node, first)


def task_graph(nodes: list[fx.Node]) -> Precedence:
    """Every order that has to hold: data, slots' readers before their release, in-place writes."""
    tasks = Precedence(nodes)
    for node in nodes:
        readers = _slot_readers(node) if node.target == ir.RELEASE else ()
        for before in (*node.all_input_nodes, *readers):
            if before in tasks.before:
                tasks.add(before, node)
    for before, after in _write_edges(nodes):
        tasks.add(before, after)
    return tasks


def _slot_readers(release: fx.Node) -> list[fx.Node]:
    (transfer,) = release.all_input_nodes
    waits = [user for user in transfer.users if user.target == ir.WAIT]
    return [reader for wait in waits for reader in (wait, *wait.users)]


def _write_edges(nodes: list[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Readers before the next write of a storage, writes before the next readers; each side by itself."""
    written = {(info(node).side, key) for node in nodes for key in info(node).writes}
    if not written:
        return []
    last_write: dict[tuple[str | None, int], fx.Node] = {}
    readers: dict[tuple[str | None, int], list[fx.Node]] = {}
    edges: list[tuple[fx.Node, fx.Node]] = []
    for node in nodes:
        writes = {(info(node).side, key) for key in info(node).writes}
        for key in _reads(node) & written - writes:
            edges += [(last_write[key], node)] if key in last_write else []
            readers.setdefault(key, []).append(node)
        for key in writes:
            edges += [(before, node) for before in (*readers.pop(key, ()), last_write.get(key)) if before is not None]
            last_write[key] = node
    return [(before, after) for before, after in edges if before is not after]


def _reads(node: fx.Node) -> set[tuple[str | None, int]]:
    """Storages, with their side, that the node reads; a download reads until its wait."""
    if node.target == ir.WAIT_HOST:
        (transfer,) = node.all_input_nodes
        return {("accelerator", key) for operand in transfer.all_input_nodes for key in info(operand).storages}
    side = {operand: operand_side(node, operand) for operand in node.all_input_nodes}
    if node.target == ir.TO_HOST:
        side = dict.fromkeys(side, "accelerator")
    return {(side[operand], key) for operand in side for key in info(operand).storages}


def _rank(node: fx.Node, completing: frozenset[fx.Node]) -> int:
    if node in completing:
        return _COMPLETING_RANK
    rank = _RANK.get(node.target)
    if rank is not None:
        return rank
    return _ACCELERATOR_RANK if info(node).side == "accelerator" else _HOST_RANK


__all__ = [
    "PINNED_WINDOW",
    "assign_slots",
    "first_lap",
    "pinned_ring_bytes",
    "release_of",
    "reorder",
    "schedule",
    "slot_bytes",
    "task_graph",
]
