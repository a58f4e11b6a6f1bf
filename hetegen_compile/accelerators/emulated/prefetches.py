"""Weights on their way up: into slots of the staging ring, through the pinned ring where they are not pinned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.accelerators.emulated.clocks import COMPUTE, PIN, UP
from hetegen_compile.accelerators.emulated.engine import Engine
from hetegen_compile.accelerators.emulated.hazards import Hazards
from hetegen_compile.accelerators.emulated.ring import PoisonedRing
from hetegen_compile.accelerators.emulated.streams import Task
from hetegen_compile.accelerators.emulated.values import DeviceTensor, Occupancy, Staged, Token, Transfer
from hetegen_compile.accelerators.emulated.work import DeviceWork
from hetegen_compile.accelerators.ring import Slot, check_rows


class Prefetches:
    """Both rings, and the copies that fill slots; the rules are checked when a copy is issued."""

    def __init__(self, engine: Engine, hazards: Hazards, work: DeviceWork) -> None:
        self.ring = PoisonedRing()
        self.pinned = PoisonedRing()
        self._engine = engine
        self._hazards = hazards
        self._work = work

    def stage(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Transfer]) -> Transfer:
        """``Accelerator.stage``."""
        self._hazards.refuse_on_host(op.name, source)
        check_rows(op.name, source, slot)
        self._hazards.lend(op.name, source)
        access = self._hazards.stage(op.name, after)
        occupancy = Occupancy(op.name, slot.offset, slot.nbytes)
        self._hazards.occupy_pinned(occupancy, access)
        done = threading.Event()
        work = partial(self._work.fill_pinned, op, source, self.pinned.view(slot))
        self._engine.submit(PIN, Task(op, work, waits=_done_events(after), done=done))
        clock = self._hazards.clocks.now(PIN)
        return Transfer(op.name, "stage", access, clock, done=done, staged=Staged(slot, occupancy))

    def start(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Token]) -> Transfer:
        """``Accelerator.prefetch`` of rows of a host weight."""
        self._hazards.refuse_on_host(op.name, source)
        self._hazards.lend(op.name, source)
        return self._start(op, source, slot, after)

    def start_ahead(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Token]) -> Transfer:
        """``Accelerator.prefetch_ahead``."""
        self._hazards.refuse_on_host(op.name, source)
        return self._start(op, source, slot, after, ahead=True)

    def start_staged(self, op: Op, stage: Transfer, slot: Slot, after: Sequence[Token]) -> Transfer:
        """``Accelerator.prefetch`` of what a stage copies into the pinned ring."""
        staged = self._hazards.staged(stage, op.name)
        emptied = staged.occupancy
        started = self._start(op, self.pinned.view(staged.slot), slot, after, behind=[stage], emptied=emptied)
        emptied.released = started.access
        return started

    def _start(
        self,
        op: Op,
        rows: torch.Tensor,
        slot: Slot,
        after: Sequence[Token],
        *,
        ahead: bool = False,
        behind: Sequence[Transfer] = (),
        emptied: Occupancy | None = None,
    ) -> Transfer:
        """Copy rows into a slot after its releases and ``behind``; ``emptied`` of the pinned ring is invalid then."""
        check_rows(op.name, rows, slot)
        access = self._hazards.prefetch(op.name, after, ahead=ahead)
        occupancy = Occupancy(op.name, slot.offset, slot.nbytes)
        self._hazards.occupy(occupancy, access)
        value = DeviceTensor(access, occupancy=occupancy, arrived=False)
        work = partial(self._work.fill_slot, op, value, rows, self.ring.view(slot))
        waits, done = _done_events([*after, *behind]), threading.Event()
        if emptied is not None:
            work = partial(self._unstage, work, emptied)
        kind = "prefetch_ahead" if ahead else "prefetch"
        transfer = Transfer(op.name, kind, access, self._hazards.clocks.now(UP), value, done, carried=ahead)
        task = Task(op, work, waits=waits, done=done, on_failure=transfer.fail if ahead else None)
        self._engine.submit(UP, task, carried=ahead)
        return transfer

    def _unstage(self, copy: Callable[[], None], occupancy: Occupancy) -> None:
        """Copy from the pinned ring, whose bytes then hold nothing valid any more."""
        copy()
        self.pinned.poison([occupancy])

    def release(self, op: Op, transfer: Transfer) -> Token:
        """``Accelerator.release``."""
        occupancy = self._hazards.release(transfer, op.name)
        done = threading.Event()
        self._engine.submit(COMPUTE, Task(op, partial(self.ring.poison, [occupancy]), done=done))
        return Token(op.name, self._hazards.clocks.now(COMPUTE), done)

    def give_up(self, slots: list[Occupancy], pinned: list[Occupancy]) -> None:
        """Poison what nobody released; slots behind the copies into them that may still be under way."""
        self.pinned.poison(pinned)
        if slots:
            work = partial(self.ring.poison, slots)
            self._engine.submit(UP, Task(Op("begin_step"), work, done=threading.Event()))


def _done_events(started: Sequence[Token | Transfer]) -> tuple[threading.Event, ...]:
    """Events of what a task has to wait for."""
    return tuple(one.done for one in started if one.done is not None)
