"""Start and wait nodes at every border between the host and the accelerator.

Why: nothing crosses by itself. A value that a host part of a Linear needs goes down alone and at once; the
values that only complete what the caller gets back go down together at the end, in one transfer, but for large ones.

Before:

    h = host_linear(x, w, None, 0, 64, 0)        # x is on the accelerator
    y = join([h, s], 0)                          # h is on the host
    return (y,)

After:

    d = to_host([x]); v = wait_host(d); x_h = v[0]
    h = host_linear(x_h, w, None, 0, 64, 0)
    u = to_accelerator(h); a = wait(u)
    y = join([a, s], 0)
    e = to_host([y]); f = wait_host(e); y_h = f[0]
    return (y_h,)
"""

from __future__ import annotations

import operator

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import NodeInfo, Side, annotate, info, is_tensor
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.capture import tensors_in
from hetegen_compile.passes.completing import completing_s, late_readers
from hetegen_compile.passes.context import Context

LARGE_DOWNLOAD_BYTES = 1 << 20
"""From this size on a value that only completes the results goes down as soon as it is made, by itself."""

_READS_HOST = {
    ir.STAGE, ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED, ir.RESIDENT, ir.MIRROR, ir.TO_ACCELERATOR, ir.WRITE_BACK,
}
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
    return info(user).side


def value_side(node: fx.Node) -> Side | None:
    """On which side a node's tensor is; None for numbers, transfers under way and tokens."""
    if node.target in _STARTED or node.target == ir.RELEASE:
        return None
    if node.op in ("placeholder", "get_attr"):
        return "host" if is_tensor(node) else None
    return info(node).side if tensors_in(info(node).value) else None


_Version = tuple[fx.Node, int]
"""A value and how often it has been written in place."""
_Transfer = tuple[list[_Version], fx.Node]
"""What one download brings, and the node that it is put before."""


class _Inserter:
    def __init__(self, graph: fx.Graph, context: Context) -> None:
        self._graph = graph
        self._context = context
        self._up: dict[fx.Node, fx.Node] = {}
        self._down: dict[_Version, fx.Node] = {}
        mirrors = graph.find_nodes(op="call_function", target=ir.MIRROR)
        self._mirrors: dict[fx.Node, fx.Node] = {node.all_input_nodes[0]: node for node in mirrors}
        self._first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))

    def accelerator_operands(self) -> None:
        """Host values that the accelerator reads: mirrors of inputs, uploads of what the host computes."""
        for user, operand in self._crossings("accelerator", "host"):
            if operand.op in ("placeholder", "get_attr"):
                user.replace_input_with(operand, self._mirror(operand))
            else:
                user.replace_input_with(operand, self._upload(operand))

    def host_operands(self) -> None:
        """Accelerator values that the host reads; those for the end of the step share one transfer.

        A value that is written in place is another value after each write: (node, writes so far).
        """
        crossings = [
            (user, operand)
            for user, operand in self._crossings("host", "accelerator")
            if not self._read_where_it_lies(user, operand)
        ]
        versions = self._versions()
        late = late_readers(self._graph)
        early = dict.fromkeys((operand, versions[user, operand]) for user, operand in crossings if user not in late)
        together = dict.fromkeys((operand, versions[user, operand]) for user, operand in crossings if user in late)
        readers: dict[_Version, list[fx.Node]] = {}
        for user, operand in crossings:
            readers.setdefault((operand, versions[user, operand]), []).append(user)
        transfers = [([key], self._earliest(readers[key])) for key in early]
        self._join_in(transfers, [key for key in together if key not in early], late)
        for keys, before in transfers:
            self._down.update(self._download(keys, before))
        for keys in self._late_transfers([key for key in together if key not in self._down]):
            self._down.update(self._download(keys, before=self._earliest(list(late))))
        for user, operand in crossings:
            user.replace_input_with(operand, self._down[operand, versions[user, operand]])

    def _join_in(self, transfers: list[_Transfer], together: list[_Version], late: set[fx.Node]) -> None:
        """Add to ``transfers`` what host work needs that only completes the results (``completing``).

        What is made between two segments goes with the next transfer, or in one of its own if none follows before
        more is made.
        """
        place = {node: position for position, node in enumerate(self._graph.nodes)}
        groups = self._of_one_level([key for key in together if self._completes(key, late)])
        made = [max(place[operand] for operand, _ in group) for group in groups]
        for i, (group, since) in enumerate(zip(groups, made, strict=True)):
            until = made[i + 1] if i + 1 < len(made) else len(place)
            joined = next((keys for keys, before in transfers if since < place[before] <= until), None)
            if joined is not None:
                joined += group
            elif self._pays([operand for operand, _ in group], late):
                last = max((operand for operand, _ in group), key=place.__getitem__)
                transfers.append((group, last.next))

    def _of_one_level(self, keys: list[_Version]) -> list[list[_Version]]:
        """Keys in groups: those between the same two segments."""
        level = 0
        levels: dict[fx.Node, int] = {}
        for node in self._graph.nodes:
            level += node.op == "call_module"
            levels[node] = level
        found: dict[int, list[_Version]] = {}
        for key in sorted(keys, key=lambda key: levels[key[0]]):
            found.setdefault(levels[key[0]], []).append(key)
        return list(found.values())

    def _completes(self, key: _Version, late: set[fx.Node]) -> bool:
        """Whether late work on the host needs the value, and nothing writes it."""
        written = any(info(node).writes & info(key[0]).storages for node in self._graph.nodes)
        return not written and completing_s([key[0]], late, self._context) > 0

    def _pays(self, values: list[fx.Node], late: set[fx.Node]) -> bool:
        """Whether the work is worth a transfer of its own."""
        profile = self._context.profile
        return completing_s(values, late, self._context) > 2 * (profile.synchronise_s + profile.accelerator.launch_s)

    def _late_transfers(self, keys: list[_Version]) -> list[list[_Version]]:
        """Small values in one transfer; each large one by itself, so that it need not be kept to the end."""
        small = [key for key in keys if value_bytes(key[0], self._context) < LARGE_DOWNLOAD_BYTES]
        large = [[key] for key in keys if key not in small]
        return [*large, small] if small else large

    def _read_where_it_lies(self, user: fx.Node, operand: fx.Node) -> bool:
        """Let a host part read an input of the call itself instead of its mirror, if nothing writes it."""
        if operand.target != ir.MIRROR or user.target != ir.HOST_LINEAR:
            return False
        if any(info(node).writes & info(operand).storages for node in self._graph.nodes):
            return False
        user.replace_input_with(operand, operand.all_input_nodes[0])
        return True

    def _versions(self) -> dict[tuple[fx.Node, fx.Node], int]:
        """How often the storages of each (user, operand) have been written on the accelerator before the user."""
        written: dict[int, int] = {}
        versions: dict[tuple[fx.Node, fx.Node], int] = {}
        for user in self._graph.nodes:
            for operand in user.all_input_nodes:
                versions[user, operand] = sum(written.get(key, 0) for key in info(operand).storages)
            if info(user).side == "accelerator":
                for key in info(user).writes:
                    written[key] = written.get(key, 0) + 1
        return versions

    def _earliest(self, readers: list[fx.Node]) -> fx.Node:
        wanted = set(readers)
        found: fx.Node = next(node for node in self._graph.nodes if node in wanted)
        return found

    def _crossings(self, reads: Side, lies: Side) -> list[tuple[fx.Node, fx.Node]]:
        return [
            (user, operand)
            for user in self._graph.nodes
            for operand in user.all_input_nodes
            if operand_side(user, operand) == reads and value_side(operand) == lies
        ]

    def _mirror(self, operand: fx.Node) -> fx.Node:
        if operand not in self._mirrors:
            with self._graph.inserting_before(self._first):
                mirror = self._graph.call_function(ir.MIRROR, (operand,))
            self._mirrors[operand] = annotate(mirror, info(operand), side="accelerator")
        return self._mirrors[operand]

    def _upload(self, operand: fx.Node) -> fx.Node:
        if operand not in self._up:
            notes = _moved(operand)
            with self._graph.inserting_after(operand):
                start = annotate(self._graph.call_function(ir.TO_ACCELERATOR, (operand,)), notes)
            with self._graph.inserting_after(start):
                self._up[operand] = annotate(self._graph.call_function(ir.WAIT, (start,)), notes)
            for node in (start, self._up[operand]):
                annotate(node, side="accelerator")
        return self._up[operand]

    def _download(self, keys: list[_Version], before: fx.Node) -> dict[_Version, fx.Node]:
        operands = [operand for operand, _ in keys]
        notes = _download_info(operands)
        with self._graph.inserting_before(before):
            start = annotate(self._graph.call_function(ir.TO_HOST, (operands,)), notes)
            done = annotate(self._graph.call_function(ir.WAIT_HOST, (start,)), notes)
            items = [self._graph.call_function(operator.getitem, (done, i)) for i in range(len(operands))]
        for item, operand in zip(items, operands, strict=True):
            annotate(item, _moved(operand), side="host")
        return dict(zip(keys, items, strict=True))


def _download_info(operands: list[fx.Node]) -> NodeInfo:
    return NodeInfo(
        value=[info(operand).value for operand in operands], module=info(operands[0]).module, side="host"
    )


def _moved(operand: fx.Node) -> NodeInfo:
    notes = info(operand)
    return NodeInfo(value=notes.value, module=notes.module, position=notes.position)


__all__ = ["insert_transfers", "operand_side", "value_side"]
