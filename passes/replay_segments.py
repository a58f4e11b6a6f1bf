"""The members of a segment, replayed in program order: one launch touches their memory one after the other.

What goes into the launch and what it returns is there all the time of it.
"""

from __future__ import annotations

from torch import fx

from hetegen_compile.ir import info
from hetegen_compile.passes.happens_before import Access, nodes_in
from hetegen_compile.passes.held_values import HeldValues, held_in
from hetegen_compile.passes.memory import Accesses, Held, Memory


class SegmentMembers:
    """One call of a segment at one point of the compute lane."""

    def __init__(self, held: HeldValues, accesses: Accesses, call: fx.Node, access: Access) -> None:
        self._values = held
        self._accesses = accesses
        self._call = call
        self._access = access
        self._held: dict[fx.Node, Held] = {}
        self._written: set[int] = set()

    def run(self, graph: fx.Graph) -> list[Held]:
        """Replay the members; returns the memory of the segment's results."""
        operands, start = iter(nodes_in(self._call.args)), self._values.place
        for member in graph.nodes:
            if member.op == "placeholder":
                self._held[member] = held_in(self._values.values.get(next(operands)))
            elif member.op != "output":
                self._member(member)
        for operand in nodes_in(self._call.args):
            self._values.use(memory for _, memory in self._values.of(operand))
        return [self._result(node, start) for node in nodes_in(graph.output_node().args[0])]

    def _result(self, node: fx.Node, start: int) -> Held:
        for memory in self._held[node].values():
            memory.born = start if memory.inner else memory.born
            memory.inner = False
        self._values.use(self._held[node].values())
        return self._held[node]

    def _member(self, member: fx.Node) -> None:
        notes, held, place = info(member), Held(), self._values.advance()
        touched = [pair for operand in member.all_input_nodes for pair in self._held.get(operand, {}).items()]
        for key, memory in touched:
            memory.used = place
            if notes.position >= 0:
                self._accesses.check_version(self._call, key, memory, notes.position)
        for key, memory in touched:  # an operand and its view are one memory: all are read before one is written
            if key in notes.writes:
                self._write(memory, notes.position)
            if key in notes.storages:
                held.setdefault(key, memory)
        if notes.made_bytes != 0:
            self._values.scratch.append((place, member))
        for key in notes.storages - held.keys():
            held[key] = self._values.new(member, "accelerator", self._access, inner=True)
        self._held[member] = held

    def _write(self, memory: Memory, position: int) -> None:
        if id(memory) not in self._written:
            self._written.add(id(memory))
            self._accesses.write(memory, self._access)
        memory.version = position
