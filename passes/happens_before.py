"""The happens-before relation of a schedule: what each operation orders, as one table.

Lanes are the host thread, its worker and the streams of an accelerator (``accelerators/base.py`` is the contract).
Nodes are issued by the host thread in graph order; what is marked ``ahead`` runs on the worker (``lane_of``). What a
lane has been told to wait for is a vector clock, one component per lane (Fidge 1988, Mattern 1989): an access happens
before an operation if the operation's clock covers it, and two accesses of which neither covers the other are a race
however the lanes run. One pass over the nodes with clocks of fixed length: linear in the schedule.

A new operation is one line of ``OPERATIONS``; nothing else in the verifier names an operation. It says

    lane        where it runs (None: no work of its own at this place of the schedule)
    reads       per positional argument the side on which its tensors are read (None: not read)
    waits       arguments that may hold what its lane waits for: transfers or lists of tokens
    waits_for   the operations that such an event may come from: anything else was never recorded
    behind      a lane whose work issued so far it follows as well
    writes      arguments that it writes, whole, with what the program leaves in them
    gives       what its result is, see ``Gives``
    ring        the ring of slots in which its result lies (``Gives.SLOT``); its arguments are then (source, ranges,
                dim, offset, tokens), and slots begin at multiples of ``alignment``
    frees       a slot that it reads is given up by that (else by a release)
    ended_by    operations that must follow exactly once each, and the only ones that may touch its result
    precedes    operations that may wait for it besides
    at_end      it reads when the step is over and all lanes are idle (twins)
    carried     a fill over the end of a step: "out" starts what nobody in this step waits for; "in" is that transfer
                in the next step (of the same graph, so its bytes are those of an "out"), before any other fill

So: a prefetch along the columns needs no row, its bytes follow from ``dim``; a copy into a pinned slot by a
thread of its own is a row with ``lane=STAGE``, ``ring="pinned"``, ended by the prefetch that reads and ``frees`` it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal, NamedTuple

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import Side, info

HOST, COMPUTE, UP, DOWN, STAGE, WORKER = range(6)
LANES = ("host", "compute", "up", "down", "stage", "worker")

Clock = tuple[int, ...]


class Access(NamedTuple):
    """One operation of one lane; tick 0 is before the step."""

    node: fx.Node
    lane: int
    tick: int


class Clocks:
    """What each lane knows to have happened."""

    def __init__(self) -> None:
        self._clocks: list[Clock] = [(0,) * len(LANES)] * len(LANES)

    def issue(self, lane: int, node: fx.Node, waits: Iterable[Clock] = (), behind: int | None = None) -> Access:
        """Enter an operation: after its lane's earlier ones, what the host has seen complete, and ``waits``."""
        own = self._clocks[lane]
        known = [self._clocks[HOST], *waits]
        if behind is not None:
            known.append(self._clocks[behind])
        for clock in known:
            if clock is not own:
                own = tuple(map(max, own, clock))
        tick = own[lane] + 1
        self._clocks[lane] = (*own[:lane], tick, *own[lane + 1 :])
        return Access(node, lane, tick)

    def now(self, lane: int) -> Clock:
        """The clock of what was last issued to ``lane``: the event that it records."""
        return self._clocks[lane]

    def covers(self, later: Access, earlier: Access) -> bool:
        """Whether ``later``, the operation that its lane was issued last, happens after ``earlier``."""
        return self._clocks[later.lane][earlier.lane] >= earlier.tick


class Gives(Enum):
    """What the result of an operation is."""

    NOTHING = auto()
    TOKEN = auto()
    """An event and no value (``release``)."""
    COPY = auto()
    """A transfer: an event, and new memory with the contents of what was read, for those who wait."""
    LOAN = auto()
    """A transfer like ``COPY``, of which the source is in use to the end of the step."""
    SLOT = auto()
    """A transfer into bytes of a ring."""
    BROUGHT = auto()
    """What the transfer that it waited for brought."""
    NEW = auto()
    """New memory; its storages are those of the node's notes."""
    INPUT = auto()
    """The accelerator's copy of an input, complete before the step begins."""


@dataclass(frozen=True)
class Operation:
    """What one of the schedule's own operations reads, writes and orders; see the module's docstring."""

    lane: int | None
    reads: tuple[Side | None, ...] = ()
    waits: tuple[int, ...] = ()
    waits_for: tuple[Any, ...] = ()
    behind: int | None = None
    gives: Gives = Gives.NEW
    ring: str = ""
    alignment: int = 256
    frees: bool = False
    writes: tuple[int, ...] = ()
    ended_by: tuple[Any, ...] = ()
    precedes: tuple[Any, ...] = ()
    at_end: bool = False
    carried: Literal["in", "out"] | None = None


_ON: Side = "accelerator"

OPERATIONS: dict[Any, Operation] = {
    ir.MIRROR: Operation(None, ("host",), gives=Gives.INPUT),
    ir.RESIDENT: Operation(None, ("host",), gives=Gives.INPUT),
    ir.STAGE: Operation(
        STAGE, ("host",), waits=(4,), waits_for=(ir.PREFETCH,), gives=Gives.SLOT, ring="pinned", ended_by=(ir.PREFETCH,)
    ),
    ir.PREFETCH: Operation(
        UP, ("host",), waits=(0, 4), waits_for=(ir.RELEASE, ir.STAGE), gives=Gives.SLOT, ring="staging", frees=True,
        ended_by=(ir.WAIT, ir.RELEASE), precedes=(ir.STAGE,),
    ),
    ir.CARRIED: Operation(
        UP, ("host",), gives=Gives.SLOT, ring="staging", ended_by=(ir.WAIT, ir.RELEASE), carried="in"
    ),
    ir.PREFETCH_AHEAD: Operation(
        UP, ("host",), waits=(4,), waits_for=(ir.RELEASE,), gives=Gives.SLOT, ring="staging", carried="out"
    ),
    ir.WAIT: Operation(COMPUTE, waits=(0,), waits_for=(ir.PREFETCH, ir.CARRIED), gives=Gives.BROUGHT),
    ir.RELEASE: Operation(COMPUTE, waits_for=(ir.PREFETCH, ir.CARRIED), gives=Gives.TOKEN),
    ir.TO_ACCELERATOR: Operation(
        UP, ("host",), gives=Gives.LOAN, ended_by=(ir.WAIT_ACCELERATOR,), precedes=(ir.CAUGHT_UP,)
    ),
    ir.WAIT_ACCELERATOR: Operation(COMPUTE, waits=(0,), waits_for=(ir.TO_ACCELERATOR,), gives=Gives.BROUGHT),
    ir.CAUGHT_UP: Operation(HOST, waits=(0,), waits_for=(ir.TO_ACCELERATOR,), gives=Gives.NOTHING),
    ir.TO_HOST: Operation(DOWN, (_ON,), behind=COMPUTE, gives=Gives.COPY, ended_by=(ir.WAIT_HOST,)),
    ir.WAIT_HOST: Operation(HOST, waits=(0,), waits_for=(ir.TO_HOST,), gives=Gives.BROUGHT),
    ir.HOST_LINEAR: Operation(HOST, ("host", "host", "host")),
    ir.PARTIAL_LINEAR: Operation(COMPUTE, (_ON, _ON, _ON)),
    ir.HOST_GROUPED: Operation(HOST, ("host", "host", "host")),
    ir.PARTIAL_GROUPED: Operation(COMPUTE, (_ON, _ON, "host", _ON)),
    ir.JOIN: Operation(COMPUTE, (_ON,)),
    ir.PAD: Operation(COMPUTE, (_ON, _ON)),
    ir.WRITE_BACK: Operation(HOST, (None, "host"), gives=Gives.NOTHING, writes=(0,)),
    ir.TWIN: Operation(None, ("host", _ON), gives=Gives.NOTHING, at_end=True),
}  # fmt: skip
"""Every operation of the schedule. Nodes that are not here run on the host thread, or are segments on compute."""


def lane_of(node: fx.Node, lane: int) -> int:
    """Where a node runs whose operation runs on ``lane``: the worker has taken over what is marked so."""
    return WORKER if info(node).ahead else lane


def side_of(lane: int) -> Side:
    """Where the memory lies that a lane makes."""
    return "accelerator" if lane == COMPUTE else "host"


def nodes_in(argument: Any) -> list[fx.Node]:
    """The nodes in an argument, in order."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def name_of(node: fx.Node) -> str:
    """How errors name a node: its name and the module that it comes from."""
    return f"{node.name} ({info(node).module})" if info(node).module else str(node.name)


def short(target: object) -> str:
    """The name of an operation without its library and overload."""
    parts = str(getattr(target, "_qualified_op_name", getattr(target, "__name__", target))).split("::")
    return parts[-1].split(".")[0]


def slot_bytes(prefetch: fx.Node) -> int:
    """Bytes that a prefetch of (weight, ranges, dim, ...) copies."""
    arguments: tuple[Any, ...] = prefetch.args
    weight, ranges, dim = arguments[:3]
    value = info(weight).value
    if dim == ir.RECTANGLE:
        first, end, left, right = ranges
        return int((end - first) * (right - left) * value.element_size())
    length = sum(hi - lo for lo, hi in zip(ranges[::2], ranges[1::2], strict=True))
    return int(length * value.numel() // value.shape[dim] * value.element_size())


__all__ = [
    "COMPUTE", "DOWN", "HOST", "LANES", "OPERATIONS", "STAGE", "UP", "WORKER", "Access", "Clocks", "Gives", "Operation",
    "lane_of", "name_of", "nodes_in", "short", "side_of", "slot_bytes",
]  # fmt: skip
