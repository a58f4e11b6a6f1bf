"""Which values that the host computes go up in one transfer.

Why: every transfer costs the host thread a fixed time, and siblings (q, k and v; gate and up) have come down in one.
But the host computes one after another, so what goes up together waits for the last of them. Values share a
transfer if the same node needs them all, and unless sending those that are there already, while the host computes
the others, saves more than the transfer costs:

    together    host: q k v      -> up(q, k, v) -> join q, join k, join v -> segment
    cut after q host: q up(q) k v, meanwhile up(q) and join q; then up(k, v) -> join k, join v -> segment

A cut gains what it takes out of the end (the copy of what is there, its joins), as far as the host's remaining work
hides it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from torch import fx

from hetegen_compile import ir
from hetegen_compile.cost_model import upload_s
from hetegen_compile.ir import info
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.node_work import node_work, transfer_up_s

Readers = Mapping[fx.Node, Sequence[fx.Node]]
"""For each value of the host the nodes of the accelerator that read it."""


def share_uploads(nodes: Sequence[fx.Node], readers: Readers, context: Context) -> list[list[fx.Node]]:
    """The keys of ``readers`` in lists that go up together, each in the order of ``nodes`` (the whole graph)."""
    place = {node: position for position, node in enumerate(nodes)}
    groups: dict[tuple[fx.Node, fx.Node | None], list[fx.Node]] = {}
    for value in sorted(readers, key=place.__getitem__):
        first = min((_beyond_join(reader, place) for reader in readers[value]), key=place.__getitem__)
        groups.setdefault((first, _activation(value)), []).append(value)
    if not any(len(group) > 1 for group in groups.values()):
        return list(groups.values())
    cuts = _Cuts(nodes, place, readers, context)
    return [part for group in groups.values() for part in cuts.parts(group)]


def _beyond_join(reader: fx.Node, place: Mapping[fx.Node, int]) -> fx.Node:
    """Who really waits for a part of a Linear: the first that reads the whole."""
    return min(reader.users, key=place.__getitem__, default=reader) if reader.target == ir.JOIN else reader


def _activation(value: fx.Node) -> fx.Node | None:
    """What a host part reads: only siblings share a transfer."""
    return value.all_input_nodes[0] if value.target in ir.HOST_PARTS else None


class _Cuts:
    """Where a list of values that one node needs is cut, by the cost model."""

    def __init__(
        self, nodes: Sequence[fx.Node], place: Mapping[fx.Node, int], readers: Readers, context: Context
    ) -> None:
        self._place = place
        self._readers = readers
        self._context = context
        seconds = (node_work(node, context).seconds if info(node).side == "host" else 0.0 for node in nodes)
        self._host_s = list(accumulate(seconds))

    def parts(self, group: list[fx.Node]) -> Iterator[list[fx.Node]]:
        """The values of a list in parts that are worth a transfer of their own."""
        waiting: list[fx.Node] = []
        for value, following in zip(group, [*group[1:], None], strict=True):
            waiting.append(value)
            if following is None or self._is_worth_it(waiting, following, group[-1]):
                yield waiting
                waiting = []

    def _is_worth_it(self, waiting: list[fx.Node], following: fx.Node, last: fx.Node) -> bool:
        """Whether ``waiting`` goes up before the host has computed ``following`` and those after it."""
        nbytes = [value_bytes(value, self._context) for value in (*waiting, following)]
        if sum(nbytes) > ir.SMALL_UPLOAD_BYTES >= sum(nbytes[:-1]):
            return True  # together they would queue behind the prefetches
        hidden_s = self._joins_s(waiting)
        if sum(nbytes[:-1]) > ir.SMALL_UPLOAD_BYTES:
            hidden_s += upload_s(self._context.profile, sum(nbytes[:-1]))
        meanwhile_s = self._host_s[self._place[last]] - self._host_s[self._place[waiting[-1]]]
        return min(hidden_s, meanwhile_s) > transfer_up_s(self._context)

    def _joins_s(self, values: list[fx.Node]) -> float:
        joins = {reader for value in values for reader in self._readers[value] if reader.target == ir.JOIN}
        return sum(node_work(join, self._context).seconds for join in joins)


__all__ = ["share_uploads"]
