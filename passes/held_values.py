"""The values of a replay: the memory that each lies in, what transfers bring, and how nodes read and write it.

``memory`` has the rules of one access to one piece of memory; here a node's operands become such accesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx

from hetegen_compile.ir import INPUT_OPS, Side, info
from hetegen_compile.passes.faults import elsewhere, fault, not_waited_for
from hetegen_compile.passes.happens_before import COMPUTE, HOST, Access, name_of
from hetegen_compile.passes.memory import Accesses, Event, Held, Memory

_BEFORE_THE_STEP = 0


class HeldValues:
    """What lies where at the replay's place in issue order.

    Attributes:
        inputs: the memory of each storage that comes in; mirrors: that of the accelerator's copies.
        values: the memory of each node's result, a list of them where the result is a list.
        events: the transfers and tokens that have been started.
        memories: all memory there has been.
        scratch: places, and nodes that made more there than their results.
        place: in issue order; the members of a segment have places of their own.
    """

    def __init__(self, accesses: Accesses) -> None:
        self._accesses = accesses
        self.place = 0
        self.inputs: dict[int, Memory] = {}
        self.mirrors: dict[object, Memory] = {}
        self.values: dict[fx.Node, Held | list[Held]] = {}
        self.events: dict[fx.Node, Event] = {}
        self.memories: list[Memory] = []
        self.scratch: list[tuple[int, fx.Node]] = []

    def advance(self) -> int:
        """Go on to the next place in issue order; the members of a segment have places of their own."""
        self.place += 1
        return self.place

    def of(self, node: fx.Node) -> Iterator[tuple[int | None, Memory]]:
        """Storage and memory of everything that a node's result lies in."""
        return each(self.values.get(node))

    # ---- memory that begins ----------------------------------------------------------------------------------

    def new(self, node: fx.Node, side: Side, access: Access, **more: Any) -> Memory:
        """Memory that ``node`` is the first to hold."""
        memory = Memory(side, access, self.place, used=self.place, nodes=[node], **more)
        self.memories.append(memory)
        return memory

    def come_in(self, node: fx.Node) -> None:
        """An input of the step: inputs of one storage share it."""
        before = Access(node, HOST, _BEFORE_THE_STEP)
        for key in info(node).storages:
            if key not in self.inputs:
                self.inputs[key] = self.new(node, "host", before, is_input=True)
        self.values[node] = {key: self.inputs[key] for key in info(node).storages}

    def mirror(self, node: fx.Node) -> None:
        """A mirror has the contents that its input has before the step, whatever its place in the graph is."""
        (host,) = node.all_input_nodes
        if host.op not in INPUT_OPS:
            raise fault(node, f"mirrors {name_of(host)}, which is no input", f"a transfer of {host} -> {node}")
        before, held = Access(node, COMPUTE, _BEFORE_THE_STEP), Held()
        keys: Iterable[int | None] = info(node).storages or (None,)
        for key in keys:
            same = (node.target, *map(str, node.args)) if key is None else key
            if same not in self.mirrors:
                self.mirrors[same] = self.new(node, "accelerator", before, is_input=True)
            elif key is not None:
                self.mirrors[same].nodes.append(node)
            held[key] = self.mirrors[same]
        self.values[node] = held

    def make(self, node: fx.Node, side: Side, access: Access, operands: Iterable[fx.Node]) -> None:
        """What a node returns: memory of its operands where it is an alias, else new memory."""
        held: Held = {}
        for operand in operands:
            for key, memory in self.of(operand):
                if key in info(node).storages:
                    held.setdefault(key, memory)
        for key in info(node).storages - held.keys():
            held[key] = self.new(node, side, access)
        if not held and isinstance(info(node).value, Tensor):
            held[None] = self.new(node, side, access)
        self.values[node] = held

    def pass_on(self, node: fx.Node, part: fx.Node) -> None:
        """``node`` is ``part`` under another name: that of a value of the program."""
        (memory,) = (memory for _, memory in self.of(part))
        memory.nodes.append(node)
        keys: Iterable[int | None] = info(node).storages or (None,)
        self.values[node] = dict.fromkeys(keys, memory)

    def copy(self, operand: fx.Node, access: Access, *, lent_by: fx.Node | None) -> Held:
        """What a transfer of ``operand`` brings to the other side; one that lends may show the memory itself."""
        side: Side = "host" if lent_by is None else "accelerator"
        return {
            key: self.new(operand, side, access, version=memory.version, lent_by=lent_by)
            for key, memory in self.of(operand)
        }

    def bring(self, node: fx.Node, event: Event) -> None:
        """The wait ``node`` has what the transfer brings; what that read is used until now."""
        assert event.brings is not None, "only transfers bring something"
        self.values[node] = event.brings
        self.use(event.sources)

    def use(self, memories: Iterable[Memory], place: int | None = None) -> None:
        """Memory is in use up to here, or up to a later ``place``."""
        for memory in memories:
            memory.used = self.place if place is None else place

    # ---- accesses --------------------------------------------------------------------------------------------

    def read(
        self, user: fx.Node, operands: Iterable[fx.Node], side: Side, access: Access, position: int | None,
        *, arrived: bool = False,
    ) -> list[Memory]:  # fmt: skip
        """``user`` reads its operands on ``side``: they lie there, are complete and show the right version.

        ``arrived``: it has waited for the transfers among them itself.
        """
        read: list[Memory] = []
        for operand in operands:
            if arrived and operand in self.events:
                value = self.events[operand].brings
            else:
                self.refuse_transfer(user, operand)
                value = self.values.get(operand)
            for key, memory in each(value):
                if memory.side != side:
                    raise elsewhere(user, operand, side, memory.side)
                self._accesses.read(memory, access)
                memory.used = self.place
                if position is not None:
                    self._accesses.check_version(user, key, memory, position)
                read.append(memory)
        return read

    def write(self, memory: Memory, access: Access, version: int) -> None:
        """Memory shows the program's write at position ``version`` from here on."""
        self._accesses.write(memory, access)
        memory.version = version
        memory.used = self.place

    def refuse_transfer(self, user: fx.Node, operand: fx.Node) -> None:
        """A transfer is not a value before somebody has waited for it."""
        if operand in self.events and operand not in self.values:
            raise not_waited_for(user, operand)


def held_in(value: Held | list[Held] | None) -> Held:
    """All memory of a value, those of a list together."""
    return dict(each(value))


def each(value: Held | list[Held] | None) -> Iterator[tuple[int | None, Memory]]:
    """Storage and memory of everything in a value."""
    if isinstance(value, list):
        for one in value:
            yield from one.items()
    elif value:
        yield from value.items()
