"""What tensors are apart from their values: types, storages, how they lie in them. A leaf, imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_WHOLE_STORAGE_FACTOR = 4
_WHOLE_STORAGE_BYTES = 1 << 16


def dtype_name(dtype: torch.dtype) -> str:
    """The name that profiles use: "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def storage_id(tensor: Tensor) -> int:
    """Identity of the tensor's storage, as long as that (or a weak reference to it) exists."""
    return int(tensor.untyped_storage()._cdata)


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the geometry is a permutation of a contiguous one: no gaps, no two elements in one place."""
    expected = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= size
    return True


def token_strides(shape: Sequence[Any]) -> tuple[Any, Any, Any, int]:
    """Strides of a cache, [sequences, heads, tokens, width], with the tokens outermost in memory."""
    sequences, heads, _, width = shape
    return heads * width, width, sequences * heads * width, 1


def mirrored_bytes(shape: Sequence[int], stride: Sequence[int], item_bytes: int, storage_bytes: int) -> int:
    """Bytes that the mirror of a tensor takes: its own, or its whole storage's.

    A view is mirrored through its whole storage if it has gaps or overlaps, or if the storage is small (64 KiB, or
    four times the view).
    """
    own = prod(shape) * item_bytes
    whole = not is_dense(shape, stride) or storage_bytes <= max(_WHOLE_STORAGE_BYTES, _WHOLE_STORAGE_FACTOR * own)
    return storage_bytes if whole else own
