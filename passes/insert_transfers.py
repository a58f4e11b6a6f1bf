"""Start and wait nodes at every border between the host and the accelerator.

Why: nothing crosses by itself. A value that a host part of a Linear needs goes down alone and at once, for all
Linears that read it; their results go up together (``share_uploads``). Values that only complete what the caller
gets back go with it, or some of them in one transfer where host work needs them; the others at the end, in one, but for
large ones.

Before:

    h = host_linear(x, w, None, 0, 64, 0)        # x is on the accelerator
    y = join([h, s], 0)                          # h is on the host
    h2 = host_linear(x, w2, None, 0, 64, 0)      # x as well
    y2 = join([h2, s2], 0)
    return (y + y2,)

After:

    d = to_host([x]); v = wait_host(d); x_h = v[0]
    h = host_linear(x_h, w, None, 0, 64, 0)
    h2 = host_linear(x_h, w2, None, 0, 64, 0)
    u = to_accelerator([h, h2]); a = wait_accelerator(u)
    y = join([a[0], s], 0)
    y2 = join([a[1], s2], 0)
    z = y + y2
    e = to_host([z]); f = wait_host(e); z_h = f[0]
    return (z_h,)
"""

from __future__ import annotations

import operator
from bisect import bisect

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import INPUT_OPS, NodeInfo, Side, annotate, info, is_tensor
from hetegen_compile.operands import grouped_part
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.completing import completing_s, late_readers
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.share_uploads import share_uploads
from hetegen_compile.passes.tensors import tensors_in

LARGE_DOWNLOAD_BYTES = 1 << 20
"""From this size on a value that only completes the results waits for no others: it goes down as soon as it is made, by
itself or with an activation that does."""

_WORTH = 6.0
"""Times the fixed cost of a transfer down: host work of so many seconds is let begin by one of its own."""

_READS_HOST = {
    ir.STAGE, ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED, ir.RESIDENT, ir.MIRROR, ir.TO_ACCELERATOR, ir.WRITE_BACK,
}  # fmt: skip
# their result is a transfer, on no side yet
_STARTED = {ir.STAGE, ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED, ir.TO_HOST, ir.TO_ACCELERATOR}


def insert_transfers(module: fx.GraphModule, context: Context) -> None:
    """Put transfers on every edge between a value on one side and a reader on the other."""
    inserter = _Inserter(module.graph, context)
    inserter.accelerator_operands()
    inserter.host_operands()


def operand_side(user: fx.Node, operand: fx.Node) -> Side | None:
    """On which side ``user`` reads ``operand``; None where it does not read the tensor itself."""
    if user.target == ir.TWIN:
        return "host" if operand is user.args[0] else "accelerator"
    if user.op == "output" or user.target in _READS_HOST:
        return "host"
    if user.target == ir.TO_HOST:
        return "accelerator"
    if user.target == ir.PARTIAL_GROUPED and operand is grouped_part(user).ends:
        return "host"
    return info(user).side


def value_side(node: fx.Node) -> Side | None:
    """On which side a node's tensor is; None for numbers, transfers under way and tokens."""
    if node.target in _STARTED or node.target == ir.RELEASE:
        return None
    if node.op in INPUT_OPS:
        return "host" if is_tensor(node) else None
    return info(node).side if tensors_in(info(node).value) else None


_Version = tuple[fx.Node, int, fx.Node | None]
"""A value, how often it has been written in place, and its only reader if it does not share the trip."""
_Transfer = tuple[list[_Version], fx.Node]
"""What one download brings, and the node that it is put before."""


class _Inserter:
    def __init__(self, graph: fx.Graph, context: Context) -> None:
        self._graph = graph
        self._context = context
        self._down: dict[_Version, fx.Node] = {}
        mirrors = graph.find_nodes(op="call_function", target=ir.MIRROR)
        self._mirrors: dict[fx.Node, fx.Node] = {node.all_input_nodes[0]: node for node in mirrors}
        self._first = next(node for node in graph.nodes if node.op not in INPUT_OPS)

    def accelerator_operands(self) -> None:
        """Host values that the accelerator reads: mirrors of inputs, uploads of what the host computes."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for user, operand in self._crossings("accelerator", "host"):
            if operand.op in INPUT_OPS:
                user.replace_input_with(operand, self._mirror(operand))
            else:
                readers.setdefault(operand, []).append(user)
        nodes = list(self._graph.nodes)
        shares = self._context.share_trips
        together = share_uploads(nodes, readers, self._context) if shares else [[operand] for operand in readers]
        for operands in together:
            for operand, item in zip(operands, self._upload(operands), strict=True):
                self._read_after(item, operand, readers[operand])

    def host_operands(self) -> None:
        """Accelerator values that the host reads; those for the end of the step share one transfer.

        A value that is written in place is another value after each write.
        """
        crossings = [
            (user, operand)
            for user, operand in self._crossings("host", "accelerator")
            if not self._read_where_it_lies(user, operand)
        ]
        versions = self._versions(crossings)
        late = late_readers(self._graph)
        early = dict.fromkeys(versions[crossing] for crossing in crossings if crossing[0] not in late)
        together = dict.fromkeys(versions[crossing] for crossing in crossings if crossing[0] in late)
        readers: dict[_Version, list[fx.Node]] = {}
        for user, operand in crossings:
            readers.setdefault(versions[user, operand], []).append(user)
        transfers = [([key], min(readers[key])) for key in early]
        self._join_in(transfers, [key for key in together if key not in early], late)
        for keys, before in transfers:
            self._down.update(self._download(keys, before))
        for keys in self._late_transfers([key for key in together if key not in self._down]):
            self._down.update(self._download(keys, before=min(late)))
        for user, operand in crossings:
            user.replace_input_with(operand, self._down[versions[user, operand]])

    def _join_in(self, transfers: list[_Transfer], together: list[_Version], late: set[fx.Node]) -> None:
        """Add to ``transfers`` what host work needs that only completes the results (``completing``).

        What is made between two segments goes with the next transfer, if one follows before more is made. If not, it
        waits for more to share one with, since a transfer costs its issue and a wait: until the work that it is for
        takes far longer, or until fewer groups are still to come than wait (the nearer the end, the fewer wait).
        """
        groups = self._of_near_levels(self._completing(together, late))
        made = [max(key[0] for key in group) for group in groups]
        waiting: list[list[_Version]] = []
        for i, (group, last) in enumerate(zip(groups, made, strict=True)):
            if waiting and not self._is_small(_flat([*waiting, group])):
                transfers.append((_flat(waiting), made[i - 1].next))
                waiting = []
            waiting.append(group)
            joined = _next_of(transfers, last, made[i + 1 : i + 2])
            if joined is not None:
                joined += _flat(waiting)
                waiting = []
            elif len(waiting) > len(groups) - i - 1 or self._is_worth_a_transfer(_flat(waiting), late):
                transfers.append((_flat(waiting), last.next))
                waiting = []

    def _is_worth_a_transfer(self, keys: list[_Version], late: set[fx.Node]) -> bool:
        """Whether these are large, or the host work that they are for takes far longer than their transfer does."""
        profile = self._context.profile
        fixed_s = profile.accelerator.launch_s + profile.synchronise_s
        work_s = completing_s([key[0] for key in keys], late, self._context)
        return work_s >= _WORTH * fixed_s or not self._is_small(keys)

    def _completing(self, keys: list[_Version], late: set[fx.Node]) -> list[_Version]:
        """Those that late work on the host needs and that nothing writes."""
        written = frozenset[int]().union(*(info(node).writes for node in self._graph.nodes))
        return [
            key for key in keys
            if written.isdisjoint(info(key[0]).storages) and completing_s([key[0]], late, self._context) > 0
        ]  # fmt: skip

    def _of_near_levels(self, keys: list[_Version]) -> list[list[_Version]]:
        """Keys in groups: those between the same two segments, small ones with those behind the next segment.

        Keys and values of one token are made before and behind a layer's attention. Large ones go down as soon as they
        can.
        """
        segments = list(self._graph.find_nodes(op="call_module"))
        levels: dict[int, list[_Version]] = {}
        for key in sorted(keys, key=lambda key: key[0]):
            levels.setdefault(bisect(segments, key[0]), []).append(key)
        groups: list[list[_Version]] = []
        last = None
        for level, own in levels.items():
            if last == level - 1 and self._is_small([*groups[-1], *own]):
                groups[-1] += own
                last = None  # two levels at most: those of a layer
            else:
                groups.append(own)
                last = level
        return groups

    def _is_small(self, keys: list[_Version]) -> bool:
        return sum(value_bytes(key[0], self._context) for key in keys) < LARGE_DOWNLOAD_BYTES

    def _late_transfers(self, keys: list[_Version]) -> list[list[_Version]]:
        """Small values in one transfer; each large one by itself, so that it need not be kept to the end."""
        small = [key for key in keys if value_bytes(key[0], self._context) < LARGE_DOWNLOAD_BYTES]
        large = [[key] for key in keys if key not in small]
        return [*large, small] if small else large

    def _read_where_it_lies(self, user: fx.Node, operand: fx.Node) -> bool:
        """Let a part read an input of the call itself instead of its mirror, if nothing writes it."""
        if operand.target != ir.MIRROR or user.target not in (*ir.HOST_PARTS, ir.PARTIAL_GROUPED):
            return False
        if any(info(node).writes & info(operand).storages for node in self._graph.nodes):
            return False
        user.replace_input_with(operand, operand.all_input_nodes[0])
        if not operand.users:
            self._graph.erase_node(operand)
        return True

    def _versions(self, crossings: list[tuple[fx.Node, fx.Node]]) -> dict[tuple[fx.Node, fx.Node], _Version]:
        """For each (user, operand) how often its storages have been written on the accelerator before the user."""
        readers = {user for user, _ in crossings}
        written: dict[int, int] = {}
        versions: dict[tuple[fx.Node, fx.Node], _Version] = {}
        for user in self._graph.nodes:
            alone = user if user.target in ir.HOST_PARTS and not self._context.share_trips else None
            for operand in user.all_input_nodes if user in readers else ():
                versions[user, operand] = operand, sum(written.get(key, 0) for key in info(operand).storages), alone
            if info(user).side == "accelerator":
                for key in info(user).writes:
                    written[key] = written.get(key, 0) + 1
        return versions

    def _crossings(self, reads: Side, lies: Side) -> list[tuple[fx.Node, fx.Node]]:
        there = {node for node in self._graph.nodes if value_side(node) == lies}
        return [
            (user, operand)
            for user in self._graph.nodes
            for operand in user.all_input_nodes
            if operand in there and operand_side(user, operand) == reads
        ]

    def _mirror(self, operand: fx.Node) -> fx.Node:
        if operand not in self._mirrors:
            with self._graph.inserting_before(self._first):
                mirror = ir.call(self._graph, ir.MIRROR, (operand,))
            self._mirrors[operand] = annotate(mirror, info(operand), side="accelerator")
        return self._mirrors[operand]

    def _upload(self, operands: list[fx.Node]) -> list[fx.Node]:
        """One transfer up, behind the last of the operands, which are in graph order."""
        place, items = operands[-1], []
        notes = _transfer_info(operands, "accelerator")
        for target, args in ((ir.TO_ACCELERATOR, (operands,)), (ir.WAIT_ACCELERATOR, None)):
            with self._graph.inserting_after(place):
                place = annotate(ir.call(self._graph, target, args or (place,)), notes)
        done = place
        for i, operand in enumerate(operands):
            with self._graph.inserting_after(place):
                place = ir.call(self._graph, operator.getitem, (done, i))
            items.append(annotate(place, _moved(operand), side="accelerator"))
        return items

    def _read_after(self, item: fx.Node, operand: fx.Node, readers: list[fx.Node]) -> None:
        """Let the readers of a host value read it on the accelerator; joins that were in front of it follow it."""
        for reader in readers:
            reader.replace_input_with(operand, item)
            if reader < item:
                item.append(reader)

    def _download(self, keys: list[_Version], before: fx.Node) -> dict[_Version, fx.Node]:
        operands = [operand for operand, *_ in keys]
        notes = _transfer_info(operands, "host")
        with self._graph.inserting_before(before):
            start = annotate(ir.call(self._graph, ir.TO_HOST, (operands,)), notes)
            done = annotate(ir.call(self._graph, ir.WAIT_HOST, (start,)), notes)
            items = [ir.call(self._graph, operator.getitem, (done, i)) for i in range(len(operands))]
        for item, operand in zip(items, operands, strict=True):
            annotate(item, _moved(operand), side="host")
        return dict(zip(keys, items, strict=True))


def _next_of(transfers: list[_Transfer], made: fx.Node, more: list[fx.Node]) -> list[_Version] | None:
    """What the next transfer behind ``made`` brings; None if there is none, or only behind the first of ``more``."""
    near = (keys for keys, before in transfers if made < before and not any(after < before for after in more))
    return next(near, None)


def _flat(groups: list[list[_Version]]) -> list[_Version]:
    return [key for group in groups for key in group]


def _transfer_info(operands: list[fx.Node], side: Side) -> NodeInfo:
    return NodeInfo(value=[info(operand).value for operand in operands], module=info(operands[0]).module, side=side)


def _moved(operand: fx.Node) -> NodeInfo:
    notes = info(operand)
    return NodeInfo(value=notes.value, module=notes.module, position=notes.position)


__all__ = ["insert_transfers", "operand_side", "value_side"]
