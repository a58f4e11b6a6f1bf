"""Device mirrors of host tensors: uploaded once, and again only when the host's copy has changed.

Whatever the host owns and the accelerator reads (parameters, buffers, caches, inputs of a step) has a
mirror per storage. A mirror is current while storage, address and version counter are what they were.
Tensors made in inference mode have no version: they are compared by content up to 4 KiB and uploaded
afresh above. A mirror dies with its host storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.accelerators.base import Accelerator, Op, Value
from hetegen_compile.geometry import is_dense, mirrored_bytes

MIRRORS = "mirrors"
"""The category of everything but resident weights."""
WEIGHTS = "weights"
"""The category under which resident weights are counted."""
COMPARED_BYTES = 4096

Geometry = tuple[Any, ...]


class Request(NamedTuple):
    """A host tensor whose device value is wanted.

    ``category`` is what its bytes count under. ``whole`` asks for a view of the mirrored storage, because another
    input of the graph lies in the same storage. ``base`` is what is uploaded instead, if ``tensor`` is the last rows
    of that.
    """

    tensor: Tensor
    name: str
    category: str = MIRRORS
    whole: bool = False
    base: Tensor | None = None


@dataclass(frozen=True)
class _Held:
    """One device value, what it is counted under and the bytes that it holds by itself."""

    value: Value
    category: str
    nbytes: int


@dataclass
class _Record:
    """The mirrors of one host storage: ``base`` holds all of it, ``held`` views or parts by geometry."""

    storage: StorageWeakRef
    address: int
    version: Any
    base: Value = None
    held: dict[Geometry, _Held] = field(default_factory=dict)
    base_bytes: int = 0
    used: int = 0

    def holds(self, category: str) -> bool:
        return any(held.category == category for held in self.held.values())

    def nbytes(self) -> int:
        return self.base_bytes + sum(held.nbytes for held in self.held.values())


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
        self._grown = False
        self.keep: frozenset[int] = frozenset()
        """Storages whose weights are resident by plan: only ``forget_weights`` drops those."""

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
        found = [self._lookup(request.tensor) for request in requests]
        missing = [i for i, (record, geometry) in enumerate(found) if geometry not in record.held]
        if missing or self._grown:
            self._grown = False
            self._make_room(limit_bytes - _uploaded_bytes([(found[i][0], requests[i]) for i in missing]))
        for i in missing:
            record, geometry = found[i]
            record.held[geometry] = self._make(record, requests[i])
        return [record.held[geometry].value for record, geometry in found]

    def _lookup(self, tensor: Tensor) -> tuple[_Record, Geometry]:
        record = self._current(tensor)
        record.used = self._step
        return record, _geometry(tensor)

    def _make_room(self, limit_bytes: int) -> None:
        """Drop what this step does not use, oldest use first, until the rest fits ``limit_bytes``.

        Nothing is lost: a mirror that is needed again is uploaded again. Weights that are resident by plan stay.

        Raises:
            NoRoomError: what this step uses does not fit.
        """
        excess = sum(record.nbytes() for record in self._records.values()) - limit_bytes
        for key, record in sorted(self._records.items(), key=lambda item: item[1].used):
            if excess <= 0:
                return
            if record.used < self._step and not (key in self.keep and record.holds(WEIGHTS)):
                excess -= record.nbytes()
                del self._records[key]
        if excess > 0:
            raise NoRoomError(excess)

    def register(self, tensor: Tensor, value: Value, category: str = MIRRORS) -> None:
        """Make ``value`` the mirror of a host tensor that a step just returned with the same contents."""
        if tensor.numel() == 0 or not _covers_storage(tensor):
            return
        record = _Record(_weak(tensor), tensor.untyped_storage().data_ptr(), _version(tensor))
        record.used = self._step
        self._grown = True
        record.held[_geometry(tensor)] = _Held(value, category, _nbytes(tensor))
        self._records[_key(tensor)] = record

    def settle(self, tensor: Tensor) -> None:
        """The step wrote the host tensor and its mirror alike: what the mirror holds is current again."""
        record = self._records.get(_key(tensor))
        if record is None:
            return
        record.version = _version(tensor)
        if record.base is None:  # other views of the storage were uploaded by themselves and know nothing of it
            geometry = _geometry(tensor)
            record.held = {geometry: record.held[geometry]} if geometry in record.held else {}

    def purge(self) -> None:
        """Forget the mirrors of storages that no longer exist."""
        for key in [key for key, record in self._records.items() if record.storage.expired()]:
            del self._records[key]

    def forget(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Drop mirrors (all by default), so that the next step that needs them uploads afresh."""
        if tensors is None:
            self._records.clear()
            return
        for tensor in tensors:
            self._records.pop(_key(tensor), None)

    def forget_all_but_weights(self) -> None:
        """Drop what a step may have written."""
        self._records = {key: record for key, record in self._records.items() if record.holds(WEIGHTS)}

    def forget_weights(self, storages: Iterable[int]) -> None:
        """Drop the resident rows of weights, given by their storages."""
        for key in storages:
            record = self._records.get(key)
            if record is not None:
                record.held = {where: held for where, held in record.held.items() if held.category != WEIGHTS}

    def held_bytes(self, category: str) -> int:
        """Bytes that mirrors of one category hold on the accelerator."""
        held = (held for record in self._records.values() for held in record.held.values())
        return sum(one.nbytes for one in held if one.category == category)

    # ---- how ---------------------------------------------------------------------------------------------

    def _current(self, tensor: Tensor) -> _Record:
        """The record of the tensor's storage, emptied if the host's copy is not what it was."""
        key = _key(tensor)
        record = self._records.get(key)
        if record is None or record.storage.expired() or not self._is_current(record, tensor):
            record = _Record(_weak(tensor), tensor.untyped_storage().data_ptr(), _version(tensor))
            self._records[key] = record
        return record

    def _is_current(self, record: _Record, tensor: Tensor) -> bool:
        if record.address != tensor.untyped_storage().data_ptr():
            return False
        version = _version(tensor)
        if isinstance(version, Tensor):
            return isinstance(record.version, Tensor) and torch.equal(version, record.version)
        return version is not None and not isinstance(record.version, Tensor) and bool(record.version == version)

    def _make(self, record: _Record, request: Request) -> _Held:
        tensor, op = request.tensor.detach(), Op(request.name, category=request.category)
        covers = _covers_storage(tensor)
        by_storage = _mirrored_bytes(tensor) == tensor.untyped_storage().nbytes()
        view_of_base = request.whole or record.base is not None or by_storage
        if request.base is not None and _geometry(request.base) != _geometry(tensor):
            return self._rows_of(record, request, op)
        if request.category != MIRRORS or not (covers or view_of_base):
            return _Held(self._accelerator.upload(op, tensor), op.category, _nbytes(tensor))
        if record.base is None:
            whole = tensor if covers else torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            record.base = self._accelerator.upload(op, whole)
            record.base_bytes = _nbytes(whole)
        if covers and not record.held:
            return _Held(record.base, op.category, 0)
        view = tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()
        return _Held(self._accelerator.launch(op, _view, (record.base, tensor.dtype, view)), op.category, 0)

    def _rows_of(self, record: _Record, request: Request, op: Op) -> _Held:
        """The last rows of what is uploaded as a whole."""
        base = request.base
        assert base is not None
        whole = record.held.get(_geometry(base))
        if whole is None:
            whole = _Held(self._accelerator.upload(op, base.detach()), op.category, _nbytes(base))
            record.held[_geometry(base)] = whole
        rows = request.tensor.shape[0]
        return _Held(self._accelerator.launch(op, _last_rows, (whole.value, rows)), op.category, 0)


def _last_rows(base: Tensor, rows: int) -> Tensor:
    return base[base.shape[0] - rows :]


def _uploaded_bytes(missing: Sequence[tuple[_Record, Request]]) -> int:
    """Bytes that making the device values of requests allocates; parts of one base or storage share it."""
    sizes: dict[Any, int] = {}
    for record, request in missing:
        tensor, storage_bytes = request.tensor, request.tensor.untyped_storage().nbytes()
        if request.base is not None:
            where = _geometry(request.base)
            sizes[id(record), where] = 0 if where in record.held else _nbytes(request.base)
        elif request.category != MIRRORS:
            sizes[id(record), _geometry(tensor)] = _nbytes(tensor)
        elif request.whole or record.base is not None or _mirrored_bytes(tensor) == storage_bytes:
            sizes[id(record)] = 0 if record.base is not None else storage_bytes
        else:
            sizes[id(record), _geometry(tensor)] = _nbytes(tensor)
    return sum(sizes.values())


def _view(base: Tensor, dtype: torch.dtype, view: tuple[Any, ...]) -> Tensor:
    return (base if base.dtype == dtype else base.view(dtype)).as_strided(*view)


def _geometry(tensor: Tensor) -> Geometry:
    return (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())


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


def _covers_storage(tensor: Tensor) -> bool:
    return _nbytes(tensor) == tensor.untyped_storage().nbytes() and is_dense(tensor.shape, tensor.stride())


def _mirrored_bytes(tensor: Tensor) -> int:
    storage_bytes = tensor.untyped_storage().nbytes()
    return mirrored_bytes(tensor.shape, tensor.stride(), tensor.element_size(), storage_bytes)
