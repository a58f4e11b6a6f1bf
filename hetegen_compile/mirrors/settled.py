"""What a plan's step wrote on the host and on the accelerator alike, step after step: caches and their lengths.

Noting each of them after a step and looking each of them up before the next takes some 20 us a tensor, and a model of
32 layers has a hundred. So a plan that runs again and again keeps one answer for all of them, which its own steps bring
up to date: new versions, new first bytes. What the records know of these tensors is of before meanwhile; they are told
as soon as anybody else asks (``Records.up_to_date``).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

from torch import Tensor

from hetegen_compile.accelerators.base import Value
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.geometry import storage_id
from hetegen_compile.mirrors.fingerprints import SAMPLE_BYTES
from hetegen_compile.mirrors.standing import Standing


class FirstBytes:
    """The first bytes of tensors in host memory: as ``Samples``, of all of them each time."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._places = list(map(_first_bytes, tensors))
        self._expected: list[bytes] = []
        self.renew()

    def match(self) -> bool:
        """Whether they are what they were."""
        return [place.raw for place in self._places] == self._expected

    def matches(self, index: int) -> bool:
        """The same for one tensor."""
        return self._places[index].raw == self._expected[index]

    def renew(self) -> None:
        """They are right as they are now."""
        self._expected = [place.raw for place in self._places]


def _first_bytes(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    length = min(SAMPLE_BYTES, span_bytes(tensor)) if tensor.numel() else 0
    return (ctypes.c_char * length).from_address(tensor.data_ptr()) if length else (ctypes.c_char * 0)()


class _Remembered:
    """A tensor as long as somebody else has it; a view, which may be made anew each time, as long as what it is of.

    Not if that lies elsewhere since: its new memory may be too small for the view.
    """

    def __init__(self, tensor: Tensor) -> None:
        base = tensor._base
        self._view = None if base is None else (tensor.size(), tensor.stride(), tensor.storage_offset())
        self._dtype = tensor.dtype
        self._owner = weakref.ref(tensor if base is None else base)
        self._memory = _memory(tensor)

    def __call__(self) -> Tensor | None:
        owner = self._owner()
        if owner is None or self._view is None:
            return owner
        same = owner.dtype == self._dtype and _memory(owner) == self._memory
        return owner.as_strided(*self._view) if same else None


def _memory(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class Settled(Standing):
    """A standing answer for tensors that the plan's steps write.

    ``behind`` says that the records have not been told of the last step that wrote them.
    """

    samples: FirstBytes

    def __init__(self, tensors: Sequence[Tensor], values: list[Value]) -> None:
        super().__init__(tensors, values, FirstBytes(tensors))
        self.keys = frozenset(map(storage_id, tensors))
        self.behind = False
        self._geometries = [(tensor.shape, tensor.stride()) for tensor in tensors]
        self._tensors = list(map(_Remembered, tensors))

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """As for weights, and whether they are as large: a longer view of a cache has the same address and version."""
        same = super().holds_for(tensors)
        return same and [(tensor.shape, tensor.stride()) for tensor in tensors] == self._geometries

    def renew(self, tensors: Sequence[Tensor]) -> None:
        """A step has written them on both sides."""
        self._versions = [tensor._version for tensor in tensors]
        self.samples.renew()
        self.behind = True

    def as_written(self) -> list[tuple[Tensor, bool]]:
        """The tensors that nobody has written since the last step, as far as versions show; whether it is so."""
        found = []
        for i, remembered in enumerate(self._tensors):
            tensor = remembered()
            if tensor is not None and (tensor._version, tensor.data_ptr()) == (self._versions[i], self._addresses[i]):
                found.append((tensor, self.samples.matches(i)))
        return found


__all__ = ["FirstBytes", "Settled"]
