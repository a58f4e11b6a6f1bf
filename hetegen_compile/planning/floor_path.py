"""The longest path of a step, for its floor: trips and segments of which each needs the results of the one before.

While a segment runs the host has nothing to compute for this chain, and each trip that the host takes part in costs the
chain its transfers and waits. Where a block may be cut as one, what that could save is not in it: the last trip, and
the segment before that. What the host computes between two trips (a look-up in a table, experts that stay with it) is
on the path as the accelerator's work is, with the ways between the two sides.

Where two ways lead from one activation to a later one (attention beside an MLP that reads the same input), the path
takes one of them, and the accelerator works on both, one after the other: between two activations that everything
passes through (*gates* of the path) there is no less time than all of that. So the work that is not on the path counts
as the accelerator's own of the only trip in between that the host could take part in, with which it may run at the same
time, or as work by itself where there is none. Where there are several it does not count.

Where Linears beside the path are offloaded, too, there is another bound for what lies between two gates: all of it as
one trip (``with_both_ways``). The host has one part after the other, whichever way they are on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import networkx as nx
from torch import fx

from hetegen_compile.cost_model import Chain, Leg, Trip, download_s
from hetegen_compile.ir import INPUT_OPS, MIRROR, info
from hetegen_compile.operands import x_of
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.node_work import least_trip_s, least_ways_s, untold_trip_s, up_s

_START = "the step begins"  # in the graph of trips, before those that need no other


class Blocks(NamedTuple):
    """What blocks that are cut as one may save: trips, and segments that the host may take over.

    ``consumers`` are their last Linears, each with the activation that the first ones read.
    """

    consumers: Mapping[fx.Node, fx.Node]
    segments: frozenset[fx.Node]


class Order:
    """Which nodes need which, through any number of nodes between them; a node needs itself.

    Sets of nodes are bits of an integer, by place in the graph: a deep model has a million pairs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.place = {node: position for position, node in enumerate(self.nodes)}
        self._needed = [0] * len(self.nodes)
        self._needing = [0] * len(self.nodes)
        for position, node in enumerate(self.nodes):
            self._needed[position] = 1 << position
            for operand in node.all_input_nodes:
                self._needed[position] |= self._needed[self.place[operand]]
        for position in reversed(range(len(self.nodes))):
            self._needing[position] |= 1 << position
            for operand in self.nodes[position].all_input_nodes:
                self._needing[self.place[operand]] |= self._needing[position]

    def needs(self, node: fx.Node, earlier: fx.Node) -> bool:
        """Whether ``node`` cannot start (or, being ``earlier`` itself, end) before ``earlier`` has ended."""
        return bool(self._needed[self.place[node]] >> self.place[earlier] & 1)

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """Nodes as a set."""
        found = 0
        for node in nodes:
            found |= 1 << self.place[node]
        return found

    def needed_for(self, node: fx.Node | None) -> int:
        """The set of what ``node`` needs; all nodes for None, the end of the step."""
        return (1 << len(self.nodes)) - 1 if node is None else self._needed[self.place[node]]

    def needing(self, *nodes: fx.Node | None) -> int:
        """The set of what needs each of ``nodes``; None is the beginning of the step."""
        found = (1 << len(self.nodes)) - 1
        for node in nodes:
            found &= -1 if node is None else self._needing[self.place[node]]
        return found

    def those_of(self, found: int) -> Iterator[fx.Node]:
        """The nodes of a set, in the graph's order."""
        while found:
            last = found & -found
            yield self.nodes[last.bit_length() - 1]
            found ^= last


def by_activation(linears: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Linears by what they read."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in linears:
        groups.setdefault(x_of(node), []).append(node)
    return groups


def by_trip(linears: Iterable[fx.Node], blocks: Blocks) -> dict[fx.Node, list[fx.Node]]:
    """Linears by what they read; the last one of a block that may be cut by what the first ones read.

    If the host has any rows of such a group, there is one trip at least: of the block, or of some of its Linears.
    """
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in linears:
        groups.setdefault(blocks.consumers.get(node, x_of(node)), []).append(node)
    return groups


def together(parts: Iterable[Trip], fixed_s: float) -> Trip:
    """Linears as one trip: the host computes rows of each as fast, compared with the link, as of the best of them.

    As much of the accelerator's work falls away with each as with the best of them.
    """
    parts = list(parts)
    link_s = sum(part.link_s for part in parts)
    saved = max((part.accelerator_saved_s / part.link_s for part in parts if part.link_s > 0), default=0.0)
    return Trip(
        host_s=link_s * min((part.host_s / part.link_s for part in parts if part.link_s > 0), default=0.0),
        link_s=link_s,
        accelerator_s=sum(part.accelerator_s for part in parts),
        accelerator_saved_s=link_s * saved,
        fixed_s=fixed_s,
        lost_s=link_s * min((part.lost_s / part.link_s for part in parts if part.link_s > 0), default=0.0),
    )


@dataclass(frozen=True)
class Stretch:
    """The path from one gate to the next: what comes before its first trip, and its trips with what follows on each.

    ``shared`` is all of it, what comes before included, as one trip where Linears beside the path are offloaded, too.
    """

    before_s: float
    legs: tuple[Leg, ...]
    shared: Leg | None = None


def with_both_ways(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Each stretch with two ways as the one trip that all of its Linears share."""
    return [one if one.shared is None else Stretch(0.0, (one.shared,)) for one in stretches]


def chain_of(stretches: Sequence[Stretch]) -> Chain:
    """Stretches that follow each other as one chain."""
    serial_s = sum(one.before_s + sum(leg.after_s for leg in one.legs) for one in stretches)
    return Chain(tuple(leg.trip for one in stretches for leg in one.legs), serial_s)


def longest_path(
    linears: Mapping[fx.Node, Trip], beside: Mapping[fx.Node, float], on_host: Mapping[fx.Node, float],
    blocks: Blocks, order: Order, context: Context,
) -> list[Stretch]:  # fmt: skip
    """The chain of trips, each reading what needs the one before, that takes the accelerator and the trips longest.

    Of a trip only the Linears count that the next activation needs; of other work (``beside`` the Linears the
    accelerator's, ``on_host`` the host's) what lies between all of those and that activation.
    """
    groups = by_activation(linears)
    trips: nx.DiGraph = nx.DiGraph()
    for read, before in _directly_before(groups, order).items():
        own_s = sum(linears[node].host_s + linears[node].accelerator_s for node in groups[read])
        own_s += beside.get(read, 0.0)
        trips.add_edges_from(((earlier, read) for earlier in before or (_START,)), seconds=own_s)
    reads = nx.dag_longest_path(trips, weight="seconds")[1:]
    return list(_Path(linears, beside, on_host, blocks, order, context).stretches(reads, groups))


def _directly_before(groups: Mapping[fx.Node, list[fx.Node]], order: Order) -> dict[fx.Node, list[fx.Node]]:
    """By activation, those whose Linears it needs, less those that it needs through another of them."""
    reads = sorted(groups, key=order.place.__getitem__)
    members = {read: order.bits(groups[read]) for read in reads}
    found: dict[fx.Node, list[fx.Node]] = {}
    for position, read in enumerate(reads):
        needed, behind_others = order.needed_for(read), 0
        before = found[read] = []
        for earlier in reversed(reads[:position]):
            if members[earlier] & needed and not members[earlier] & behind_others:
                before.append(earlier)
                behind_others |= order.needed_for(earlier)
    return found


@dataclass
class _Link:
    """One trip of the path and the work up to what the next one reads; ``read`` is None for what comes before."""

    read: fx.Node | None
    members: list[fx.Node]
    between: list[fx.Node]
    following: fx.Node | None


@dataclass
class _Path:
    """The path of a graph with these Linears and, ``beside`` them, seconds of the accelerator's other work."""

    linears: Mapping[fx.Node, Trip]
    beside: Mapping[fx.Node, float]
    on_host: Mapping[fx.Node, float]
    blocks: Blocks
    order: Order
    context: Context

    def __post_init__(self) -> None:
        self._linear_bits, self._beside_bits = self.order.bits(self.linears), self.order.bits(self.beside)

    def stretches(self, reads: list[fx.Node], groups: Mapping[fx.Node, list[fx.Node]]) -> Iterator[Stretch]:
        """The path through these activations."""
        links = [
            self._link(read, groups.get(read, []) if read is not None else [], following)
            for read, following in zip([None, *reads], [*reads, None], strict=True)
        ]
        for stretch, end in self._stretches(self._blocks_together(links)):
            begin = [self._between_s(link) for link in stretch if link.read is None]
            legs = [Leg(self._trip(link), self._between_s(link)) for link in stretch if link.read is not None]
            accelerator_s = sum(self.beside[node] for link in stretch for node in link.between)
            between_s = sum(begin) + sum(leg.after_s for leg in legs)
            off_s = max(0.0, self._off_path_s(stretch, end) - (between_s - accelerator_s))
            shared = [i for i, leg in enumerate(legs) if leg.trip.host_s > 0]
            if len(shared) == 1:
                trip, after_s = legs[shared[0]]
                legs[shared[0]] = Leg(replace(trip, accelerator_s=trip.accelerator_s + off_s), after_s)
            yield Stretch(sum(begin) + (off_s if not shared else 0.0), tuple(legs), self._shared(stretch, end))

    def _shared(self, stretch: Sequence[_Link], end: fx.Node | None) -> Leg | None:
        """A stretch as one trip, which all of its Linears share; None if those of the path are all that is offloaded.

        The host has nothing to compute before something that the first activation is needed for has come down, and what
        it computes last has to go up and through what follows on it. In between it has one part after the other.
        """
        read = stretch[0].read
        if read is None:
            return None
        inside = self.order.needing(read) & self.order.needed_for(end) & ~self.order.bits([read])
        members = list(self.order.those_of(inside & self._linear_bits))
        offloaded = {node: self.linears[node] for node in members if self.linears[node].link_s > 0}
        if offloaded.keys() <= {node for link in stretch for node in link.members}:
            return None
        link = self._link(read, members, end)
        begins, ends = [], []
        for group in by_trip(offloaded, self.blocks).values():
            to_host_s, to_accelerator_s = least_ways_s(group, self.context, self.blocks.consumers)
            begins.append(to_host_s + min(self._way_s(read, x_of(node)) for node in group))
            ends.append(to_accelerator_s + min(self._way_s(node, end) for node in group))
        fixed_s = min(begins) + untold_trip_s(self.context) + max(min(ends), self._between_s(link))
        trip = together((self.linears[node] for node in members), fixed_s)
        others_s = sum(self.beside[node] for node in self.order.those_of(inside & self._beside_bits))
        return Leg(replace(trip, accelerator_s=trip.accelerator_s + others_s), 0.0)

    def _way_s(self, begin: fx.Node, end: fx.Node | None) -> float:
        """The longest way from one node to another, both sides' work and what Linears cannot leave to the host."""
        if begin is end:
            return 0.0
        last = len(self.order.nodes) - 1 if end is None else self.order.place[end]
        nodes = self.order.nodes[self.order.place[begin] + 1 : last + 1]
        return self._longest_way_s(self.order.needing(begin), nodes)

    def _link(self, read: fx.Node | None, group: list[fx.Node], following: fx.Node | None) -> _Link:
        needed = self.order.needed_for(following)
        members = list(self.order.those_of(self.order.bits(group) & needed))
        between = self._beside_bits & needed & self.order.needing(*members)
        return _Link(read, members, list(self.order.those_of(between)), following)

    def _blocks_together(self, links: Iterable[_Link]) -> list[_Link]:
        """The last Linear of a block that may be cut shares the trip of the first ones."""
        found: list[_Link] = []
        for link in links:
            if found and self.blocks.consumers.keys() & link.members:
                before = found.pop()
                link = _Link(before.read, before.members + link.members, before.between + link.between, link.following)
            found.append(link)
        return found

    def _between_s(self, link: _Link) -> float:
        """From a trip to the next activation: the accelerator's work, or the longest way through both sides' work."""
        accelerator_s = sum(self.beside[node] for node in link.between)
        first = max((self.order.place[node] for node in link.members), default=-1) + 1
        last = len(self.order.nodes) - 1 if link.following is None else self.order.place[link.following]
        nodes = self.order.nodes[first : last + 1]
        if link.following is not None and not any(node in self.on_host for node in nodes):
            return accelerator_s
        return max(accelerator_s, self._longest_way_s(self.order.needing(*link.members), nodes))

    def _longest_way_s(self, behind: int, nodes: list[fx.Node]) -> float:
        """The longest way to the last of ``nodes`` through those of them that are in the set ``behind``."""
        end_s: dict[fx.Node, float] = {}
        for node in nodes:
            if behind >> self.order.place[node] & 1:
                inside = (operand for operand in node.all_input_nodes if behind >> self.order.place[operand] & 1)
                ready = (end_s.get(operand, 0.0) + self._crossing_s(operand, node) for operand in inside)
                own_s = self.beside.get(node, 0.0) + self.on_host.get(node, 0.0) + self._resident_s(node)
                end_s[node] = own_s + max(ready, default=0.0)
        return end_s.get(nodes[-1], 0.0) if nodes else 0.0

    def _resident_s(self, node: fx.Node) -> float:
        """The accelerator's part of a Linear with as few rows as residency allows; nothing of another node."""
        trip = self.linears.get(node)
        return 0.0 if trip is None else trip.accelerator_s - trip.accelerator_saved_s

    def _crossing_s(self, operand: fx.Node, node: fx.Node) -> float:
        """From one side to the other. A Linear's result may be on either, and inputs are on both."""
        if operand in self.linears or operand.op in INPUT_OPS or operand.target == MIRROR:
            return 0.0
        sides = info(operand).side, "host" if node.op == "output" else info(node).side
        if sides == ("accelerator", "host"):
            down_s = download_s(self.context.profile, value_bytes(operand, self.context))
            return down_s + self.context.profile.synchronise_s
        return up_s(value_bytes(operand, self.context), self.context) if sides == ("host", "accelerator") else 0.0

    def _trip(self, link: _Link) -> Trip:
        fixed_s = least_trip_s(link.members, self.context, self.blocks.consumers)
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
        return not self._linear_bits & ~(self.order.needed_for(read) | self.order.needing(read))

    def _off_path_s(self, stretch: list[_Link], end: fx.Node | None) -> float:
        """What the accelerator does at least between two gates beside the path."""
        begin, nodes = stretch[0].read, [node for link in stretch for node in (*link.members, *link.between)]
        counted = self.order.bits([*nodes, *(node for node in (begin, end) if node is not None)])
        between = self.order.needing(begin) & self.order.needed_for(end) & ~counted
        trips = [self.linears[node] for node in self.order.those_of(between & self._linear_bits)]
        others_s = sum(self.beside[node] for node in self.order.those_of(between & self._beside_bits))
        return sum(trip.accelerator_s - trip.accelerator_saved_s for trip in trips) + others_s


__all__ = ["Blocks", "Order", "Stretch", "by_activation", "by_trip", "chain_of", "longest_path", "together"]
