"""Which host tensor this is, where it lies in its storage, and whether it was written since."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.geometry import is_dense, mirrored_bytes

COMPARED_BYTES = 4096
"""Up to this size tensors that have no version are compared by content."""


class Geometry(NamedTuple):
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def geometry_of(tensor: Tensor) -> Geometry:
    """How the tensor lies in its storage."""
    return Geometry(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def weak_storage(tensor: Tensor) -> StorageWeakRef:
    """A reference to the storage that keeps its key valid and not its memory."""
    return StorageWeakRef(tensor.untyped_storage())


def version_of(tensor: Tensor) -> Any:
    """The version counter; contents of small tensors that have none; None where nothing can be said."""
    if not tensor.is_inference():
        return tensor._version
    small = tensor.untyped_storage().nbytes() <= COMPARED_BYTES
    return tensor.detach().clone() if small else None


def same_version(one: Any, other: Any) -> bool:
    """Whether versions say that nothing was written in between; None never does."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is not None and not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def covers_storage(tensor: Tensor) -> bool:
    """Whether the tensor is all of its storage."""
    return tensor.nbytes == tensor.untyped_storage().nbytes() and is_dense(tensor.shape, tensor.stride())


def lies_in_little(tensor: Tensor) -> bool:
    """Whether the tensor is mirrored through its whole storage."""
    storage_bytes = tensor.untyped_storage().nbytes()
    return mirrored_bytes(tensor.shape, tensor.stride(), tensor.element_size(), storage_bytes) == storage_bytes
