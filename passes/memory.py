"""Memory of a schedule under the happens-before relation: who may read, write, fill and release it when.

Every piece of memory (an input, its mirror, what a node makes, what a transfer brings, a slot) is a ``Memory``.
It knows its last write and the reads since, and its *version*: the program position of the last in-place write
that its contents show, inherited when it is copied. A read at program position p must find the version of the
last write before p, so a read or a write that overtakes another is found wherever copies have gone meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from torch import fx

from hetegen_compile.errors import MissingWaitError, ScheduleError, SlotInUseError
from hetegen_compile.ir import Side
from hetegen_compile.passes.findings import Effects
from hetegen_compile.passes.happens_before import LANES, Access, Clock, Clocks, name_of

INITIAL = -1
"""Version of memory that no in-place write has changed yet."""
END = 1 << 62
"""Program position of what comes after every node."""


@dataclass(eq=False, slots=True)
class Slot:
    """Bytes of a ring that a transfer occupies until its release."""

    ring: str
    lo: int
    hi: int
    node: fx.Node
    released: Access | None = None


@dataclass(eq=False, slots=True)
class Memory:
    """One piece of memory on one side.

    ``born`` and ``used`` are places in issue order, ``nodes`` those that hold it (for its size). ``lent`` is the upload
    that reads it to the end of the step, ``lent_by`` the one of whose source it may be a view, ``inner`` says that it
    does not leave its segment.
    """

    side: Side
    written: Access
    born: int
    version: int = INITIAL
    reads: dict[int, Access] = field(default_factory=dict)
    slot: Slot | None = None
    lent: fx.Node | None = None
    lent_by: fx.Node | None = None
    is_input: bool = False
    inner: bool = False
    used: int = 0
    nodes: list[fx.Node] = field(default_factory=list)


Held = dict[int | None, Memory]
"""The memory of a value by storage (``NodeInfo.storages``); None for parts of a Linear, which the program has not."""


@dataclass(eq=False, slots=True)
class Event:
    """A transfer or token: what those who wait for it know, what it brings and what it reads until then."""

    node: fx.Node
    access: Access
    clock: Clock
    brings: Held | list[Held] | None = None
    sources: list[Memory] = field(default_factory=list)


class Accesses:
    """The rules of single accesses; each raises the first fault with the edge that is missing."""

    def __init__(self, clocks: Clocks, effects: Effects) -> None:
        self._clocks = clocks
        self._effects = effects
        self.written = effects.writes.keys()
        self.slots: list[Slot] = []

    # ---- reads and writes ----------------------------------------------------------------------------------

    def read(self, memory: Memory, access: Access) -> None:
        """A read on the access's lane: the memory is complete, and its slot not given up."""
        slot = memory.slot
        if slot is not None and slot.released is not None:
            raise SlotInUseError(
                f"verify: {name_of(access.node)} reads the slot of {name_of(slot.node)} after {slot.released.node} "
                f"gave it up; missing edge: {access.node} -> {slot.released.node}"
            )
        self._require_complete(access, memory.written, "reads")
        memory.reads[access.lane] = access

    def write(self, memory: Memory, access: Access) -> None:
        """A write: everything that touched the memory before is over, and nobody else owns it."""
        if memory.lent is not None:
            raise MissingWaitError(
                f"verify: {name_of(access.node)} writes what {name_of(memory.lent)} lent to the accelerator for the "
                f"whole step; missing edge: the end of the step -> {access.node}"
            )
        if memory.lent_by is not None:
            raise ScheduleError(
                f"verify: {name_of(access.node)} writes {name_of(memory.written.node)}, which is a view of a host "
                f"tensor; missing edge: a copy of it -> {access.node}"
            )
        self._require_complete(access, memory.written, "writes")
        self._require_read(access, memory)
        memory.reads.clear()
        memory.written = access

    def _require_complete(self, later: Access, earlier: Access, verb: str) -> None:
        if not self._clocks.covers(later, earlier):
            raise MissingWaitError(
                f"verify: {name_of(later.node)} on {LANES[later.lane]} {verb} what {name_of(earlier.node)} on "
                f"{LANES[earlier.lane]} may still be making; missing edge: a wait for {earlier.node} -> {later.node}"
            )

    def _require_read(self, writer: Access, memory: Memory) -> None:
        for reader in memory.reads.values():
            if not self._clocks.covers(writer, reader):
                raise MissingWaitError(
                    f"verify: {name_of(writer.node)} writes what {name_of(reader.node)} on {LANES[reader.lane]} is "
                    f"still copying; missing edge: a wait for {reader.node} -> {writer.node}"
                )

    # ---- slots ---------------------------------------------------------------------------------------------

    def fill(self, slot: Slot, access: Access) -> None:
        """A transfer into a slot: whatever lay in its bytes is released, and the release waited for."""
        for other in [one for one in self.slots if one.ring == slot.ring and one.lo < slot.hi and slot.lo < one.hi]:
            if other.released is None:
                raise SlotInUseError(
                    f"verify: {name_of(access.node)} overwrites the slot of {name_of(other.node)} before it is "
                    f"released; missing edge: release({other.node}) -> {access.node}"
                )
            if not self._clocks.covers(access, other.released):
                raise SlotInUseError(
                    f"verify: {name_of(access.node)} overwrites the slot of {name_of(other.node)} without waiting for "
                    f"its release; missing edge: {other.released.node} -> {access.node}"
                )
            self.slots.remove(other)
        self.slots.append(slot)

    def release(self, memory: Memory, access: Access) -> None:
        """A slot is given up: it was filled, and nobody reads it on another lane any more."""
        slot = memory.slot
        assert slot is not None, "only what lies in a ring is released"
        if slot.released is not None:
            raise SlotInUseError(
                f"verify: {name_of(access.node)} releases {name_of(slot.node)}, which {slot.released.node} released"
            )
        self._require_complete(access, memory.written, "releases")
        self._require_read(access, memory)
        slot.released = access

    # ---- versions ------------------------------------------------------------------------------------------

    def version_at(self, key: int | None, position: int) -> int:
        """The last in-place write of a storage before a program position."""
        writes = self._effects.writes.get(key, ()) if key is not None else ()
        place = bisect_left(writes, position)
        return writes[place - 1] if place else INITIAL

    def check_version(self, user: fx.Node, key: int | None, memory: Memory, position: int) -> None:
        """The memory shows every write that the program has before ``position``, and none after."""
        if key not in self._effects.writes:
            return
        expected = self.version_at(key, position)
        if memory.version == expected:
            return
        writers = self._effects.writers
        if memory.version < expected:
            what, edge = f"misses the write of {writers[expected]} before it", f"{writers[expected]} -> {user}"
        else:
            what = f"shows the write of {writers[memory.version]}, which comes after it"
            edge = f"{user} -> {memory.written.node}"
        raise ScheduleError(
            f"verify: {name_of(user)} touches {name_of(memory.nodes[0])}, which {what} in the program; "
            f"missing edge: {edge}"
        )
