"""Proof that the issue order is free of races, or an error that names the nodes.

Why: a missing wait or a slot reused too early shows only under the right timing, so nothing about timing
is trusted here. The rules are read from the scheduled graph alone and know nothing of the passes
that placed its nodes.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from hetegen_compile import ir
from hetegen_compile.errors import MissingWaitError, ScheduleError, SlotInUseError
from hetegen_compile.ir import info
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.insert_transfers import operand_side, value_side
from hetegen_compile.passes.schedule import slot_bytes

_STARTS = {
    ir.PREFETCH: {ir.WAIT, ir.RELEASE},
    ir.CARRIED: {ir.WAIT, ir.RELEASE},
    ir.TO_ACCELERATOR: {ir.WAIT},
    ir.TO_HOST: {ir.WAIT_HOST},
}


def verify(module: fx.GraphModule, context: Context) -> None:
    """Check every rule on every node.

    Raises:
        MissingWaitError: a value is used before the wait that orders it, or on the side where it is not.
        SlotInUseError: a slot is overwritten or read although its reader's release says otherwise.
        ScheduleError: a transfer has no wait or more than one, or a slot is never released.
    """
    residency = context.residency
    module.graph.lint()
    _check_transfers(module.graph)
    _check_sides(module.graph)
    _check_slots(module.graph, 0 if residency is None else residency.ring_bytes)
    _check_carried(module.graph)
    _check_downloads(module.graph)
    names = {str(call.target) for call in module.graph.find_nodes(op="call_module")}
    inner = {name: module.get_submodule(name) for name in names}
    segments = {name: one.graph for name, one in inner.items() if isinstance(one, fx.GraphModule)}
    _check_in_place_order(module.graph, segments)


def _check_transfers(graph: fx.Graph) -> None:
    """Each transfer is waited for once, released once if it fills a slot, and touched by nothing else."""
    for node in graph.nodes:
        allowed = _STARTS.get(node.target)
        if allowed is None:
            continue
        for target in allowed:
            found = [user for user in node.users if user.target == target]
            if len(found) != 1:
                raise ScheduleError(f"{node.name} ({info(node).module}) has {len(found)} {target}, expected one")
        stranger = next((user for user in node.users if user.target not in allowed), None)
        if stranger is not None:
            raise MissingWaitError(f"{stranger.name} uses {node.name} without a wait in between")


def _check_sides(graph: fx.Graph) -> None:
    """A value is read only on the side where it is."""
    for user in graph.nodes:
        for operand in user.all_input_nodes:
            reads, lies = operand_side(user, operand), value_side(operand)
            if reads is not None and lies is not None and reads != lies:
                raise MissingWaitError(
                    f"{user.name} ({info(user).module}) reads {operand.name} on the {reads}, but it is on the "
                    f"{lies}; a transfer and its wait are missing between them"
                )


def _check_slots(graph: fx.Graph, ring_bytes: int) -> None:
    """No slot is overwritten before its release, none is read after it, all are inside the ring."""
    filled: list[tuple[int, int, fx.Node]] = []
    released: dict[fx.Node, fx.Node] = {}
    waited_for: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in (ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED):
            waited_for |= set(node.args[4]) if node.target != ir.CARRIED else set()
            _check_prefetch(node, filled, released, waited_for, ring_bytes)
        elif node.target == ir.RELEASE:
            released[node.args[0]] = node
        else:
            _check_slot_reader(node, released)


def _check_prefetch(
    node: fx.Node,
    filled: list[tuple[int, int, fx.Node]],
    released: dict[fx.Node, fx.Node],
    waited_for: set[fx.Node],
    ring_bytes: int,
) -> None:
    lo = int(node.args[3])  # type: ignore[arg-type]
    hi = lo + slot_bytes(node)
    if lo < 0 or hi > ring_bytes:
        raise ScheduleError(f"{node.name} fills bytes {lo} to {hi} of a staging ring of {ring_bytes}")
    for other_lo, other_hi, other in filled:
        if lo < other_hi and other_lo < hi and released.get(other) not in waited_for:
            raise SlotInUseError(
                f"{node.name} overwrites the slot of {other.name} without waiting for its release"
            )
    filled.append((lo, hi, node))


def _check_carried(graph: fx.Graph) -> None:
    """What one step leaves to the next is what the next takes over, and nothing of this step is in the way.

    A step begins with the carried slots filled: nothing may be prefetched before the last of them. Each is filled
    again exactly once, in the same order, behind every other prefetch, and nobody in this step reads that copy.
    """
    fills = [node for node in graph.nodes if node.target in (ir.CARRIED, ir.PREFETCH, ir.PREFETCH_AHEAD)]
    order = [(ir.CARRIED, ir.PREFETCH, ir.PREFETCH_AHEAD).index(node.target) for node in fills]
    early = next((node for node, now, then in zip(fills, order, order[1:], strict=False) if now > then), None)
    if early is not None:
        raise SlotInUseError(f"{early.name} is issued before a transfer that the step before started, or after its own")
    carried = [node for node in fills if node.target == ir.CARRIED]
    ahead = [node for node in fills if node.target == ir.PREFETCH_AHEAD]
    for one, other in itertools.zip_longest(carried, ahead):
        if one is None or other is None or one.args != other.args[:4]:
            raise ScheduleError(f"{other} does not start what {one} takes over in the next step")
        if other.users:
            raise MissingWaitError(f"{next(iter(other.users)).name} uses {other.name}, a prefetch for the next step")


def _check_slot_reader(node: fx.Node, released: dict[fx.Node, fx.Node]) -> None:
    for operand in node.all_input_nodes:
        transfer: Any = operand.args[0] if operand.target == ir.WAIT else None
        if transfer in released:
            raise SlotInUseError(f"{node.name} reads the slot of {transfer} after {released[transfer]} gave it up")


def _check_downloads(graph: fx.Graph) -> None:
    """What a download reads is not written before the host has waited for it."""
    pending: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        if node.target == ir.TO_HOST:
            sources = (info(operand).storages for operand in node.all_input_nodes)
            pending[node] = frozenset[int]().union(*sources)
        elif node.target == ir.WAIT_HOST:
            pending.pop(node.args[0])
        elif info(node).side == "accelerator":
            for transfer, storages in pending.items():
                if storages & info(node).writes:
                    raise MissingWaitError(f"{node.name} writes what {transfer.name} is still copying down")


def _check_in_place_order(graph: fx.Graph, segments: Mapping[str, fx.Graph]) -> None:
    """On each side, writes of a storage and whatever else touches it keep the program's order."""
    touched: dict[tuple[str | None, int], _Touched] = {}
    for node in graph.nodes:
        for key, now in _accesses(node, segments).items():
            before = touched.setdefault((info(node).side, key), _Touched())
            if min(now.any) < before.last_write or min(now.writes, default=_NEVER) < before.last_access:
                raise ScheduleError(
                    f"{node.name} ({info(node).module}) is issued after {before.node}, but in the program it touches "
                    "the same storage first and one of the two writes it"
                )
            before.last_write = max([before.last_write, *now.writes])
            before.last_access = max([before.last_access, *now.any])
            before.node = node


_NEVER = 1 << 62


@dataclass
class _Touched:
    """The latest program positions at which a storage was written and touched so far."""

    last_write: int = -1
    last_access: int = -1
    node: fx.Node | None = None


@dataclass
class _Access:
    """Program positions at which one node touches a storage, and those of them that are writes."""

    any: list[int]
    writes: list[int]


def _accesses(node: fx.Node, segments: Mapping[str, fx.Graph]) -> dict[int, _Access]:
    """What a node does to each storage that it touches; a segment does what its members do."""
    inner = segments.get(str(node.target)) if node.op == "call_module" else None
    members = [node] if inner is None else list(inner.nodes)
    found: dict[int, _Access] = {}
    for member in members:
        position = info(member).position
        if member.op not in ("call_function", "call_method") or position < 0 or member.target in _UNORDERED:
            continue
        read = frozenset[int]().union(*(info(operand).storages for operand in member.all_input_nodes))
        for key in read | info(member).writes:
            access = found.setdefault(key, _Access([], []))
            access.any.append(position)
            access.writes += [position] if key in info(member).writes else []
    return found


_UNORDERED = (*_STARTS, ir.WAIT, ir.WAIT_HOST, ir.RELEASE, ir.MIRROR, ir.RESIDENT, ir.TWIN, operator.getitem)
