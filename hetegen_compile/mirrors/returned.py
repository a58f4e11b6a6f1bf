"""What a step returned and the accelerator holds as well, until somebody asks for it otherwise than the next step does.

A cache that grows is a new tensor for each layer and step. The next step reads it once, as it is, and lets go of it. A
record of each and a look at it later cost some 30 us, and a model of 32 layers has 64 of them. So as little as tells
that a tensor is still what the step returned is noted here, and becomes a record (``as_record``) where anything else
is asked: a part of it, who holds what, room.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import lru_cache
from typing import Any

from torch import Tensor

from hetegen_compile.accelerators.base import Value
from hetegen_compile.accelerators.growing import Block
from hetegen_compile.geometry import is_dense
from hetegen_compile.mirrors.fingerprints import SAMPLE_BYTES, EarlierSample
from hetegen_compile.mirrors.identity import Geometry, weak_storage
from hetegen_compile.mirrors.record import Held, Record
from hetegen_compile.mirrors.request import MIRRORS

RETURNED = "a tensor that a step returned"


class Returned:
    """A tensor that is all of its storage, and its value on the accelerator.

    Attributes:
        nbytes: what the value holds, with all of the block that it lies in.
        step: the one that returned it.
        used: the last one that was answered with it.
    """

    __slots__ = ("_address", "_block", "_dtype", "_first", "_seen", "_shape", "_storage", "_stride", "_tensor",
                 "_value", "_version", "nbytes", "step", "used")  # fmt: skip

    def __init__(self, tensor: Tensor, value: Value, step: int, block: Block | None = None) -> None:
        self._storage = weak_storage(tensor)
        self._tensor = weakref.ref(tensor)
        self._value = value
        self._address = tensor.data_ptr()
        self._version = tensor._version
        self._dtype, self._shape, self._stride = tensor.dtype, tensor.shape, tensor.stride()
        self._block = block
        self.nbytes = tensor.nbytes if block is None else block.nbytes
        self._seen = (ctypes.c_char * min(SAMPLE_BYTES, tensor.nbytes)).from_address(self._address)
        self._first = self._seen.raw
        self.step = self.used = step

    def answer(self, tensor: Tensor, step: int) -> Value | None:
        """The value if this is the tensor that was returned and shows no sign of a write since."""
        same = (
            self._tensor() is tensor
            and tensor._version == self._version
            and tensor.data_ptr() == self._address
            and tensor.dtype == self._dtype
            and tensor.shape == self._shape
            and tensor.stride() == self._stride
            and self._seen.raw == self._first
        )
        if not same:
            return None
        self.used = step
        return self._value

    def as_record(self) -> Record:
        """The same for whoever asks in another way; it shows a write since then as any record does."""
        tensor = self._tensor()
        geometry = Geometry(self._dtype, self._shape, self._stride, 0)
        record = Record(self._storage, self._address, version=self._version, returned=self.step, used=self.used)
        if tensor is not None:
            itself: Any = geometry, int(tensor._cdata)
            record.versions[itself] = self._version
            record.noted[itself] = self._tensor
        record.hold(self._value, self.nbytes, self._block)
        record.held[geometry] = Held(self._value, MIRRORS, 0, RETURNED, EarlierSample(self._first), self.used)
        return record


def can_be_noted(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage, has a version and is nobody's view."""
    return (
        tensor._base is None
        and not tensor.is_inference()
        and 0 < tensor.nbytes == tensor.untyped_storage().nbytes()
        and (tensor.is_contiguous() or _is_dense(tensor.shape, tensor.stride()))
    )


_is_dense = lru_cache(maxsize=16)(is_dense)
"""The caches of all layers lie alike."""


__all__ = ["RETURNED", "Returned", "can_be_noted"]
