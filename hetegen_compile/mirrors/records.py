"""The record of every host storage that has mirrors, who relies on them, and what leaves to make room."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hetegen_compile.accelerators.base import Value
from hetegen_compile.accelerators.growing import Block
from hetegen_compile.geometry import storage_id
from hetegen_compile.mirrors.identity import Geometry, geometry_of
from hetegen_compile.mirrors.record import Held, Memory, Record
from hetegen_compile.mirrors.request import MIRRORS, WEIGHTS
from hetegen_compile.mirrors.returned import Returned, can_be_noted
from hetegen_compile.mirrors.settled import Settled
from hetegen_compile.mirrors.standing import Standing
from hetegen_compile.mirrors.upload import first_bytes

logger = logging.getLogger("hetegen_compile")

UNSEEN_WRITE = "{} was written in a way that torch does not see: uploaded again"

Found = Sequence[tuple[Record, Sequence[Held]]]
"""What answers requests: a record and what of it, each."""


class NoRoomError(Exception):
    """What a step reads does not fit beside its activations: its plan was made for a smaller forward."""

    def __init__(self, excess_bytes: int) -> None:
        super().__init__(f"{excess_bytes} bytes too many")
        self.excess_bytes = excess_bytes


class Records:
    """By storage. Not thread-safe.

    All of them together hold ``most_bytes`` or less: whoever adds to one counts it there.
    """

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._noted: dict[int, Returned] = {}
        self._standing: weakref.WeakKeyDictionary[Standing, Found] = weakref.WeakKeyDictionary()
        self._behind: frozenset[int] = frozenset()
        self.most_bytes = 0

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Keys of storages and their records, made of what is only noted, too; they may be dropped meanwhile."""
        self._make_records()
        return iter(list(self._records.items()))

    def has(self, key: int) -> bool:
        """Whether there is a record of a storage, or it is noted."""
        return key in self._records or key in self._noted

    def get(self, key: int) -> Record | None:
        """What is held of a storage: its record, made now if it was only noted."""
        if key in self._noted:
            self._make_record(key)
        return self._records.get(key)

    def current(self, tensor: Tensor, geometry: Geometry) -> Record:
        """The record of the tensor's storage, emptied if the host's copy is not what it was."""
        key = storage_id(tensor)
        if key in self._behind:
            self.up_to_date()
        record = self.get(key)
        if record is None or not record.is_of(tensor):
            record = self.renew(tensor)
        elif not record.note(tensor, geometry):
            self.changed(record)
            record.empty()
        return record

    def renew(self, tensor: Tensor) -> Record:
        """A new record of the tensor's storage, whatever was held of it."""
        self.drop(storage_id(tensor))
        record = self._records[storage_id(tensor)] = Record.of(tensor)
        record.note(tensor, geometry_of(tensor))
        return record

    def drop(self, key: int) -> None:
        """Let go of all that is held of a storage."""
        returned = self._noted.pop(key, None)
        if returned is not None:
            self.most_bytes -= returned.nbytes
        record = self._records.pop(key, None)
        if record is not None:
            self.most_bytes -= record.nbytes
            self.changed(record)

    def purge(self) -> None:
        """Forget the storages that no longer exist."""
        expired = torch.UntypedStorage._expired  # a weak reference to each keeps its key valid
        for key in [*filter(expired, self._records), *filter(expired, self._noted)]:
            self.drop(key)

    # ---- what steps return -----------------------------------------------------------------------------------

    def note_returned(self, tensor: Tensor, value: Value, step: int, block: Block | None = None) -> bool:
        """Whether it is enough to note that a step returned the tensor, which it has made, with this value."""
        if not can_be_noted(tensor):
            return False
        key = storage_id(tensor)
        self.drop(key)
        self.most_bytes += tensor.nbytes if block is None else block.nbytes  # first: an interrupt comes behind any call
        self._noted[key] = Returned(tensor, value, step, block)
        return True

    def of_step(self, key: int, step: int) -> Record | None:
        """The record of a storage that this step returned a tensor of before."""
        record = self.get(key)
        return record if record is not None and record.returned == step and not record.storage.expired() else None

    def answer(self, tensor: Tensor, step: int) -> Value | None:
        """The value of a tensor that a step returned, if it is what it was then and nobody asked otherwise since."""
        returned = self._noted.get(storage_id(tensor))
        return None if returned is None else returned.answer(tensor, step)

    def _make_record(self, key: int) -> None:
        self._records[key] = self._noted.pop(key).as_record()

    def _make_records(self) -> None:
        for key in list(self._noted):
            self._make_record(key)

    def move(self, record: Record, geometry: Geometry, held: Held, block: Block, step: int, *, whole: bool) -> None:
        """``held``, in a block, is the value of a geometry from now on."""
        self.changed(record)
        before = record.nbytes
        self.most_bytes += block.nbytes  # first: an interrupt comes behind any call
        record.move(geometry, held, block, step, whole=whole)
        self.most_bytes -= before + block.nbytes - record.nbytes

    def share(self, memory: Memory, key: int) -> bool:
        """Whether values of other storages than this one lie in some memory."""
        return any(memory in record.memories for own, record in self if own != key)

    # ---- who relies on it ------------------------------------------------------------------------------------

    def stand(self, standing: Standing, found: Found) -> None:
        """An answer that is right until something in ``found`` changes."""
        for record, _ in found:
            record.stands = True
        standing.records = frozenset(id(record) for record, _ in found)
        self._standing[standing] = found

    def changed(self, record: Record) -> None:
        """What a record holds is no longer what it held: answers that stand on it are taken back."""
        if not record.stands:
            return
        record.stands = False
        for standing in [one for one in self._standing if id(record) in one.records]:
            del self._standing[standing]
            known = standing.as_written() if isinstance(standing, Settled) and standing.behind else []
            standing.take_back()
            self._catch_up([pair for pair in known if storage_id(pair[0]) != record.storage.cdata])

    # ---- what steps write ------------------------------------------------------------------------------------

    def settle(self, tensor: Tensor) -> None:
        """A step wrote the tensor and its mirror alike: what the mirror holds is current again."""
        record = self.get(storage_id(tensor))
        if record is None:
            return
        if record.base is not None:
            record.forget_versions()  # all other views show the step's write, too
        geometry = geometry_of(tensor)
        record.note(tensor, geometry)
        self.changed(record)
        for held in record.held.values():
            held.fingerprint = None
        if geometry in record.held:
            record.held[geometry].fingerprint = first_bytes(tensor)
        record.keep_what_shows(geometry)

    def wrote_again(self, settled: Settled, tensors: Sequence[Tensor]) -> None:
        """As ``settle`` for all that an answer is of, but for what only others ask for (``up_to_date``)."""
        settled.renew(tensors)
        self._behind |= settled.keys

    def up_to_date(self) -> None:
        """Note what steps have written; the answers that know of it are taken back."""
        self._behind = frozenset()
        for settled in [one for one in self._standing if isinstance(one, Settled) and one.behind]:
            known = settled.as_written()
            settled.behind = False
            self._catch_up(known)

    def _catch_up(self, known: Sequence[tuple[Tensor, bool]]) -> None:
        """Note what a step has written, but for what somebody has written since."""
        for tensor, intact in known:
            record = self.get(storage_id(tensor))
            if intact:
                self.settle(tensor)
            elif record is not None:
                logger.warning("%s", UNSEEN_WRITE.format(next((held.name for held in record.held.values()), "")))
                self.drop(storage_id(tensor))

    def _note_uses(self) -> None:
        """Standing answers were given without touching what they stand on."""
        for standing, found in self._standing.items():
            for record, parts in found:
                record.used = max(record.used, standing.used)
                for held in parts:
                    held.used = max(held.used, standing.used)

    # ---- room ------------------------------------------------------------------------------------------------

    def make_room(self, limit_bytes: int, step: int, planned: frozenset[int]) -> None:
        """Drop what ``step`` does not use, oldest use first, until the rest fits ``limit_bytes``.

        Nothing is lost: a mirror that is needed again is uploaded again. Weights in the storages ``planned`` stay.

        Raises:
            NoRoomError: what this step uses does not fit.
        """
        self._make_records()
        self._note_uses()
        lie_in = Counter(memory for record in self._records.values() for memory in record.memories)
        excess = self._held_bytes() - limit_bytes
        for key, record in sorted(self._records.items(), key=lambda item: item[1].used):
            if excess <= 0:
                break
            own, memories = record.own_bytes, record.memories
            self._give_up(key, record, step, stays=key in planned and record.holds(WEIGHTS))
            left = self._records.get(key)
            excess -= own - (0 if left is None else left.own_bytes)
            for memory in memories - (set() if left is None else left.memories):
                lie_in[memory] -= 1  # a cache may lie where the one that it was made of does
                excess -= 0 if lie_in[memory] else memory.nbytes
        excess = self._held_bytes() - limit_bytes  # taking back an answer lets go of others' mirrors, too
        if excess > 0:
            raise NoRoomError(excess)
        self.most_bytes = sum(record.nbytes for record in self._records.values())

    def _held_bytes(self) -> int:
        """Bytes of all records, of memory that several share once."""
        memories = {memory for record in self._records.values() for memory in record.memories}
        return sum(record.own_bytes for record in self._records.values()) + sum(memory.nbytes for memory in memories)

    def _give_up(self, key: int, record: Record, step: int, *, stays: bool) -> None:
        """Drop what ``step`` does not use of one storage."""
        if record.used < step and not stays:
            self.drop(key)
        elif record.drop_unused_parts(step, MIRRORS if stays else None):
            self.changed(record)


__all__ = ["Found", "NoRoomError", "Records"]
