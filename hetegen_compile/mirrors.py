"""Device mirrors of host tensors: uploaded once, and again only when the host's copy has changed.

Whatever the host owns and the accelerator reads (parameters, buffers, caches, inputs of a step) has a
mirror per storage. A mirror is current while storage, address and version counter are what they were.
Tensors made in inference mode have no version: they are compared by content up to 4 KiB and uploaded
afresh above. A mirror dies with its host storage.

Writes that no version shows (``p.data += d``, numpy) are found by fingerprints of the host's bytes: samples of up to
128 tensors that a step uses are compared each step, every eighth a block of one tensor, everything at each compilation
and once one change was found. Caches, which steps write themselves, have no fingerprint.
"""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.accelerators.base import Accelerator, Op, Value
from hetegen_compile.fingerprints import Fingerprint
from hetegen_compile.geometry import is_dense, mirrored_bytes
from hetegen_compile.passes.claims import WeightKey
from hetegen_compile.standing import Samples, Standing

logger = logging.getLogger("hetegen_compile")

MIRRORS = "mirrors"
"""The category of everything but resident weights."""
WEIGHTS = "weights"
"""The category under which resident weights are counted."""
COMPARED_BYTES = 4096
ALWAYS_WATCHED_BYTES = 1 << 16


class Geometry(NamedTuple):
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int



class Request(NamedTuple):
    """A host tensor whose device value is wanted.

    ``category`` is what its bytes count under. ``whole`` asks for a view of the mirrored storage, because another
    input of the graph lies in the same storage. ``watched`` asks that writes which no version shows are found: the
    tensor belongs to the model. Small tensors are always watched. ``base`` is what is uploaded instead, if ``tensor``
    is the last rows of that.
    """

    tensor: Tensor
    name: str
    category: str = MIRRORS
    whole: bool = False
    base: Tensor | None = None
    watched: bool = False


@dataclass
class _Held:
    """One device value, what it is counted under and the bytes that it holds by itself.

    ``fingerprint`` is of the host's bytes when they were uploaded; None for what steps write. ``used`` is the step
    that last asked for it.
    """

    value: Value
    category: str
    nbytes: int
    name: str = ""
    fingerprint: Fingerprint | None = None
    used: int = 0


@dataclass
class _Record:
    """The mirrors of one host storage: ``base`` holds all of it, ``held`` views or parts by geometry.

    ``base`` lies in memory as the host's storage does. Tensors that share a storage may have version counters of their
    own (parameters that were made parts of one flat tensor): ``versions`` are those that each geometry was last seen
    with, ``version`` is the last of them and stands for those not seen yet. ``used`` and ``returned`` are the last step
    that asked for the storage and the one that made it; ``stands`` says that a plan relies on it without asking.
    """

    storage: StorageWeakRef
    address: int
    version: Any
    versions: dict[Geometry, Any] = field(default_factory=dict)
    base: Value = None
    held: dict[Geometry, _Held] = field(default_factory=dict)
    base_bytes: int = 0
    used: int = 0
    returned: int = -1
    stands: bool = False

    def holds(self, category: str) -> bool:
        return any(held.category == category for held in self.held.values())

    def nbytes(self) -> int:
        return self.base_bytes + sum(held.nbytes for held in self.held.values())

    def note(self, tensor: Tensor) -> None:
        """What is held shows the tensor as it is now."""
        self.version = self.versions[_geometry(tensor)] = _version(tensor)

    def shows(self, tensor: Tensor) -> bool:
        """Whether the tensor is what it was when it was last noted."""
        return _same_version(self.versions.get(_geometry(tensor), self.version), _version(tensor))

    def empty(self) -> None:
        """Let go of everything held; what tensors were when they were noted stays known."""
        self.base, self.base_bytes = None, 0
        self.held.clear()


class NoRoomError(Exception):
    """What a step reads does not fit beside its activations: its plan was made for a smaller forward."""

    def __init__(self, excess_bytes: int) -> None:
        super().__init__(f"{excess_bytes} bytes too many")
        self.excess_bytes = excess_bytes


class Mirrors:
    """All mirrors on one accelerator. Not thread-safe: used under the accelerator's step lock."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._records: dict[int, _Record] = {}
        self._step = 0
        self._random = random.Random(0)
        self._standing: weakref.WeakKeyDictionary[Standing, list[tuple[_Record, list[_Held]]]] = (
            weakref.WeakKeyDictionary()
        )
        self.keep: frozenset[int] = frozenset()
        """Storages with weights that are resident by plan: only ``forget_weights`` drops those."""
        self._most_bytes = 0  # all mirrors together are not more

    def begin_step(self) -> None:
        """Forget the mirrors of storages that no longer exist; what is fetched from now on is in use."""
        self._step += 1
        self.purge()

    def fetch(self, requests: Sequence[Request], limit_bytes: int) -> list[Value]:
        """Device values with the contents and geometry of host tensors; uploads only what is not current.

        A view under the category ``mirrors`` may be a device view of the mirrored storage, so that views alias
        each other as on the host; under any other category exactly the tensor's own bytes are uploaded. Before
        an upload, mirrors that this step does not use are dropped until all fit ``limit_bytes``.
        """
        found = [self._lookup(request) for request in requests]
        if not Samples(_watched(found), self._random.getrandbits(32)).match():  # made anew: look anywhere
            self.check()
            found = [self._lookup(request) for request in requests]
        missing = [i for i, (record, geometry) in enumerate(found) if geometry not in record.held]
        new_bytes = _new_bytes([(found[i][0], requests[i]) for i in missing]) if missing else 0
        if self._most_bytes + new_bytes > limit_bytes:
            self._most_bytes = self._make_room(limit_bytes - new_bytes)
        self._most_bytes += new_bytes
        for i in missing:
            record, geometry = found[i]
            if geometry not in record.held:  # the same tensor may be asked for twice
                record.held[geometry] = self._make(record, requests[i])
        return [record.held[geometry].value for record, geometry in found]

    def stand(self, tensors: Sequence[Tensor], requests: Sequence[Request]) -> Standing | None:
        """Keep what was just fetched for ``requests``, which are made of ``tensors``, as a standing answer.

        None for tensors that were made in inference mode: nothing tells whether they have changed.
        """
        if any(tensor.is_inference() for tensor in tensors):
            return None
        found = [self._lookup(request) for request in requests]
        for record, _ in found:
            record.stands = True
        values = [record.held[geometry].value for record, geometry in found]
        standing = Standing(tensors, values, Samples(_watched(found)))
        self._standing[standing] = [
            (record, _parts(record, geometry, request))
            for (record, geometry), request in zip(found, requests, strict=True)
        ]
        return standing

    def stands(self, standing: Standing, tensors: Sequence[Tensor]) -> bool:
        """Whether a standing answer is right for these tensors in this step; if so it counts as used."""
        if not standing.holds_for(tensors):
            return False
        if not standing.samples.match():
            self.check()
            return False
        standing.used = self._step
        return True

    def check(self) -> None:
        """Compare all fingerprints with the host's bytes; what was changed unseen is uploaded at its next use."""
        for key, record in list(self._records.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(record.storage.cdata)
            if storage is None or storage.data_ptr() != record.address:
                self._drop(key)
                continue
            changed = [h for h in record.held.values() if h.fingerprint and not h.fingerprint.matches(storage)]
            if changed:
                logger.warning("%s was written in a way that torch does not see: uploaded again", changed[0].name)
                self._drop(key)

    def _drop(self, key: int) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            self._changed(record)

    def _changed(self, record: _Record) -> None:
        """What a record holds is no longer what it held: answers that stand on it are taken back, all together."""
        if record.stands:
            for standing in self._standing:
                standing.take_back()
            self._standing.clear()

    def _lookup(self, request: Request) -> tuple[_Record, Geometry]:
        tensor = request.tensor
        record = self._current(tensor)
        record.used = self._step
        if request.whole and record.base is None and record.held:
            record.held.clear()  # values that do not share memory
            self._changed(record)
        geometry = _geometry(tensor)
        for held in _parts(record, geometry, request):
            held.used = self._step
        return record, geometry

    def _make_room(self, limit_bytes: int) -> int:
        """Drop what this step does not use, oldest use first, until the rest fits ``limit_bytes``; its bytes.

        Nothing is lost: a mirror that is needed again is uploaded again. Weights that are resident by plan stay.

        Raises:
            NoRoomError: what this step uses does not fit.
        """
        self._note_uses()
        excess = sum(record.nbytes() for record in self._records.values()) - limit_bytes
        for key, record in sorted(self._records.items(), key=lambda item: item[1].used):
            if excess <= 0:
                break
            planned = key in self.keep and record.holds(WEIGHTS)
            if record.used < self._step and not planned:
                excess -= record.nbytes()
                self._drop(key)
            else:
                excess -= self._drop_unused_parts(record, MIRRORS if planned else None)
        if excess > 0:
            raise NoRoomError(excess)
        return limit_bytes + excess

    def _note_uses(self) -> None:
        """Standing answers were given without touching what they stand on."""
        for standing, found in self._standing.items():
            for record, parts in found:
                record.used = max(record.used, standing.used)
                for held in parts:
                    held.used = max(held.used, standing.used)

    def _drop_unused_parts(self, record: _Record, category: str | None) -> int:
        """Drop what earlier plans held (under one category or any) of a storage that stays; returns the bytes."""
        unused = {
            g: held for g, held in record.held.items()
            if held.nbytes and held.used < self._step and category in (None, held.category)
        }  # fmt: skip
        if unused:
            self._changed(record)
        record.held = {g: held for g, held in record.held.items() if g not in unused}
        return sum(held.nbytes for held in unused.values())

    def register(self, tensor: Tensor, value: Value, category: str = MIRRORS) -> None:
        """Make ``value`` the mirror of a host tensor that a step just returned with the same contents.

        Later views of a tensor that is all of its storage (a cache that was cropped) are views of ``value``. A
        tensor that is a part (a sliding window of what was concatenated) is mirrored by itself.
        """
        if tensor.numel() == 0:
            return
        record = self._returned(tensor)
        geometry = _geometry(tensor)
        self._most_bytes += int(tensor.untyped_storage().nbytes())
        if _covers_storage(tensor):
            record.base, record.base_bytes = value, _nbytes(tensor)
            record.held[geometry] = _Held(value, category, 0, used=self._step)
            return
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        alike = self._accelerator.launch(Op("twin", category=category), _laid_out, (value, shape, stride))
        nbytes = int(tensor.untyped_storage().nbytes())  # the value keeps its storage, as the tensor does
        record.held[geometry] = _Held(alike, category, nbytes, used=self._step)

    def _returned(self, tensor: Tensor) -> _Record:
        """The record of a storage that this step made: a new one, unless another view of it was returned, too."""
        key, address, version = _key(tensor), tensor.untyped_storage().data_ptr(), _version(tensor)
        record = self._records.get(key)
        made = record is not None and record.returned == self._step and not record.storage.expired()
        if record is None or not made:
            self._drop(key)
            record = self._records[key] = _Record(_weak(tensor), address, version, returned=self._step)
        record.used = self._step
        return record

    def settle(self, tensor: Tensor) -> None:
        """The step wrote the host tensor and its mirror alike: what the mirror holds is current again."""
        record = self._records.get(_key(tensor))
        if record is None:
            return
        record.note(tensor)
        self._changed(record)
        for held in record.held.values():
            held.fingerprint = None
        if record.base is None:  # other views of the storage were uploaded by themselves and know nothing of it
            geometry = _geometry(tensor)
            record.held = {geometry: record.held[geometry]} if geometry in record.held else {}

    def purge(self) -> None:
        """Forget the mirrors of storages that no longer exist."""
        expired = torch.UntypedStorage._expired  # a record's weak reference keeps its key valid
        for key in [key for key in self._records if expired(key)]:
            self._drop(key)

    def forget(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Drop mirrors (all by default), so that the next step that needs them uploads afresh."""
        keys = list(self._records) if tensors is None else [_key(tensor) for tensor in tensors]
        for key in keys:
            self._drop(key)

    def forget_all_but_weights(self) -> None:
        """Drop what a step may have written."""
        for key in [key for key, record in self._records.items() if not record.holds(WEIGHTS)]:
            self._drop(key)

    def forget_weights(self, weights: Iterable[WeightKey]) -> None:
        """Drop the resident rows of these weights."""
        for weight in weights:
            record = self._records.get(weight.storage)
            if record is not None:
                self._changed(record)
                gone = {g for g, held in record.held.items() if held.category == WEIGHTS and weight.holds(g.offset)}
                record.held = {g: held for g, held in record.held.items() if g not in gone}

    def held_bytes(self, category: str) -> int:
        """Bytes that mirrors of one category hold on the accelerator."""
        held = (held for record in self._records.values() for held in record.held.values())
        return sum(one.nbytes for one in held if one.category == category)

    # ---- how ---------------------------------------------------------------------------------------------

    def _current(self, tensor: Tensor) -> _Record:
        """The record of the tensor's storage, emptied if the host's copy is not what it was."""
        key, address = _key(tensor), tensor.untyped_storage().data_ptr()
        record = self._records.get(key)
        if record is None or record.storage.expired() or record.address != address:
            self._drop(key)
            record = self._records[key] = _Record(_weak(tensor), address, _version(tensor))
        elif not record.shows(tensor):
            self._changed(record)
            record.empty()
        record.note(tensor)
        return record

    def _make(self, record: _Record, request: Request) -> _Held:
        """Upload or view the tensor, with a fingerprint of what its bytes are now."""
        watched = request.watched or _nbytes(request.tensor) <= ALWAYS_WATCHED_BYTES
        fingerprint = _fingerprint(request.tensor) if watched else None
        return replace(self._upload(record, request), name=request.name, fingerprint=fingerprint, used=self._step)

    def _upload(self, record: _Record, request: Request) -> _Held:
        tensor, op = request.tensor.detach(), Op(request.name, category=request.category)
        covers = _covers_storage(tensor)
        if request.base is not None and _geometry(request.base) != _geometry(tensor):
            return self._rows_of(record, request, op)
        if not _through_base(record, request):
            return _Held(self._accelerator.upload(op, tensor), op.category, _nbytes(tensor))
        if record.base is None:
            whole = tensor if covers else torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            record.base = self._accelerator.upload(op, whole)
            record.base_bytes = _nbytes(whole)
            if covers:
                return _Held(record.base, op.category, 0)
        view = tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()
        return _Held(self._accelerator.launch(op, _view, (record.base, tensor.dtype, view)), op.category, 0)

    def _rows_of(self, record: _Record, request: Request, op: Op) -> _Held:
        """The last rows of what is uploaded as a whole."""
        base = request.base
        assert base is not None
        whole = record.held.get(_geometry(base))
        if whole is None:
            whole = _Held(self._accelerator.upload(op, base.detach()), op.category, _nbytes(base), used=self._step)
            record.held[_geometry(base)] = whole
        rows = request.tensor.shape[0]
        return _Held(self._accelerator.launch(op, _last_rows, (whole.value, rows)), op.category, 0)


def _parts(record: _Record, geometry: Geometry, request: Request) -> list[_Held]:
    """What a record holds for a request: its value, and what that is the last rows of."""
    wanted = (geometry,) if request.base is None else (geometry, _geometry(request.base))
    return [record.held[one] for one in wanted if one in record.held]


def _watched(found: Sequence[tuple[_Record, Geometry]]) -> list[tuple[int, Fingerprint]]:
    """What of the values that are there has a fingerprint."""
    held = [(record.address, record.held.get(geometry)) for record, geometry in found]
    return [(address, one.fingerprint) for address, one in held if one is not None and one.fingerprint is not None]


def _last_rows(base: Tensor, rows: int) -> Tensor:
    return base[base.shape[0] - rows :]


def _through_base(record: _Record, request: Request) -> bool:
    """Whether the tensor's mirror is (a view of) one of its whole storage."""
    tensor = request.tensor
    whole = request.whole or record.base is not None or _covers_storage(tensor) or _lies_in_little(tensor)
    return request.category == MIRRORS and whole


def _new_bytes(missing: Sequence[tuple[_Record, Request]]) -> int:
    """Bytes that mirrors which are not there yet will hold; parts of one base or storage share it."""
    sizes: dict[Any, int] = {}
    for record, request in missing:
        tensor = request.tensor
        if _through_base(record, request):
            sizes[id(record)] = int(tensor.untyped_storage().nbytes()) if record.base is None else 0
        else:
            uploaded = tensor if request.base is None else request.base
            geometry = _geometry(uploaded)
            sizes[id(record), geometry] = 0 if geometry in record.held else _nbytes(uploaded)
    return sum(sizes.values())


def _view(base: Tensor, dtype: torch.dtype, view: tuple[Any, ...]) -> Tensor:
    same_type = base if base.dtype == dtype else base.view(dtype)
    shape, stride, offset = view
    return same_type.as_strided(shape, stride, same_type.storage_offset() + offset)


def _laid_out(value: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The value with the strides that the host's tensor has."""
    if value.stride() == stride:
        return value
    return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device).copy_(value)


def _fingerprint(tensor: Tensor) -> Fingerprint | None:
    """Of all bytes between the tensor's first and last element; None where there are none or no version."""
    if tensor.numel() == 0 or tensor.is_inference():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return Fingerprint(tensor.untyped_storage(), start, (last + 1) * tensor.element_size())


def _geometry(tensor: Tensor) -> Geometry:
    return Geometry(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _version(tensor: Tensor) -> Any:
    """The version counter; contents of small tensors that have none; None where nothing can be said."""
    if not tensor.is_inference():
        return tensor._version
    small = tensor.untyped_storage().nbytes() <= COMPARED_BYTES
    return tensor.detach().clone() if small else None


def _same_version(one: Any, other: Any) -> bool:
    """Whether versions say that nothing was written in between; None never does."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is not None and not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _covers_storage(tensor: Tensor) -> bool:
    return _nbytes(tensor) == tensor.untyped_storage().nbytes() and is_dense(tensor.shape, tensor.stride())


def _lies_in_little(tensor: Tensor) -> bool:
    """Whether the tensor is mirrored through its whole storage."""
    storage_bytes = tensor.untyped_storage().nbytes()
    return mirrored_bytes(tensor.shape, tensor.stride(), tensor.element_size(), storage_bytes) == storage_bytes
