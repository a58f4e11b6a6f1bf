"""The rules of a schedule, checked when an operation is issued: which accesses must be ordered before it.

The clocks say what is ordered; a use or a write whose predecessor they do not cover is an error that names
both nodes, whether or not the threads happened to run in the right order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hetegen_compile.accelerators.emulated.clocks import COMPUTE, DOWN, HOST, PIN, RESOURCES, UP, Access, Clocks, covers
from hetegen_compile.accelerators.emulated.occupied import Occupied
from hetegen_compile.accelerators.emulated.values import (
    DeviceTensor,
    HostPromise,
    Occupancy,
    Staged,
    Token,
    Transfer,
    deferred_in,
)
from hetegen_compile.errors import MissingWaitError, ScheduleError, SlotInUseError


class Hazards:
    """Issue-time checks of one accelerator; called by the host thread only."""

    def __init__(self) -> None:
        self.clocks = Clocks()
        self._slots = Occupied()
        self._pinned = Occupied()
        self._uploaded = self.clocks.now(UP)
        self._lent: list[tuple[str, torch.Tensor, int]] = []

    def step_is_over(self) -> None:
        """Everything but the prefetches for the next step is over."""
        self.clocks.join(self._uploaded)

    def restart(self, node: str, carried: Sequence[Occupancy] = ()) -> tuple[list[Occupancy], list[Occupancy]]:
        """Nothing uses the rings but what is ``carried``: free the rest; returns what was not released in each."""
        self._lent.clear()
        by = Access(node, HOST, 0)
        return self._slots.vacate(by, carried), self._pinned.vacate(by)

    # ---- host tensors that the streams read --------------------------------------------------------------
    def lend(self, node: str, tensor: torch.Tensor) -> None:
        """A transfer reads a host tensor, which nothing may write before the step's end."""
        if not tensor.is_inference():  # torch counts no writes of those
            self._lent.append((node, tensor, tensor._version))

    def check_lent(self) -> None:
        """At the step's end: MissingWaitError if a host tensor was written while a stream could read it."""
        lent, self._lent = self._lent, []
        for node, tensor, version in lent:
            if tensor._version != version:
                raise MissingWaitError(f"what {node} sends up was written on the host before the end of the step")

    # ---- uses ----------------------------------------------------------------------------------------
    def use(self, value: DeviceTensor, user: Access) -> None:
        """``user`` reads ``value`` on its lane: it must have been waited for and not been released."""
        occupancy = value.occupancy
        if occupancy is not None and occupancy.released is not None:
            raise SlotInUseError(f"{user.node} uses {value.node} after {occupancy.released.node} released its slot")
        if not value.arrived:
            raise MissingWaitError(f"{user.node} uses {value.node} without waiting for it")
        self._require(value.writer, user, "uses")

    def use_arguments(self, arguments: Iterable[object], user: Access) -> None:
        """Every argument of a launch must be a usable device value, a number or None."""
        for argument in arguments:
            if type(argument) is DeviceTensor:
                self.use(argument, user)
            elif isinstance(argument, torch.Tensor):
                raise ScheduleError(f"{user.node} runs on the accelerator but gets a host tensor")
            elif isinstance(argument, list | tuple):
                self.use_arguments(argument, user)
            elif isinstance(argument, Transfer | Token | HostPromise):
                argument.refuse(user.node)

    def require_tensors(self, node: str, arguments: Sequence[object], positions: Iterable[int]) -> None:
        """Where the schedule has a tensor a launch must get one: without its bias a Linear runs, and is wrong."""
        for position in positions:
            if arguments[position] is None:
                raise ScheduleError(f"{node} gets None for argument {position}, which is a tensor in the schedule")

    def refuse_on_host(self, node: str, arguments: object) -> None:
        """No argument of a host operation may be a device value."""
        for value in deferred_in(arguments):
            value.refuse(node)

    # ---- writes --------------------------------------------------------------------------------------
    def write(self, value: DeviceTensor, writer: Access) -> None:
        """``writer`` overwrites ``value``: downloads of it must have been waited for."""
        if value.borrowed:
            raise ScheduleError(f"{writer.node} writes {value.node}, which is a view of a host tensor")
        self.use(value, writer)
        self._require_all(value.readers, writer)
        value.readers.clear()
        value.writer = writer

    def mutate(self, argument: object, writer: Access) -> None:
        """``writer`` overwrites the device values of one argument."""
        for value in deferred_in(argument):
            if isinstance(value, DeviceTensor):
                self.write(value, writer)

    # ---- slots ---------------------------------------------------------------------------------------
    def occupy(self, occupancy: Occupancy, writer: Access) -> None:
        """A prefetch overwrites ring bytes: what was there must be released, and the release waited for."""
        self._slots.occupy(occupancy, writer, self.clocks.now(writer.lane))

    def release(self, transfer: object, node: str) -> Occupancy:
        """Compute gives a prefetched slot back; its transfer and its downloads must have been waited for."""
        value = transfer.value if isinstance(transfer, Transfer) else None
        occupancy = None if value is None else value.occupancy
        if not isinstance(transfer, Transfer) or value is None or occupancy is None:
            raise ScheduleError(f"{node} releases {_name(transfer)}, which is no prefetch")
        if occupancy.released is not None:
            raise SlotInUseError(f"{node} releases {transfer.node}, which {occupancy.released.node} released already")
        access = self.clocks.issue(COMPUTE, node)
        self._require(transfer.access, access, "releases")
        self._require_all(value.readers, access)
        occupancy.released = access
        return occupancy

    # ---- the pinned ring -----------------------------------------------------------------------------
    def stage(self, node: str, after: Iterable[object]) -> Access:
        """Enter a copy into the pinned ring on the pin thread, behind the prefetches in ``after``."""
        for transfer in after:
            self.clocks.merge(PIN, self.started(transfer, node, ("prefetch",)).clock)
        return self.clocks.issue(PIN, node)

    def occupy_pinned(self, occupancy: Occupancy, writer: Access) -> None:
        """A stage overwrites bytes of the pinned ring: the prefetch that read them must have been waited for."""
        self._pinned.occupy(occupancy, writer, self.clocks.now(writer.lane))

    def staged(self, stage: Transfer, node: str) -> Staged:
        """What the up stream may read once ``stage`` is done."""
        started = self.started(stage, node, ("stage",))
        assert started.staged is not None, "a stage fills a slot of the pinned ring"
        reader = started.staged.occupancy.released
        if reader is not None:
            raise SlotInUseError(f"{node} reads the pinned slot of {stage.node}, which {reader.node} gave up already")
        self.clocks.merge(UP, started.clock)
        return started.staged

    # ---- prefetches for the next step ----------------------------------------------------------------
    def held(self, transfer: object) -> bool:
        """Whether a prefetch for the next step was neither taken over nor given up yet."""
        if not isinstance(transfer, Transfer) or transfer.kind != "prefetch_ahead":
            return False
        occupancy = None if transfer.value is None else transfer.value.occupancy
        return occupancy is not None and occupancy.released is None

    def take_over(self, transfer: object) -> Occupancy:
        """Make a prefetch for the next step one of the step that begins."""
        if not isinstance(transfer, Transfer) or not self.held(transfer):
            raise ScheduleError(f"begin_step takes over {_name(transfer)}, which is not held for it")
        transfer.kind = "prefetch"
        assert transfer.value is not None, "held transfers have a slot"
        assert transfer.value.occupancy is not None, "held transfers have a slot"
        return transfer.value.occupancy

    # ---- transfers -----------------------------------------------------------------------------------
    def started(self, transfer: object, user: str, kinds: tuple[str, ...]) -> Transfer:
        """``transfer`` as one of the given kinds, or the error of waiting for something else."""
        if not isinstance(transfer, Transfer):
            raise ScheduleError(f"{user} waits for {_name(transfer)}, which was never started")
        if transfer.kind not in kinds:
            raise ScheduleError(f"{user} waits for {transfer.node}, which is a {transfer.kind}")
        return transfer

    def waited(self, transfer: object, user: str) -> tuple[Transfer, Sequence[DeviceTensor]]:
        """``transfer`` and what it brings, or the error of waiting for something that does not go up."""
        started = self.started(transfer, user, ("prefetch", "to_accelerator"))
        values = started.values if started.value is None else (started.value,)
        for value in values:
            value.arrived = True
        return started, values

    def upload(self, node: str) -> Access:
        """Enter an upload on the up stream; whoever knows of it knows of all before it."""
        access = self.clocks.issue(UP, node)
        self._uploaded = self.clocks.now(UP)
        return access

    def prefetch(self, node: str, after: Iterable[object], *, ahead: bool) -> Access:
        """Enter a prefetch on the up stream, behind the releases in ``after``."""
        for token in after:
            if not isinstance(token, Token):
                raise ScheduleError(f"{node} waits for {_name(token)}, which is no release")
            self.clocks.merge(UP, token.clock)
        return self.clocks.issue(UP, node) if ahead else self.upload(node)

    def download(self, node: str, values: Sequence[object]) -> Access:
        """Enter a download behind what compute has issued so far; it reads ``values`` until waited for."""
        compute = self.clocks.now(COMPUTE)
        self.clocks.merge(DOWN, compute)
        access = self.clocks.issue(DOWN, node)
        for value in values:
            if isinstance(value, Transfer | Token):
                value.refuse(node)
            if not isinstance(value, DeviceTensor):
                raise ScheduleError(f"{node} downloads {_name(value)}, which is not on the accelerator")
            self.use(value, access)
            value.readers[:] = [reader for reader in value.readers if not covers(compute, reader)] + [access]
        return access

    # ---- order ---------------------------------------------------------------------------------------
    def _require(self, earlier: Access, later: Access, verb: str) -> None:
        if not covers(self.clocks.now(later.lane), earlier):
            raise MissingWaitError(
                f"{later.node} ({RESOURCES[later.lane]}) {verb} {earlier.node} ({RESOURCES[earlier.lane]}) "
                f"without waiting for it"
            )

    def _require_all(self, readers: list[Access], writer: Access) -> None:
        for reader in readers:
            if not covers(self.clocks.now(writer.lane), reader):
                raise MissingWaitError(
                    f"{writer.node} overwrites what {reader.node} is still copying to the host; "
                    f"wait for {reader.node} first"
                )


def _name(thing: object) -> str:
    return str(getattr(thing, "node", type(thing).__name__))
