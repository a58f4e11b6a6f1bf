"""The slots of a schedule's rings, replayed: prefetches that fill them, releases, and what goes from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from hetegen_compile.ir import Side
from hetegen_compile.passes.faults import fault
from hetegen_compile.passes.happens_before import Access, Clocks, Operation, slot_bytes
from hetegen_compile.passes.held_values import HeldValues, held_in
from hetegen_compile.passes.memory import END, INITIAL, Accesses, Event, Held, Memory, Slot


class Slots:
    """Fills and releases in issue order; ``carried`` has the prefetches that come in and go out, by their bytes."""

    def __init__(self, held: HeldValues, accesses: Accesses, clocks: Clocks, rings: Mapping[str, int]) -> None:
        self._held = held
        self._accesses = accesses
        self._clocks = clocks
        self._rings = rings
        self._filled: list[fx.Node] = []
        self.carried: dict[str, dict[tuple[Any, ...], fx.Node]] = {"in": {}, "out": {}}

    def fill(self, node: fx.Node, operation: Operation, access: Access, read: list[Memory]) -> None:
        """``node`` starts filling a slot with rows of what it ``read``."""
        if operation.carried == "in" and self._filled:
            raise fault(node, "comes from the step before, but a slot is filled first", f"{node} -> {self._filled[0]}")
        if operation.carried != "in":
            self._filled.append(node)
        slot = self._slot(node, operation)
        self._accesses.fill(slot, access)
        side: Side = "accelerator" if operation.ring == "staging" else "host"
        version = max((memory.version for memory in read), default=INITIAL)
        brings: Held = {None: self._held.new(node, side, access, version=version, slot=slot)}
        self._held.events[node] = Event(node, access, self._clocks.now(access.lane), brings, read)
        if operation.carried is not None:
            self.carried[operation.carried][_bytes_of(node)] = node

    def release(self, node: fx.Node, access: Access, event: Event) -> None:
        """``node`` gives the slot of a transfer back; what fills it next waits for that."""
        for memory in held_in(event.brings).values():
            self._accesses.release(memory, access)
        self._held.events[node] = Event(node, access, self._clocks.now(access.lane))

    def _slot(self, node: fx.Node, operation: Operation) -> Slot:
        lo: int = node.args[3]  # type: ignore[assignment]
        slot = Slot(operation.ring, lo, lo + slot_bytes(node), node)
        length = self._rings.get(operation.ring, END)  # a ring that no plan states: its slots are checked when made
        if lo < 0 or lo % operation.alignment or slot.hi > length:
            what = f"fills bytes {lo} to {slot.hi} of a {operation.ring} ring of {length} (slots begin at multiples of "
            raise fault(node, f"{what}{operation.alignment})", f"an aligned slot inside the ring -> {node}")
        return slot


def _bytes_of(start: fx.Node) -> tuple[Any, ...]:
    weight, ranges, dim, offset = start.args[:4]
    return weight, tuple(ranges), dim, offset  # type: ignore[arg-type]
