"""A schedule replayed on clocks: who may read or write which memory when, and what it then holds.

Every piece of memory (an input, its mirror, what a node makes, what a transfer brings, a slot) is a ``Memory``.
It knows its last write and the reads since, and its *version*: the program position of the last in-place write
that its contents show, inherited when it is copied. A read at program position p must find the version of the
last write before p, so a read or a write that overtakes another is found wherever copies have gone meanwhile.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from hetegen_compile.errors import MissingWaitError, ScheduleError, SlotInUseError
from hetegen_compile.ir import Side, info
from hetegen_compile.passes.context import Effects
from hetegen_compile.passes.happens_before import (
    COMPUTE,
    HOST,
    LANES,
    OPERATIONS,
    Access,
    Clock,
    Clocks,
    Gives,
    Operation,
    name_of,
    nodes_in,
    side_of,
    slot_bytes,
)

INITIAL = -1
"""Version of memory that no in-place write has changed yet."""
END = 1 << 62
"""Program position of what comes after every node."""
_BEFORE_THE_STEP = 0


@dataclass(eq=False, slots=True)
class Slot:
    """Bytes of a ring that a prefetch occupies until its release."""

    ring: str
    lo: int
    hi: int
    node: fx.Node
    released: Access | None = None


@dataclass(eq=False, slots=True)
class Memory:
    """One piece of memory on one side.

    ``born`` and ``used`` are places in issue order, ``nodes`` those that hold it (for its size).
    """

    side: Side
    written: Access
    born: int
    version: int = INITIAL
    reads: dict[int, Access] = field(default_factory=dict)
    slot: Slot | None = None
    lent: fx.Node | None = None
    borrowed: bool = False
    is_input: bool = False
    used: int = 0
    nodes: list[fx.Node] = field(default_factory=list)


Held = dict[int | None, Memory]
"""The memory of a value by storage (``NodeInfo.storages``); None for parts of a Linear, which the program has not."""


@dataclass(eq=False, slots=True)
class Event:
    """A transfer or token: what those who wait for it know, and what it brings."""

    node: fx.Node
    access: Access
    clock: Clock
    brings: Held | list[Held] | None = None
    sources: list[Memory] = field(default_factory=list)
    lent: bool = False


class Replay:
    """One pass over a schedule; raises the first fault and leaves the state at the end of the step."""

    def __init__(self, effects: Effects, segments: Mapping[str, fx.Graph], rings: Mapping[str, int]) -> None:
        self._writes = effects.writes
        self._segments = segments
        self._rings = rings
        self._clocks = Clocks()
        self._slots: list[Slot] = []
        self._place = 0
        self.inputs: dict[int, Memory] = {}
        self.mirrors: dict[object, Memory] = {}
        self.values: dict[fx.Node, Held | list[Held]] = {}
        self.events: dict[fx.Node, Event] = {}
        self.memories: list[Memory] = []
        self.written_by_host: set[int] = set()
        self.at_end: list[fx.Node] = []

    def run(self, graph: fx.Graph) -> None:
        """Replay every node in issue order."""
        for node in graph.nodes:
            self.advance()
            self._issue(node)
        for node in self.at_end:
            self._read_at_end(node)

    def advance(self) -> None:
        """Go on to the next place in issue order; the members of a segment have places of their own."""
        self._place += 1

    def _issue(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            self.values[node] = self._input(node)
        elif node.op == "output":
            self._read(node, node.all_input_nodes, "host", self._clocks.issue(HOST, node), END)
        elif node.op == "call_module":
            self._segment(node)
        elif node.target in OPERATIONS:
            self._operation(node, OPERATIONS[node.target])
        elif not self._takes_item(node):
            self._host(node)

    # ---- memory ------------------------------------------------------------------------------------------

    def _new(self, node: fx.Node, side: Side, access: Access, **more: Any) -> Memory:
        memory = Memory(side, access, self._place, used=self._place, nodes=[node], **more)
        self.memories.append(memory)
        return memory

    def _input(self, node: fx.Node) -> Held:
        before = Access(node, HOST, _BEFORE_THE_STEP)
        for key in info(node).storages:
            if key not in self.inputs:
                self.inputs[key] = self._new(node, "host", before, is_input=True)
        return {key: self.inputs[key] for key in info(node).storages}

    def _mirror(self, node: fx.Node) -> Held:
        """A mirror has the contents that its input has before the step, whatever its place in the graph is."""
        before = Access(node, COMPUTE, _BEFORE_THE_STEP)
        (host,) = node.all_input_nodes
        if host.op not in ("placeholder", "get_attr"):
            raise _fault(node, f"mirrors {name_of(host)}, which is no input", f"to_accelerator({host.name})")
        keys: Iterable[int | None] = info(node).storages or (None,)
        held: Held = {}
        for key in keys:
            same = (node.target, *node.args) if key is None else key
            if same not in self.mirrors:
                self.mirrors[same] = self._new(node, "accelerator", before, is_input=True)
            elif key is not None:
                self.mirrors[same].nodes.append(node)
            held[key] = self.mirrors[same]
        return held

    def _made(self, node: fx.Node, side: Side, access: Access, operands: Iterable[fx.Node]) -> Held:
        """What a node returns: memory of its operands where it is an alias, else new memory."""
        held: Held = {}
        for operand in operands:
            for key, memory in _each(self.values.get(operand)):
                if key in info(node).storages:
                    held.setdefault(key, memory)
        for key in info(node).storages - held.keys():
            held[key] = self._new(node, side, access)
        if not held and isinstance(info(node).value, Tensor):
            held[None] = self._new(node, side, access)
        return held

    # ---- nodes -------------------------------------------------------------------------------------------

    def _takes_item(self, node: fx.Node) -> bool:
        """An item of a list of values: no work, the value has a name now."""
        source = node.args[0] if node.args else None
        if node.target is not operator.getitem or not isinstance(source, fx.Node):
            return False
        if source in self.events and source not in self.values:
            raise self._unwaited(node, self.events[source])
        listed = self.values.get(source)
        if isinstance(listed, list):
            self.values[node] = listed[node.args[1]]  # type: ignore[index]
            for memory in self.values[node].values():  # type: ignore[union-attr]
                memory.nodes.append(node)
            return True
        return False

    def _host(self, node: fx.Node) -> None:
        access = self._clocks.issue(HOST, node)
        notes = info(node)
        self._read(node, node.all_input_nodes, "host", access, _position(node))
        for key in notes.writes:
            for memory in self._operand_memories(node, key):
                self._write(memory, access)
                memory.version = notes.position
                if memory is self.inputs.get(key):
                    self.written_by_host.add(key)
        self.values[node] = self._made(node, "host", access, node.all_input_nodes)

    def _operand_memories(self, node: fx.Node, key: int) -> list[Memory]:
        found = {
            id(memory): memory
            for operand in node.all_input_nodes
            for own, memory in _each(self.values.get(operand))
            if own == key
        }
        return list(found.values())

    def _operation(self, node: fx.Node, operation: Operation) -> None:
        if operation.at_end:
            self.at_end.append(node)
            return
        if operation.gives is Gives.INPUT:
            self.values[node] = self._mirror(node)
            return
        if operation.gives is Gives.TOKEN:
            self._release(node, operation)
            return
        waited = [self._event(node, source, operation) for source in self._waited_for(node, operation)]
        lane = HOST if operation.lane is None else operation.lane
        access = self._clocks.issue(lane, node, (event.clock for event in waited), operation.behind)
        read = self._read_arguments(node, operation, access)
        self._write_arguments(node, operation, access)
        self._give(node, operation, access, waited, read)

    def _waited_for(self, node: fx.Node, operation: Operation) -> list[fx.Node]:
        return [] if operation.waits is None else nodes_in(node.args[operation.waits])

    def _event(self, node: fx.Node, source: fx.Node, operation: Operation) -> Event:
        event = self.events.get(source)
        if event is None or source.target not in operation.waits_for:
            raise _fault(node, f"waits for {name_of(source)}, which records no event of that kind", f"a start before {node.name}")
        return event

    def _read_arguments(self, node: fx.Node, operation: Operation, access: Access) -> list[Memory]:
        position = {Gives.NEW: _position(node), Gives.NOTHING: END}.get(operation.gives)
        read: list[Memory] = []
        for argument, side in zip(node.args, operation.reads, strict=False):
            if side is not None:
                read += self._read(node, nodes_in(argument), side, access, position)
        return read

    def _write_arguments(self, node: fx.Node, operation: Operation, access: Access) -> None:
        for place in operation.writes:
            for operand in nodes_in(node.args[place]):
                for key, memory in _each(self.values.get(operand)):
                    self._write(memory, access)
                    memory.version = self._version_at(key, END)
                    if key is not None and memory is self.inputs.get(key):
                        self.written_by_host.add(key)

    def _give(
        self, node: fx.Node, operation: Operation, access: Access, waited: list[Event], read: list[Memory]
    ) -> None:
        if operation.gives is Gives.BROUGHT:
            (event,) = waited
            assert event.brings is not None
            self.values[node] = event.brings
            for memory in event.sources:
                memory.used = self._place
        elif operation.gives in (Gives.COPY, Gives.LOAN):
            self._start_copy(node, operation, access, read)
        elif operation.gives is Gives.SLOT:
            self._start_prefetch(node, operation, access, read)
        elif operation.gives is Gives.NEW:
            self.values[node] = self._made(node, side_of(access.lane), access, ())

    # ---- transfers ---------------------------------------------------------------------------------------

    def _start_copy(self, node: fx.Node, operation: Operation, access: Access, read: list[Memory]) -> None:
        lends = operation.gives is Gives.LOAN
        side: Side = "accelerator" if lends else "host"
        if lends:
            for memory in read:
                memory.lent = node
        argument = node.args[0]
        operands = argument if isinstance(argument, list | tuple) else [argument]
        copies = [self._copy(operand, node, side, access, lends) for operand in operands]  # type: ignore[arg-type]
        brings = copies if isinstance(argument, list | tuple) else copies[0]
        self.events[node] = Event(node, access, self._clocks.now(access.lane), brings, read)

    def _copy(self, operand: fx.Node, node: fx.Node, side: Side, access: Access, borrowed: bool) -> Held:
        copies: Held = {}
        for key, memory in _each(self.values.get(operand)):
            copies[key] = self._new(operand, side, access, version=memory.version, borrowed=borrowed)
        return copies

    def _start_prefetch(self, node: fx.Node, operation: Operation, access: Access, read: list[Memory]) -> None:
        lo = int(node.args[3])  # type: ignore[arg-type]
        slot = Slot(operation.ring, lo, lo + slot_bytes(node), node)
        length = self._rings.get(operation.ring, 0)
        if lo < 0 or slot.hi > length:
            raise _fault(node, f"fills bytes {lo} to {slot.hi} of a {operation.ring} ring of {length}", "a slot inside the ring")
        for other in [one for one in self._slots if one.ring == slot.ring and one.lo < slot.hi and lo < one.hi]:
            self._overwrite(node, access, other)
            self._slots.remove(other)
        self._slots.append(slot)
        version = max((memory.version for memory in read), default=INITIAL)
        brings: Held = {None: self._new(node, "accelerator", access, version=version, slot=slot)}
        self.events[node] = Event(node, access, self._clocks.now(access.lane), brings, read)

    def _overwrite(self, node: fx.Node, access: Access, other: Slot) -> None:
        if other.released is None:
            raise SlotInUseError(
                f"verify: {name_of(node)} overwrites the slot of {name_of(other.node)} before it is released; "
                f"missing edge: release({other.node.name}) -> {node.name}"
            )
        if not self._clocks.covers(access, other.released):
            raise SlotInUseError(
                f"verify: {name_of(node)} overwrites the slot of {name_of(other.node)} without waiting for its "
                f"release; missing edge: {other.released.node.name} -> {node.name}"
            )

    def _release(self, node: fx.Node, operation: Operation) -> None:
        (transfer,) = node.all_input_nodes
        event = self._event(node, transfer, operation)
        assert operation.lane is not None
        access = self._clocks.issue(operation.lane, node)
        assert isinstance(event.brings, dict)
        for memory in event.brings.values():
            slot = memory.slot
            assert slot is not None
            if slot.released is not None:
                raise SlotInUseError(f"verify: {name_of(node)} releases {transfer.name}, which {slot.released.node.name} released")
            self._require(access, event.access, "releases", memory)
            self._require_reads_over(access, memory)
            slot.released = access
        self.events[node] = Event(node, access, self._clocks.now(access.lane))

    # ---- segments ----------------------------------------------------------------------------------------

    def _segment(self, node: fx.Node) -> None:
        """A launch: its members touch memory in program order, all at one point of the compute lane."""
        access = self._clocks.issue(COMPUTE, node)
        self._read(node, node.all_input_nodes, "accelerator", access, None)
        inner = self._segments.get(str(node.target))
        if inner is None:
            raise ScheduleError(f"verify: {name_of(node)} calls {node.target}, which is no segment")
        _Members(self, node, access).run(inner)

    # ---- accesses ----------------------------------------------------------------------------------------

    def _read(
        self, user: fx.Node, operands: Iterable[fx.Node], side: Side, access: Access, position: int | None
    ) -> list[Memory]:
        """``user`` reads its operands on ``side``: they must lie there, be complete and show the right version."""
        read: list[Memory] = []
        for operand in operands:
            if operand in self.events and operand not in self.values:
                raise self._unwaited(user, self.events[operand])
            for key, memory in _each(self.values.get(operand)):
                if memory.side != side:
                    raise MissingWaitError(
                        f"verify: {name_of(user)} reads {name_of(operand)} on the {side}, but it is on the {memory.side}; "
                        f"missing edge: a transfer of {operand.name} and its wait -> {user.name}"
                    )
                self._read_memory(memory, access)
                if position is not None:
                    self.check_version(user, key, memory, position)
                read.append(memory)
        return read

    def _read_memory(self, memory: Memory, access: Access) -> None:
        if memory.slot is not None and memory.slot.released is not None:
            raise SlotInUseError(
                f"verify: {name_of(access.node)} reads the slot of {name_of(memory.slot.node)} after "
                f"{memory.slot.released.node.name} gave it up; missing edge: {access.node.name} -> "
                f"{memory.slot.released.node.name}"
            )
        self._require(access, memory.written, "reads", memory)
        memory.reads[access.lane] = access
        memory.used = self._place

    def _write(self, memory: Memory, access: Access) -> None:
        """``access`` writes: everything that touched the memory before is over, and nobody else owns it."""
        if memory.lent is not None:
            raise MissingWaitError(
                f"verify: {name_of(access.node)} writes what {name_of(memory.lent)} lent to the accelerator for the whole "
                f"step; missing edge: the end of the step -> {access.node.name}"
            )
        if memory.borrowed:
            raise ScheduleError(
                f"verify: {name_of(access.node)} writes {name_of(memory.written.node)}, which is a view of a host tensor; "
                f"missing edge: a copy of it -> {access.node.name}"
            )
        self._require(access, memory.written, "writes", memory)
        self._require_reads_over(access, memory)
        memory.reads.clear()
        memory.written = access
        memory.used = self._place

    def _require(self, later: Access, earlier: Access, verb: str, memory: Memory) -> None:
        if not self._clocks.covers(later, earlier):
            raise MissingWaitError(
                f"verify: {name_of(later.node)} on {LANES[later.lane]} {verb} what {name_of(earlier.node)} on "
                f"{LANES[earlier.lane]} may still be making; missing edge: a wait for {earlier.node.name} -> {later.node.name}"
            )

    def _require_reads_over(self, writer: Access, memory: Memory) -> None:
        for reader in memory.reads.values():
            if not self._clocks.covers(writer, reader):
                raise MissingWaitError(
                    f"verify: {name_of(writer.node)} writes what {name_of(reader.node)} on {LANES[reader.lane]} is still "
                    f"copying; missing edge: a wait for {reader.node.name} -> {writer.node.name}"
                )

    def _unwaited(self, user: fx.Node, event: Event) -> MissingWaitError:
        waits = " or ".join(str(target).split(".")[1] for target in OPERATIONS[event.node.target].ended_by[:1])
        return MissingWaitError(
            f"verify: {name_of(user)} uses {name_of(event.node)} without a wait; "
            f"missing edge: {waits or 'wait'}({event.node.name}) -> {user.name}"
        )

    # ---- versions ----------------------------------------------------------------------------------------

    def _version_at(self, key: int | None, position: int) -> int:
        """The last in-place write of a storage before a program position."""
        writes = self._writes.get(key, ()) if key is not None else ()
        place = bisect_left(writes, position)
        return writes[place - 1] if place else INITIAL

    def check_version(self, user: fx.Node, key: int | None, memory: Memory, position: int) -> None:
        """The memory shows every write that the program has before ``position``, and none after."""
        if key not in self._writes:
            return
        expected = self._version_at(key, position)
        if memory.version == expected:
            return
        state = "misses a write that comes before" if memory.version < expected else "shows a write that comes after"
        raise ScheduleError(
            f"verify: {name_of(user)} touches {name_of(memory.nodes[0])}, which {state} it in the program (write at position "
            f"{max(expected, memory.version)}); missing edge: "
            + (f"that write -> {user.name}" if memory.version < expected else f"{user.name} -> {memory.written.node.name}")
        )

    def _read_at_end(self, node: fx.Node) -> None:
        operation = OPERATIONS[node.target]
        access = Access(node, HOST, END)
        for argument, side in zip(node.args, operation.reads, strict=True):
            for operand in nodes_in(argument):
                for _, memory in _each(self.values.get(operand)):
                    if memory.side != side or memory.slot is not None:
                        raise MissingWaitError(
                            f"verify: {name_of(node)} keeps {name_of(operand)} as a value on the {side}, where it is not"
                        )
                    memory.used = END
        del access


class _Members:
    """The members of one segment in program order."""

    def __init__(self, replay: Replay, call: fx.Node, access: Access) -> None:
        self._replay = replay
        self._call = call
        self._access = access
        self._held: dict[fx.Node, Held] = {}
        self._written: set[int] = set()

    def run(self, graph: fx.Graph) -> None:
        """Replay the members; leaves the segment's results as the values of the call."""
        operands = iter(nodes_in(self._call.args))
        for member in graph.nodes:
            if member.op == "placeholder":
                self._held[member] = held_in(self._replay.values.get(next(operands)))
            elif member.op == "output":
                self._replay.values[self._call] = [self._result(node) for node in nodes_in(member.args[0])]
            else:
                self._member(member)

    def _result(self, node: fx.Node) -> Held:
        return self._held.get(node, {})

    def _member(self, member: fx.Node) -> None:
        notes, held = info(member), Held()
        self._replay.advance()
        for operand in member.all_input_nodes:
            for key, memory in self._held.get(operand, {}).items():
                memory.used = self._replay._place
                if notes.position >= 0:
                    self._replay.check_version(self._call, key, memory, notes.position)
                if key in notes.writes:
                    self._write(memory, notes.position)
                if key in notes.storages:
                    held.setdefault(key, memory)
        for key in notes.storages - held.keys():
            held[key] = self._replay._new(member, "accelerator", self._access)
        self._held[member] = held

    def _write(self, memory: Memory, position: int) -> None:
        if id(memory) not in self._written:
            self._written.add(id(memory))
            self._replay._write(memory, self._access)
        memory.version = position


def _position(node: fx.Node) -> int | None:
    position = info(node).position
    return position if position >= 0 else None


def _each(value: Held | list[Held] | None) -> Iterator[tuple[int | None, Memory]]:
    if isinstance(value, list):
        for one in value:
            yield from one.items()
    elif value:
        yield from value.items()


def held_in(value: Held | list[Held] | None) -> Held:
    """All memory of a value, those of a list together."""
    return dict(_each(value))


def _fault(node: fx.Node, what: str, edge: str) -> ScheduleError:
    return ScheduleError(f"verify: {name_of(node)} {what}; missing edge: {edge}")
