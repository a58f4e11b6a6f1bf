"""A schedule replayed node by node on clocks: the verifier's only view of the graph.

``happens_before`` says what each operation is and ``memory`` what an access may do; here the nodes are gone through
in issue order. Where values lie is in ``held_values``; the slots of the rings and the members of segments, each a
launch, have modules of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from hetegen_compile import ir
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import INPUT_OPS, info
from hetegen_compile.passes.aten_listener import SHAPE_ONLY_ATEN
from hetegen_compile.passes.faults import elsewhere, fault
from hetegen_compile.passes.findings import Effects
from hetegen_compile.passes.happens_before import (
    COMPUTE,
    HOST,
    OPERATIONS,
    WORKER,
    Access,
    Clocks,
    Gives,
    Operation,
    lane_of,
    name_of,
    nodes_in,
    side_of,
)
from hetegen_compile.passes.held_values import HeldValues
from hetegen_compile.passes.memory import END, Accesses, Event, Memory
from hetegen_compile.passes.movement import is_view
from hetegen_compile.passes.pieces import passed_on
from hetegen_compile.passes.replay_segments import SegmentMembers
from hetegen_compile.passes.replay_slots import Slots


class Replay:
    """One pass over a schedule; raises the first fault and leaves the state at the end of the step."""

    def __init__(self, effects: Effects, segments: Mapping[str, fx.Graph], rings: Mapping[str, int]) -> None:
        self._segments = segments
        self._clocks = Clocks()
        self.accesses = Accesses(self._clocks, effects)
        self.held = HeldValues(self.accesses)
        self.slots = Slots(self.held, self.accesses, self._clocks, rings)
        self.kept: list[fx.Node] = []
        self._worker_reads: list[tuple[Access, list[Memory]]] = []

    def run(self, graph: fx.Graph) -> None:
        """Replay every node in issue order."""
        for node in graph.nodes:
            self.held.advance()
            if node.op in INPUT_OPS:
                self.held.come_in(node)
            elif node.op == "output":
                self.held.read(node, node.all_input_nodes, "host", self._clocks.issue(HOST, node), END)
            elif node.op == "call_module":
                self._segment(node)
            elif node.target in OPERATIONS:
                self._operation(node, OPERATIONS[node.target])
            elif not self._takes_item(node):
                self._host(node)
        self._worker_has_read(None)
        for node in self.kept:
            self._keep(node)

    # ---- nodes of the program ------------------------------------------------------------------------------

    def _takes_item(self, node: fx.Node) -> bool:
        """An item of a list of values is no work: the value has a name now."""
        source = node.args[0] if node.args else None
        if node.target is not operator.getitem or not isinstance(source, fx.Node):
            return False
        self.held.refuse_transfer(node, source)
        listed = self.held.values.get(source)
        if not isinstance(listed, list):
            return False
        held = self.held.values[node] = listed[node.args[1]]  # type: ignore[index]
        for memory in held.values():
            memory.nodes.append(node)
        return True

    def _host(self, node: fx.Node) -> None:
        access, notes = self._clocks.issue(lane_of(node, HOST), node), info(node)
        contents = not is_view(notes) and not (notes.aten and SHAPE_ONLY_ATEN.issuperset(notes.aten))
        position = _position(node) if contents else None
        self.held.read(node, node.all_input_nodes, "host", access, position)
        for key in notes.writes:
            found = [memory for operand in node.all_input_nodes for own, memory in self.held.of(operand) if own == key]
            for memory in {id(memory): memory for memory in found}.values():
                self.held.write(memory, access, notes.position)
        self.held.make(node, "host", access, node.all_input_nodes)

    def _segment(self, node: fx.Node) -> None:
        access = self._clocks.issue(COMPUTE, node)
        self.held.read(node, node.all_input_nodes, "accelerator", access, None)
        inner = self._segments.get(str(node.target))
        if inner is None:
            raise ScheduleError(f"verify: {name_of(node)} calls {node.target}, which is no segment")
        self.held.values[node] = SegmentMembers(self.held, self.accesses, node, access).run(inner)

    # ---- operations of the schedule --------------------------------------------------------------------------

    def _operation(self, node: fx.Node, operation: Operation) -> None:
        if operation.at_end:
            self.kept.append(node)
        elif operation.gives is Gives.INPUT:
            self.held.mirror(node)
        elif operation.gives is Gives.TOKEN:
            self._release(node, operation)
        else:
            self._run_operation(node, operation)

    def _release(self, node: fx.Node, operation: Operation) -> None:
        assert operation.lane is not None
        (transfer,) = node.all_input_nodes
        event = self._event(node, transfer, operation)
        self.slots.release(node, self._clocks.issue(operation.lane, node), event)

    def _run_operation(self, node: fx.Node, operation: Operation) -> None:
        assert operation.lane is not None
        waited = [self._event(node, source, operation) for source in self._waited_for(node, operation)]
        lane = lane_of(node, operation.lane)
        access = self._clocks.issue(lane, node, (event.clock for event in waited), operation.behind)
        read = self._read_arguments(node, operation, access)
        for operand in [operand for place in operation.writes for operand in nodes_in(node.args[place])]:
            for key, memory in self.held.of(operand):
                self.held.write(memory, access, self.accesses.version_at(key, END))
        if operation.gives is Gives.BROUGHT:
            (event,) = waited
            self.held.bring(node, event)
            if lane == WORKER:
                self._worker_reads.append((access, event.sources))
        elif operation.gives in (Gives.COPY, Gives.LOAN):
            self._start_copy(node, operation, access, read)
        elif operation.gives is Gives.SLOT:
            self.slots.fill(node, operation, access, read)
        elif operation.gives is Gives.NEW:
            self._make(node, lane, access)
        elif node.target == ir.CAUGHT_UP:
            if waited[0].access.lane != WORKER:
                raise fault(node, f"waits for {name_of(waited[0].node)}, which the worker does not send", "none")
            self._worker_has_read(waited[0].access)

    def _make(self, node: fx.Node, lane: int, access: Access) -> None:
        part = passed_on(node, self.accesses.written)
        if part is None:
            self.held.make(node, side_of(lane), access, ())
        else:
            self.held.pass_on(node, part)

    def _worker_has_read(self, sent: Access | None) -> None:
        """What the worker's downloads read is in use until the host knows that it was ``sent`` on; else to the end."""
        over = [reads for access, reads in self._worker_reads if sent is None or access.tick <= sent.tick]
        del self._worker_reads[: len(over)]
        for memories in over:
            self.held.use(memories, END if sent is None else None)

    def _waited_for(self, node: fx.Node, operation: Operation) -> list[fx.Node]:
        """What the operation's arguments hold in the place of events; an argument that is also read may be a value."""
        return [
            source
            for place in operation.waits
            if place < len(node.args)
            for source in nodes_in(node.args[place])
            if source in self.held.events or place >= len(operation.reads) or operation.reads[place] is None
        ]

    def _event(self, node: fx.Node, source: fx.Node, operation: Operation) -> Event:
        event = self.held.events.get(source)
        if event is None or source.target not in operation.waits_for:
            what = f"waits for {name_of(source)}, which records no event of that kind"
            raise fault(node, what, f"a start -> {node}")
        return event

    def _read_arguments(self, node: fx.Node, operation: Operation, access: Access) -> list[Memory]:
        """Copies take what is there; who reads the copy knows what should be."""
        position = {Gives.NEW: _position(node), Gives.NOTHING: END}.get(operation.gives)
        read: list[Memory] = []
        for argument, side in zip(node.args, operation.reads, strict=False):
            if side is not None:
                arrived = bool(operation.waits)
                read += self.held.read(node, nodes_in(argument), side, access, position, arrived=arrived)
        if operation.frees:
            for memory in read:
                if memory.slot is not None:
                    memory.slot.released = access
        return read

    def _start_copy(self, node: fx.Node, operation: Operation, access: Access, read: list[Memory]) -> None:
        lends = operation.gives is Gives.LOAN
        for memory in read if lends else ():
            memory.lent = node
        argument = node.args[0]
        listed = isinstance(argument, list | tuple)
        copies = [self.held.copy(operand, access, lent_by=node if lends else None) for operand in nodes_in(argument)]
        brings = copies if listed else copies[0]
        self.held.events[node] = Event(node, access, self._clocks.now(access.lane), brings, read)

    def _keep(self, node: fx.Node) -> None:
        """A value that outlives the step: all lanes are idle by then, so only its place matters."""
        for argument, side in zip(node.args, OPERATIONS[node.target].reads, strict=True):
            for operand in nodes_in(argument):
                for _, memory in self.held.of(operand):
                    if memory.side != side or memory.slot is not None:
                        raise elsewhere(node, operand, side or "host", memory.side)
                    memory.used = END


def _position(node: fx.Node) -> int | None:
    position = info(node).position
    return position if position >= 0 else None
