"""The longest path of a step, for its floor: trips and segments of which each needs the results of the one before.

While a segment runs the host has nothing to compute for this chain, and each trip that the host takes part in costs the
chain its transfers and waits. Where a block may be cut as one, what that could save is not in it: the last trip, and
the segment before that.

Where two ways lead from one activation to a later one (attention beside an MLP that reads the same input), the path
takes one of them, and the accelerator works on both, one after the other: between two activations that everything
passes through (*gates* of the path) there is no less time than all of that. So the work that is not on the path counts
as the accelerator's own of the only trip in between that the host could take part in, with which it may run at the same
time, or as work by itself where there is none. Where there are several it does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import networkx as nx
from torch import fx

from hetegen_compile.cost_model import Chain, Trip, download_s
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.predict_step import least_trip_s, node_work, up_s

_START = "the step begins"  # in the graph of trips, before those that need no other


class Blocks(NamedTuple):
    """What blocks that are cut as one may save: the consumers' trips, and segments that the host may take over."""

    consumers: frozenset[fx.Node]
    segments: frozenset[fx.Node]


class Ends(NamedTuple):
    """What a step begins and ends with, whatever its shares are; in seconds.

    Attributes:
        first_s: the host making what the accelerator begins with (a look-up in a table), and its way up, less what the
            accelerator can do meanwhile.
        last_s: the way down of what is made last, until the host has it.
        issue_s: what issuing those two takes the host's thread, the wait for the latter included.
    """

    first_s: float = 0.0
    last_s: float = 0.0
    issue_s: float = 0.0


class Order:
    """Which nodes need which, through any number of nodes between them; a node needs itself."""

    def __init__(self, graph: fx.Graph) -> None:
        self._bit: dict[fx.Node, int] = {}
        self._needed: dict[fx.Node, int] = {}
        for position, node in enumerate(graph.nodes):
            self._bit[node] = 1 << position
            self._needed[node] = self._bit[node]
            for operand in node.all_input_nodes:
                self._needed[node] |= self._needed[operand]

    def needs(self, node: fx.Node, earlier: fx.Node) -> bool:
        """Whether ``node`` cannot start (or, being ``earlier`` itself, end) before ``earlier`` has ended."""
        return bool(self._needed[node] & self._bit[earlier])


def step_ends(
    graph: fx.Graph, linears: Mapping[fx.Node, Trip], beside: Mapping[fx.Node, float], order: Order, context: Context
) -> Ends:
    """What comes before the first activation that a Linear reads, and behind the last Linear.

    Where the host may compute all rows of the last Linear, which the caller gets, nothing need come down.
    """
    reads = by_activation(linears)
    first = next((read for read in reads if all(read is one or order.needs(one, read) for one in reads)), None)
    first_s = _first_s(graph, first, beside, order, context) if first is not None else 0.0
    last_s = _last_s(graph, linears, beside, order, context)
    launch_s, wait_s = context.profile.accelerator.launch_s, context.profile.synchronise_s
    return Ends(first_s, last_s, (launch_s if first_s else 0.0) + (launch_s + wait_s if last_s else 0.0))


def _first_s(
    graph: fx.Graph, read: fx.Node, beside: Mapping[fx.Node, float], order: Order, context: Context
) -> float:
    if info(read).side != "accelerator":
        return 0.0
    made = {
        node: node_work(node, context).seconds + up_s(value_bytes(node, context), context)
        for node in graph.nodes
        if _goes_up(node) and order.needs(read, node)
    }
    if not made:
        return 0.0
    last = max(made, key=made.__getitem__)
    meanwhile_s = sum(s for node, s in beside.items() if order.needs(read, node) and not order.needs(node, last))
    return max(0.0, made[last] - meanwhile_s)


def _goes_up(node: fx.Node) -> bool:
    """Whether the host computes what the accelerator reads."""
    made = node.op in ("call_function", "call_method") and node.target != LINEAR and info(node).side == "host"
    return made and any(info(user).side == "accelerator" for user in node.users)


def _last_s(
    graph: fx.Graph, linears: Mapping[fx.Node, Trip], beside: Mapping[fx.Node, float], order: Order, context: Context
) -> float:
    work = [*linears, *beside]
    for value in graph.output_node().all_input_nodes:
        alone = value in linears and linears[value].accelerator_s == linears[value].accelerator_saved_s
        on_accelerator = value in linears or info(value).side == "accelerator"
        if on_accelerator and not alone and all(order.needs(value, node) for node in work):
            return download_s(context.profile, value_bytes(value, context)) + context.profile.synchronise_s
    return 0.0


def by_activation(linears: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Linears by what they read."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in linears:
        groups.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    return groups


def together(parts: Iterable[Trip], fixed_s: float) -> Trip:
    """Linears as one trip."""
    parts = list(parts)
    return Trip(
        host_s=sum(part.host_s for part in parts),
        link_s=sum(part.link_s for part in parts),
        accelerator_s=sum(part.accelerator_s for part in parts),
        accelerator_saved_s=sum(part.accelerator_saved_s for part in parts),
        fixed_s=fixed_s,
    )


def longest_path(
    linears: Mapping[fx.Node, Trip], beside: Mapping[fx.Node, float], blocks: Blocks, order: Order, context: Context
) -> Chain:
    """The chain of trips, each reading what needs the one before, that takes the accelerator and the trips longest.

    Of a trip only the Linears count that the next activation needs; of the accelerator's other work what lies between
    all of those and that activation.
    """
    groups = by_activation(linears)
    trips: nx.DiGraph = nx.DiGraph()
    for read, group in groups.items():
        own_s = sum(linears[node].host_s + linears[node].accelerator_s for node in group) + beside.get(read, 0.0)
        trips.add_edge(_START, read, seconds=own_s)
        for earlier in groups:
            if earlier is not read and any(order.needs(read, member) for member in groups[earlier]):
                trips.add_edge(earlier, read, seconds=own_s)
    reads = nx.dag_longest_path(trips, weight="seconds")[1:]
    return _Path(linears, beside, blocks, order, context).chain(reads, groups)


@dataclass
class _Link:
    """One trip of the path and the work up to what the next one reads; ``read`` is None for what comes before."""

    read: fx.Node | None
    members: list[fx.Node]
    between: list[fx.Node]


@dataclass
class _Path:
    """The path of a graph with these Linears and, ``beside`` them, seconds of the accelerator's other work."""

    linears: Mapping[fx.Node, Trip]
    beside: Mapping[fx.Node, float]
    blocks: Blocks
    order: Order
    context: Context

    def chain(self, reads: list[fx.Node], groups: Mapping[fx.Node, list[fx.Node]]) -> Chain:
        """The path through these activations."""
        links = [
            self._link(read, groups.get(read, []) if read is not None else [], following)
            for read, following in zip([None, *reads], [*reads, None], strict=True)
        ]
        trips: list[Trip] = []
        serial_s = 0.0
        for stretch, end in self._stretches(links):
            own = [self._trip(link) for link in stretch if link.read is not None]
            off_s = self._off_path_s(stretch, end)
            shared = [i for i, trip in enumerate(own) if trip.host_s > 0]
            if len(shared) == 1:
                trip = own[shared[0]]
                own[shared[0]] = replace(trip, accelerator_s=trip.accelerator_s + off_s)
            trips += own
            serial_s += sum(self.beside[node] for link in stretch for node in link.between)
            serial_s += off_s if not shared else 0.0
        return Chain(tuple(trips), serial_s)

    def _link(self, read: fx.Node | None, group: list[fx.Node], following: fx.Node | None) -> _Link:
        members = [node for node in group if self._is_needed(node, following)]
        between = [
            node for node in self.beside
            if self._is_needed(node, following) and all(self.order.needs(node, member) for member in members)
        ]  # fmt: skip
        return _Link(read, members, between)

    def _is_needed(self, node: fx.Node, following: fx.Node | None) -> bool:
        return following is None or self.order.needs(following, node)

    def _trip(self, link: _Link) -> Trip:
        fixed_s = 0.0
        if not self.blocks.consumers.intersection(link.members):
            fixed_s = least_trip_s(link.members[0], self.context)
        return together((self.linears[node] for node in link.members), fixed_s)

    def _stretches(self, links: list[_Link]) -> Iterator[tuple[list[_Link], fx.Node | None]]:
        """Links from one gate of the path to the next, with the latter; None behind the last one."""
        stretch: list[_Link] = []
        for link in links:
            if stretch and link.read is not None and self._is_gate(link.read):
                yield stretch, link.read
                stretch = []
            stretch.append(link)
        yield stretch, None

    def _is_gate(self, read: fx.Node) -> bool:
        """Whether each Linear either needs an activation or is needed for it."""
        return all(self.order.needs(node, read) or self.order.needs(read, node) for node in self.linears)

    def _off_path_s(self, stretch: list[_Link], end: fx.Node | None) -> float:
        """What the accelerator does at least between two gates beside the path."""
        begin = stretch[0].read
        counted = {node for link in stretch for node in (*link.members, *link.between)}

        def lies_between(node: fx.Node) -> bool:
            behind = begin is None or (node is not begin and self.order.needs(node, begin))
            return behind and node is not end and self._is_needed(node, end) and node not in counted

        linears_s = sum(t.accelerator_s - t.accelerator_saved_s for n, t in self.linears.items() if lies_between(n))
        return linears_s + sum(seconds for node, seconds in self.beside.items() if lies_between(node))


__all__ = ["Blocks", "Ends", "Order", "by_activation", "longest_path", "step_ends", "together"]
