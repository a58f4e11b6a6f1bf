"""What the accelerator holds of one host storage."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.accelerators.base import Value
from hetegen_compile.accelerators.growing import Block
from hetegen_compile.mirrors.fingerprints import Fingerprint
from hetegen_compile.mirrors.identity import Geometry, same_version, version_of, weak_storage

_MOST_VERSIONS = 256


class Memory(Protocol):
    """One allocation of the accelerator that several values lie in."""

    @property
    def nbytes(self) -> int:
        """All of it."""


@dataclass(eq=False)
class Shared:
    """What values of one record share."""

    nbytes: int


@dataclass
class Held:
    """One device value, what it is counted under and the bytes that it holds by itself.

    ``fingerprint`` is of the host's bytes when they were uploaded, or of the first of them when a step wrote them.
    ``used`` is the step that last asked for it. ``memory`` is what it shares: with values of its record, or with those
    of other records that lie in one block.
    """

    value: Value
    category: str
    nbytes: int
    name: str = ""
    fingerprint: Fingerprint | None = None
    used: int = 0
    memory: Memory | None = None

    @property
    def apart(self) -> bool:
        """Whether it is no view of the record's base."""
        return self.nbytes > 0 or self.memory is not None


@dataclass
class Record:
    """The mirrors of one host storage: ``base`` holds all of it, ``held`` views or parts by geometry.

    ``base`` lies in memory as the host's storage does. Tensors that share a storage may have version counters of their
    own (parameters that were made parts of one flat tensor, or one of another's ``data``): ``versions`` are those that
    each tensor and each geometry was last seen with, ``version`` is the last of them and stands for those not seen yet;
    ``noted`` are the tensors themselves, or those that they are views of, as long as somebody else has them.
    ``block`` is what ``base`` lies in, if that is memory with room for a longer cache: all of it counts.
    ``used`` and ``returned`` are the last step that asked for the storage and the one that made it; ``stands`` says
    that a plan relies on it without asking.
    """

    storage: StorageWeakRef
    address: int
    version: Any = None
    versions: dict[Geometry | tuple[Geometry, int], Any] = field(default_factory=dict)
    noted: dict[tuple[Geometry, int], weakref.ref[Tensor]] = field(default_factory=dict)
    base: Value = None
    block: Block | None = None
    held: dict[Geometry, Held] = field(default_factory=dict)
    base_bytes: int = 0
    used: int = 0
    returned: int = -1
    stands: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Record:
        """Nothing is held of the tensor's storage yet."""
        return cls(weak_storage(tensor), tensor.untyped_storage().data_ptr())

    @property
    def nbytes(self) -> int:
        """Bytes of everything held, with all of the memory that it lies in."""
        return self.own_bytes + sum(memory.nbytes for memory in self.memories)

    @property
    def own_bytes(self) -> int:
        """Bytes of what shares memory with nothing."""
        return self.base_bytes + sum(one.nbytes for one in self.held.values())

    @property
    def memories(self) -> set[Memory]:
        """What may be shared, with values of this record or of others."""
        found = {one.memory for one in self.held.values()} | {self.block}
        return {memory for memory in found if memory is not None}

    def is_of(self, tensor: Tensor) -> bool:
        """Whether the storage is the tensor's and not another one in its place."""
        return not self.storage.expired() and self.address == tensor.untyped_storage().data_ptr()

    def holds(self, category: str) -> bool:
        """Whether anything is counted under the category."""
        return any(held.category == category for held in self.held.values())

    def note(self, tensor: Tensor, geometry: Geometry) -> bool:
        """From now on what is held has to show the tensor as it is now; whether it does already."""
        version = version_of(tensor)
        itself = geometry, int(tensor._cdata)
        known = self.versions.get(itself, self.versions.get(geometry, self.version))
        if len(self.versions) > _MOST_VERSIONS:  # views that are made anew for each step
            self.forget_versions()
        self.version = self.versions[geometry] = self.versions[itself] = version
        self.noted[itself] = weakref.ref(tensor if tensor._base is None else tensor._base)  # they share the counter
        return same_version(known, version)

    def forget_versions(self) -> None:
        """Nothing is known of how tensors were last seen, but for the last of them."""
        self.versions.clear()
        self.noted.clear()

    @property
    def was_written(self) -> bool:
        """Whether one of the tensors has another version now: a write that torch sees."""
        tensors = ((itself, reference()) for itself, reference in self.noted.items())
        return any(
            not same_version(self.versions.get(itself), version_of(tensor)) for itself, tensor in tensors
            if tensor is not None
        )  # fmt: skip

    def empty(self) -> None:
        """Let go of everything held; what tensors were when they were noted stays known."""
        self.hold(None, 0)
        self.held.clear()

    def hold(self, base: Value, nbytes: int, block: Block | None = None) -> None:
        """``base`` is what holds all of the storage from now on: ``nbytes``, or a block."""
        self.base, self.block = base, block
        self.base_bytes = nbytes if block is None else 0

    def move(self, geometry: Geometry, held: Held, block: Block, step: int, *, whole: bool) -> None:
        """``held``, in a block, is the value of a geometry from now on; ``whole``: it is all of the storage.

        The base stays for as long as ``step`` uses other views of it.
        """
        self.held.pop(geometry, None)
        if not any(one.used >= step and not one.apart for one in self.held.values()):
            self.held = {place: one for place, one in self.held.items() if one.apart}
            self.hold(None, 0)
        if whole and self.base is None:
            self.hold(held.value, 0, block)
            self.held[geometry] = held
        else:
            self.held[geometry] = replace(held, memory=block)

    def keep_what_shows(self, geometry: Geometry) -> None:
        """Let go of what has memory of its own, and so knows nothing of a write through the value of this geometry."""
        written = self.held.get(geometry)
        if written is not None and written.apart:
            self.hold(None, 0)
        views = self.held if self.base is not None else {}
        self.held = {place: one for place, one in views.items() if not one.apart}
        if written is not None:
            self.held[geometry] = written

    def drop_unused_parts(self, step: int, category: str | None) -> int:
        """Drop what earlier plans held (under one category or any) and ``step`` does not use; returns the bytes.

        Views of parts go with the parts; those of ``base`` hold nothing beside it.
        """
        unused = {
            geometry: held for geometry, held in self.held.items()
            if (held.apart or self.base is None) and held.used < step and category in (None, held.category)
        }  # fmt: skip
        before = self.nbytes
        self.held = {geometry: held for geometry, held in self.held.items() if geometry not in unused}
        return before - self.nbytes


__all__ = ["Held", "Memory", "Record", "Shared"]
