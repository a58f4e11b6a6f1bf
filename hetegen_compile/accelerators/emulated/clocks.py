"""Vector clocks over the host thread, the three streams of an accelerator, the pin thread and the worker.

One component per lane counts the operations issued to it. What a lane's clock covers has happened before the
lane's next operation; two accesses of which neither covers the other are a race, however the threads run
(Fidge 1988, Mattern 1989).
"""

from __future__ import annotations

from typing import NamedTuple

HOST, COMPUTE, UP, DOWN, PIN, WORKER = range(6)
RESOURCES = ("host", "accelerator", "up", "down", "pin", "worker")
"""The lanes' names in traces, in the order of the constants above."""

Clock = tuple[int, ...]


class Access(NamedTuple):
    """One operation of one lane: the node's name, the lane and its tick there."""

    node: str
    lane: int
    tick: int


def covers(clock: Clock, access: Access) -> bool:
    """Whether everything that knows ``clock`` runs after ``access``."""
    return clock[access.lane] >= access.tick


class Clocks:
    """The lanes' clocks; operations are entered in issue order, by the host thread."""

    def __init__(self) -> None:
        self._clocks: list[Clock] = [(0,) * len(RESOURCES)] * len(RESOURCES)

    def now(self, lane: int) -> Clock:
        """The clock of what was last issued to ``lane``."""
        return self._clocks[lane]

    def merge(self, lane: int, clock: Clock) -> None:
        """Order later operations of ``lane`` after everything that ``clock`` covers."""
        self._clocks[lane] = tuple(map(max, self._clocks[lane], clock))

    def issue(self, lane: int, node: str) -> Access:
        """Enter an operation: it follows its lane's earlier ones and what the host thread waited for."""
        self.merge(lane, self._clocks[HOST])
        clock = self._clocks[lane]
        tick = clock[lane] + 1
        self._clocks[lane] = (*clock[:lane], tick, *clock[lane + 1 :])
        return Access(node, lane, tick)

    def join(self, up: Clock | None = None) -> None:
        """Everything issued so far happened before everything to come (all streams were found idle).

        ``up`` is what is known to be over of the up stream, by default all of it. What it does not cover has to be
        waited for by the other lanes still.
        """
        issued = self._clocks[UP]
        others = [clock for lane, clock in enumerate(self._clocks) if lane != UP]
        joined = tuple(map(max, *others, issued if up is None else up))
        self._clocks = [joined] * len(RESOURCES)
        self.merge(UP, issued)
