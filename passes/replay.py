"""A schedule replayed node by node on clocks: the verifier's only view of the graph.

``happens_before`` says what each operation is, ``memory`` what an access may do; here the nodes are gone through
in issue order, and every value gets the memory that it lies in. A segment is a launch whose members touch memory
in program order at one point of the compute lane.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from hetegen_compile.errors import MissingWaitError, ScheduleError
from hetegen_compile.ir import Side, info
from hetegen_compile.passes.context import Effects
from hetegen_compile.passes.happens_before import (
    COMPUTE,
    HOST,
    OPERATIONS,
    Access,
    Clocks,
    Gives,
    Operation,
    name_of,
    nodes_in,
    short,
    side_of,
    slot_bytes,
)
from hetegen_compile.passes.memory import END, INITIAL, Accesses, Event, Held, Memory, Slot

_BEFORE_THE_STEP = 0


class Replay:
    """One pass over a schedule; raises the first fault and leaves the state at the end of the step."""

    def __init__(self, effects: Effects, segments: Mapping[str, fx.Graph], rings: Mapping[str, int]) -> None:
        self._segments = segments
        self._rings = rings
        self._clocks = Clocks()
        self._place = 0
        self.accesses = Accesses(self._clocks, effects)
        self.inputs: dict[int, Memory] = {}
        self.mirrors: dict[object, Memory] = {}
        self.values: dict[fx.Node, Held | list[Held]] = {}
        self.events: dict[fx.Node, Event] = {}
        self.memories: list[Memory] = []
        self.kept: list[fx.Node] = []
        self.carried: dict[str, dict[tuple[Any, ...], fx.Node]] = {"in": {}, "out": {}}
        self._filled: list[fx.Node] = []

    def run(self, graph: fx.Graph) -> None:
        """Replay every node in issue order."""
        for node in graph.nodes:
            self.advance()
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
        for node in self.kept:
            self._keep(node)

    def advance(self) -> int:
        """Go on to the next place in issue order; the members of a segment have places of their own."""
        self._place += 1
        return self._place

    # ---- memory of values ----------------------------------------------------------------------------------

    def new(self, node: fx.Node, side: Side, access: Access, **more: Any) -> Memory:
        """Memory that ``node`` is the first to hold."""
        memory = Memory(side, access, self._place, used=self._place, nodes=[node], **more)
        self.memories.append(memory)
        return memory

    def _input(self, node: fx.Node) -> Held:
        before = Access(node, HOST, _BEFORE_THE_STEP)
        for key in info(node).storages:
            if key not in self.inputs:
                self.inputs[key] = self.new(node, "host", before, is_input=True)
        return {key: self.inputs[key] for key in info(node).storages}

    def _mirror(self, node: fx.Node) -> Held:
        """A mirror has the contents that its input has before the step, whatever its place in the graph is."""
        (host,) = node.all_input_nodes
        if host.op not in ("placeholder", "get_attr"):
            raise _fault(node, f"mirrors {name_of(host)}, which is no input", f"a transfer of {host} -> {node}")
        before, held = Access(node, COMPUTE, _BEFORE_THE_STEP), Held()
        keys: Iterable[int | None] = info(node).storages or (None,)
        for key in keys:
            same = (node.target, *map(str, node.args)) if key is None else key
            if same not in self.mirrors:
                self.mirrors[same] = self.new(node, "accelerator", before, is_input=True)
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
            held[key] = self.new(node, side, access)
        if not held and isinstance(info(node).value, Tensor):
            held[None] = self.new(node, side, access)
        return held

    # ---- nodes of the program ------------------------------------------------------------------------------

    def _takes_item(self, node: fx.Node) -> bool:
        """An item of a list of values is no work: the value has a name now."""
        source = node.args[0] if node.args else None
        if node.target is not operator.getitem or not isinstance(source, fx.Node):
            return False
        self._refuse_transfer(node, source)
        listed = self.values.get(source)
        if not isinstance(listed, list):
            return False
        held = self.values[node] = listed[node.args[1]]  # type: ignore[index]
        for memory in held.values():
            memory.nodes.append(node)
        return True

    def _host(self, node: fx.Node) -> None:
        access, notes = self._clocks.issue(HOST, node), info(node)
        self._read(node, node.all_input_nodes, "host", access, _position(node))
        for key in notes.writes:
            found = [m for operand in node.all_input_nodes for own, m in _each(self.values.get(operand)) if own == key]
            for memory in {id(memory): memory for memory in found}.values():
                self._write(memory, access, notes.position)
        self.values[node] = self._made(node, "host", access, node.all_input_nodes)

    def _segment(self, node: fx.Node) -> None:
        access = self._clocks.issue(COMPUTE, node)
        self._read(node, node.all_input_nodes, "accelerator", access, None)
        inner = self._segments.get(str(node.target))
        if inner is None:
            raise ScheduleError(f"verify: {name_of(node)} calls {node.target}, which is no segment")
        self.values[node] = _Members(self, node, access).run(inner)

    # ---- operations of the schedule --------------------------------------------------------------------------

    def _operation(self, node: fx.Node, operation: Operation) -> None:
        if operation.at_end:
            self.kept.append(node)
        elif operation.gives is Gives.INPUT:
            self.values[node] = self._mirror(node)
        elif operation.gives is Gives.TOKEN:
            self._release(node, operation)
        else:
            self._run_operation(node, operation)

    def _run_operation(self, node: fx.Node, operation: Operation) -> None:
        assert operation.lane is not None
        waited = [self._event(node, source, operation) for source in self._waited_for(node, operation)]
        access = self._clocks.issue(operation.lane, node, (event.clock for event in waited), operation.behind)
        read = self._read_arguments(node, operation, access)
        for operand in [operand for place in operation.writes for operand in nodes_in(node.args[place])]:
            for key, memory in _each(self.values.get(operand)):
                self._write(memory, access, self.accesses.version_at(key, END))
        if operation.gives is Gives.BROUGHT:
            self._bring(node, waited)
        elif operation.gives in (Gives.COPY, Gives.LOAN):
            self._start_copy(node, operation, access, read)
        elif operation.gives is Gives.SLOT:
            self._start_fill(node, operation, access, read)
        elif operation.gives is Gives.NEW:
            self.values[node] = self._made(node, side_of(operation.lane), access, ())

    def _waited_for(self, node: fx.Node, operation: Operation) -> list[fx.Node]:
        """What the operation's arguments hold in the place of events; an argument that is also read may be a value."""
        return [
            source
            for place in operation.waits
            if place < len(node.args)
            for source in nodes_in(node.args[place])
            if source in self.events or place >= len(operation.reads) or operation.reads[place] is None
        ]

    def _event(self, node: fx.Node, source: fx.Node, operation: Operation) -> Event:
        event = self.events.get(source)
        if event is None or source.target not in operation.waits_for:
            what = f"waits for {name_of(source)}, which records no event of that kind"
            raise _fault(node, what, f"a start -> {node}")
        return event

    def _read_arguments(self, node: fx.Node, operation: Operation, access: Access) -> list[Memory]:
        """Copies take what is there; who reads the copy knows what should be."""
        position = {Gives.NEW: _position(node), Gives.NOTHING: END}.get(operation.gives)
        read: list[Memory] = []
        for argument, side in zip(node.args, operation.reads, strict=False):
            if side is not None:
                read += self._read(node, nodes_in(argument), side, access, position, arrived=bool(operation.waits))
        if operation.frees:
            for memory in read:
                if memory.slot is not None:
                    memory.slot.released = access
        return read

    def _bring(self, node: fx.Node, waited: list[Event]) -> None:
        (event,) = waited
        assert event.brings is not None, "only transfers bring something"
        self.values[node] = event.brings
        for memory in event.sources:
            memory.used = self._place

    def _start_copy(self, node: fx.Node, operation: Operation, access: Access, read: list[Memory]) -> None:
        lends = operation.gives is Gives.LOAN
        for memory in read if lends else ():
            memory.lent = node
        argument = node.args[0]
        listed = isinstance(argument, list | tuple)
        copies = [self._copy(operand, access, lends=lends) for operand in nodes_in(argument)]
        self.events[node] = Event(node, access, self._clocks.now(access.lane), copies if listed else copies[0], read)

    def _copy(self, operand: fx.Node, access: Access, *, lends: bool) -> Held:
        side: Side = "accelerator" if lends else "host"
        return {
            key: self.new(operand, side, access, version=memory.version, borrowed=lends)
            for key, memory in _each(self.values.get(operand))
        }

    # ---- slots -----------------------------------------------------------------------------------------------

    def _start_fill(self, node: fx.Node, operation: Operation, access: Access, read: list[Memory]) -> None:
        if operation.carried == "in" and self._filled:
            raise _fault(node, "comes from the step before, but a slot is filled first", f"{node} -> {self._filled[0]}")
        if operation.carried != "in":
            self._filled.append(node)
        lo: int = node.args[3]  # type: ignore[assignment]
        slot = Slot(operation.ring, lo, lo + slot_bytes(node), node)
        length = self._rings.get(operation.ring, END)  # a ring that no plan states: its slots are checked when made
        if lo < 0 or lo % operation.alignment or slot.hi > length:
            what = f"fills bytes {lo} to {slot.hi} of a {operation.ring} ring of {length} (slots begin at multiples of "
            raise _fault(node, f"{what}{operation.alignment})", f"an aligned slot inside the ring -> {node}")
        self.accesses.fill(slot, access)
        side: Side = "accelerator" if operation.ring == "staging" else "host"
        version = max((memory.version for memory in read), default=INITIAL)
        brings: Held = {None: self.new(node, side, access, version=version, slot=slot)}
        self.events[node] = Event(node, access, self._clocks.now(access.lane), brings, read)
        if operation.carried is not None:
            self.carried[operation.carried][_bytes_of(node)] = node

    def _release(self, node: fx.Node, operation: Operation) -> None:
        (transfer,) = node.all_input_nodes
        event = self._event(node, transfer, operation)
        assert operation.lane is not None
        access = self._clocks.issue(operation.lane, node)
        for memory in held_in(event.brings).values():
            self.accesses.release(memory, access)
        self.events[node] = Event(node, access, self._clocks.now(access.lane))

    # ---- accesses ----------------------------------------------------------------------------------------------

    def _read(
        self, user: fx.Node, operands: Iterable[fx.Node], side: Side, access: Access, position: int | None,
        *, arrived: bool = False,
    ) -> list[Memory]:
        """``user`` reads its operands on ``side``: they lie there, are complete and show the right version.

        ``arrived``: it has waited for the transfers among them itself.
        """
        read: list[Memory] = []
        for operand in operands:
            if arrived and operand in self.events:
                value = self.events[operand].brings
            else:
                self._refuse_transfer(user, operand)
                value = self.values.get(operand)
            for key, memory in _each(value):
                if memory.side != side:
                    raise _elsewhere(user, operand, side, memory)
                self.accesses.read(memory, access)
                memory.used = self._place
                if position is not None:
                    self.accesses.check_version(user, key, memory, position)
                read.append(memory)
        return read

    def _write(self, memory: Memory, access: Access, version: int) -> None:
        self.accesses.write(memory, access)
        memory.version = version
        memory.used = self._place

    def _refuse_transfer(self, user: fx.Node, operand: fx.Node) -> None:
        """A transfer is not a value before somebody has waited for it."""
        if operand not in self.events or operand in self.values:
            return
        waits = [short(target) for target in OPERATIONS[operand.target].ended_by[:1]]
        raise MissingWaitError(
            f"verify: {name_of(user)} uses {name_of(operand)} without a wait in between; "
            f"missing edge: {(waits or ['wait'])[0]}({operand}) -> {user}"
        )

    def _keep(self, node: fx.Node) -> None:
        """A value that outlives the step: all lanes are idle by then, so only its place matters."""
        for argument, side in zip(node.args, OPERATIONS[node.target].reads, strict=True):
            for operand in nodes_in(argument):
                for memory in held_in(self.values.get(operand)).values():
                    if memory.side != side or memory.slot is not None:
                        raise _elsewhere(node, operand, side or "host", memory)
                    memory.used = END


class _Members:
    """The members of one segment in program order."""

    def __init__(self, replay: Replay, call: fx.Node, access: Access) -> None:
        self._replay = replay
        self._call = call
        self._access = access
        self._held: dict[fx.Node, Held] = {}
        self._written: set[int] = set()

    def run(self, graph: fx.Graph) -> list[Held]:
        """Replay the members; returns the memory of the segment's results."""
        operands = iter(nodes_in(self._call.args))
        for member in graph.nodes:
            if member.op == "placeholder":
                self._held[member] = held_in(self._replay.values.get(next(operands)))
            elif member.op != "output":
                self._member(member)
        return [self._result(node) for node in nodes_in(next(iter(reversed(graph.nodes))).args[0])]

    def _result(self, node: fx.Node) -> Held:
        for memory in self._held[node].values():
            memory.inner = False
        return self._held[node]

    def _member(self, member: fx.Node) -> None:
        notes, held, place = info(member), Held(), self._replay.advance()
        touched = [pair for operand in member.all_input_nodes for pair in self._held.get(operand, {}).items()]
        for key, memory in touched:
            memory.used = place
            if notes.position >= 0:
                self._replay.accesses.check_version(self._call, key, memory, notes.position)
        for key, memory in touched:  # an operand and its view are one memory: all are read before one is written
            if key in notes.writes:
                self._write(memory, notes.position)
            if key in notes.storages:
                held.setdefault(key, memory)
        for key in notes.storages - held.keys():
            held[key] = self._replay.new(member, "accelerator", self._access, inner=True)
        self._held[member] = held

    def _write(self, memory: Memory, position: int) -> None:
        if id(memory) not in self._written:
            self._written.add(id(memory))
            self._replay.accesses.write(memory, self._access)
        memory.version = position


def held_in(value: Held | list[Held] | None) -> Held:
    """All memory of a value, those of a list together."""
    return dict(_each(value))


def _each(value: Held | list[Held] | None) -> Iterator[tuple[int | None, Memory]]:
    if isinstance(value, list):
        for one in value:
            yield from one.items()
    elif value:
        yield from value.items()


def _position(node: fx.Node) -> int | None:
    position = info(node).position
    return position if position >= 0 else None


def _bytes_of(start: fx.Node) -> tuple[Any, ...]:
    weight, ranges, dim, offset = start.args[:4]
    return weight, tuple(ranges), dim, offset  # type: ignore[arg-type]


def _elsewhere(user: fx.Node, operand: fx.Node, side: Side, memory: Memory) -> MissingWaitError:
    return MissingWaitError(
        f"verify: {name_of(user)} reads {name_of(operand)} on the {side}, but it is on the {memory.side}; "
        f"missing edge: a transfer of {operand} and its wait -> {user}"
    )


def _fault(node: fx.Node, what: str, edge: str) -> ScheduleError:
    return ScheduleError(f"verify: {name_of(node)} {what}; missing edge: {edge}")
