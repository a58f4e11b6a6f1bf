"""Host parts are given to a worker thread, so that what needs their results is issued while they are computed.

Why: where the host's thread computes its parts itself, the accelerator's next work is issued behind them, a dozen
operations a layer that the accelerator then waits for. A worker computes instead: its part of a trip is queued as
soon as its download has been started, and the accelerator's stream is closed (a gate) where it waits for what comes
up, until the worker opens it. The issuing thread goes on meanwhile: at most ``WINDOW`` trips ahead, since each keeps
what its download reads, and no further than may lie behind a closed gate (``closed_gates.py``).

Before:                                          After (``|`` marks what the worker does):

    d = to_host([x])                                 d = to_host([x])
    s = partial_linear(x, wait(t), ...)              caught_up(the transfer up of two trips ago)
    v = wait_host(d)                               | v = wait_host(d)
    h = host_linear(v[0], w, None, 0, 64, 0)       | h = host_linear(v[0], w, None, 0, 64, 0)
    u = to_accelerator([h])                        | u = to_accelerator([h])
    a = wait_accelerator(u)                          s = partial_linear(x, wait(t), ...)
    y = join([a[0], s], 0)                           a = wait_accelerator(u)
    ...                                              y = join([a[0], s], 0)

A trip is left to the issuing thread if it is larger than what the accelerator reads in place (a prefill's is), if its
sizes depend on data, or if anything in it is written in place or needed by the host otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import sympy
from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import INPUT_OPS, annotate, info
from hetegen_compile.passes.closed_gates import bound_launches
from hetegen_compile.passes.context import Context, Refusal
from hetegen_compile.passes.resolve_sizes import size_inputs
from hetegen_compile.passes.tensors import symbols_of, tensor_bytes, tensors_in

WINDOW = 2
"""Trips that the issuing thread is ahead of the worker at most: one that is computed and one that waits for it."""

NO_ROOM_AHEAD = "there is no room for the activations that downloads on their way to the worker keep"
_LEFT = (
    f"what they send up is more than {ir.VIEWED_UPLOAD_BYTES >> 10} KiB or of sizes that depend on data, or something "
    "in their trip is written in place or needed on the host otherwise"
)
_NONE = "no Linear has rows on the host"
_LEAN = "the budget holds no more than the leanest schedule"


def issue_ahead(module: fx.GraphModule, context: Context) -> None:
    """Mark the worker's nodes, put each trip's behind what they wait for, and bound how far the issue runs ahead."""
    if not _is_wanted(context):
        return
    if not issues_ahead(context):
        context.refuse(Refusal("issuing ahead of the host's parts", context.cannot_issue_ahead or _LEAN))
        return
    _give_to_worker(module.graph, _trips(module.graph, _worker_nodes(module.graph, context)))
    bound_launches(module, context)
    parts = module.graph.find_nodes(op="call_function", target=ir.HOST_LINEAR)
    left = sum(not info(part).ahead for part in parts)
    if (left or not parts) and context.options.issue_ahead is True:
        reason = f"{left} of {len(parts)} are computed by the issuing thread: {_LEFT}" if parts else _NONE
        context.refuse(Refusal("issuing ahead of the host's parts", reason))


def issues_ahead(context: Context) -> bool:
    """Whether trips that can be are given to the worker."""
    return _is_wanted(context) and not context.cannot_issue_ahead and not context.lean


def _is_wanted(context: Context) -> bool:
    """Whether the options ask for it, or leave it to the profile and that knows what a gate costs."""
    wanted = context.options.issue_ahead
    return bool(context.profile.accelerator.gate_s) if wanted == "auto" else wanted


def _worker_nodes(graph: fx.Graph, context: Context) -> dict[fx.Node, None]:
    """Host parts, what the host computes between them, and the transfers up of their results, in issue order."""
    sizes = frozenset(size_inputs(graph))
    written = ir.written_storages(graph.nodes)
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if _may_compute(node, found) or _may_send(node, found, sizes, context):
            operands = _values_behind(node)
            if not any(info(one).storages & written for one in (node, *operands)):
                found[node] = None
    return _only_needed_there(graph, found)


def _may_compute(node: fx.Node, found: dict[fx.Node, None]) -> bool:
    """A host part, or an operation without effects on something that the worker has computed."""
    if node.target == ir.HOST_LINEAR:
        return True
    notes = info(node)
    pure = notes.side == "host" and not (notes.writes or notes.random or notes.data_dependent)
    own = node.op in ("call_function", "call_method") and getattr(node.target, "namespace", "") != "hetegen"
    return pure and own and any(operand in found for operand in node.all_input_nodes)


def _may_send(node: fx.Node, found: dict[fx.Node, None], sizes: frozenset[sympy.Expr], context: Context) -> bool:
    """A transfer up of nothing but the worker's results, of sizes that the graph is called with, read in place."""
    if node.target != ir.TO_ACCELERATOR or not all(operand in found for operand in node.all_input_nodes):
        return False
    tensors = tensors_in([info(operand).value for operand in node.all_input_nodes])
    known = all(symbols_of(tensor) <= sizes for tensor in tensors)
    return known and 0 < sum(context.room(tensor_bytes(tensor)) for tensor in tensors) <= ir.VIEWED_UPLOAD_BYTES


def _values_behind(node: fx.Node) -> Iterator[fx.Node]:
    """What a node reads; of a downloaded value also what was downloaded."""
    for operand in node.all_input_nodes:
        yield operand
        if (download := download_of(operand)) is not None:
            yield from download.all_input_nodes


def download_of(item: fx.Node) -> fx.Node | None:
    """The download that ``item`` is one value of."""
    wait = item.args[0] if item.target is operator.getitem else None
    if not isinstance(wait, fx.Node) or wait.target != ir.WAIT_HOST:
        return None
    return wait.all_input_nodes[0]


def _only_needed_there(graph: fx.Graph, found: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """Those whose results go to the worker's own nodes only, and transfers of nothing else."""
    kept = dict(found)
    dropped = True
    while dropped:
        dropped = False
        for node in reversed(graph.nodes):
            if node not in kept:
                continue
            sent = node.target == ir.TO_ACCELERATOR
            needs = node.all_input_nodes if sent else list(node.users)
            if not needs or not all(one in kept for one in needs):
                del kept[node]
                dropped = True
    return kept


class _Trip(NamedTuple):
    """Nodes of the worker that belong together, in issue order, the downloads they need, and what they come behind."""

    nodes: list[fx.Node]
    downloads: list[fx.Node]
    behind: fx.Node


def _trips(graph: fx.Graph, nodes: dict[fx.Node, None]) -> list[_Trip]:
    """The worker's trips, in the order in which they can be given to it.

    One that sends up what it itself waits for in between cannot be given to it as a whole, and is left alone.
    """
    place = {node: position for position, node in enumerate(graph.nodes)}
    inputs = [node for node in graph.nodes if node.op in INPUT_OPS]
    found = []
    for group in _groups(nodes):
        downloads = _downloads(group)
        own = {one for node in group for one in node.all_input_nodes if download_of(one) is None} - set(group)
        behind = max((*inputs[-1:], *downloads, *own), key=place.__getitem__)
        readers = [user for node in group if node.target == ir.TO_ACCELERATOR for user in node.users]
        if all(place[behind] < place[reader] for reader in readers):
            found.append(_Trip(sorted(group, key=place.__getitem__), downloads, behind))
    return sorted(found, key=lambda trip: place[trip.behind])


def _groups(nodes: dict[fx.Node, None]) -> list[list[fx.Node]]:
    """Nodes that belong together: one reads the other, or both read one download."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        near = [one if one in nodes else download_of(one) for one in node.all_input_nodes]
        parts = {id(groups[one]): groups[one] for one in near if one is not None and one in groups}
        group = [*dict.fromkeys([*(member for part in parts.values() for member in part), node])]
        groups.update(dict.fromkeys([*group, *_downloads(group)], group))
    return list({id(group): group for group in groups.values()}.values())


def _downloads(group: list[fx.Node]) -> list[fx.Node]:
    found = (download_of(one) for node in group for one in node.all_input_nodes)
    return [*dict.fromkeys(one for one in found if one is not None)]


def _give_to_worker(graph: fx.Graph, trips: list[_Trip]) -> None:
    """Mark the nodes of each trip and move them, with waits of their own, to where they can begin."""
    end: dict[fx.Node, fx.Node] = {}
    begins: list[fx.Node] = []
    for trip in trips:
        place = _Place(graph, end.get(trip.behind, trip.behind))
        received = {item: wait for download in trip.downloads for item, wait in _receive(place, download, trip.nodes)}
        for node in trip.nodes:
            for operand, item in received.items():
                node.replace_input_with(operand, item)
            place.move(node)
        end[trip.behind] = place.last
        begins.append(place.first)
        for item in received:
            _erase_unread(graph, item)
    for earlier, begin in zip(trips, begins[WINDOW:], strict=False):
        with graph.inserting_before(begin):
            annotate(ir.call(graph, ir.CAUGHT_UP, (earlier.nodes[-1],)), side="host")


class _Place:
    """Where the nodes of a trip go, one behind the other."""

    def __init__(self, graph: fx.Graph, behind: fx.Node) -> None:
        self._graph = graph
        self.last = behind
        self._nodes: list[fx.Node] = []

    @property
    def first(self) -> fx.Node:
        """The trip's first node."""
        return self._nodes[0]

    def copy(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """A node like this one with other arguments."""
        with self._graph.inserting_after(self.last):
            return self._follows(annotate(ir.call(self._graph, node.target, args), info(node), ahead=True))

    def move(self, node: fx.Node) -> None:
        """The node itself."""
        self.last.append(annotate(node, ahead=True))
        self._follows(node)

    def _follows(self, node: fx.Node) -> fx.Node:
        self._nodes.append(node)
        self.last = node
        return node


def _receive(place: _Place, download: fx.Node, nodes: list[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """The worker's own wait for a download, and its items beside those that the trip's nodes read so far."""
    read = dict.fromkeys(one for node in nodes for one in node.all_input_nodes if download_of(one) is download)
    wait: fx.Node = next(iter(read)).args[0]  # type: ignore[assignment]
    own = place.copy(wait, (download,))
    return [(item, place.copy(item, (own, item.args[1]))) for item in read]


def _erase_unread(graph: fx.Graph, item: fx.Node) -> None:
    """The issuing thread's item of a download, and its wait, where only the worker needed them."""
    wait: fx.Node = item.args[0]  # type: ignore[assignment]
    if not item.users:
        graph.erase_node(item)
        if not wait.users:
            graph.erase_node(wait)


__all__ = ["NO_ROOM_AHEAD", "WINDOW", "issue_ahead", "issues_ahead"]
