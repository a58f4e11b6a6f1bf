"""Copies that keep a tensor's geometry: size, stride and dtype, whatever the strides are.

A tensor is copied as the span of its storage between its first and its last element. That is one contiguous
copy on every device, also for transposed, gapped and expanded tensors; gaps are copied along.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def span_length(tensor: torch.Tensor) -> int:
    """Elements from the tensor's first to its last one, gaps included."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a copy of the tensor moves."""
    return span_length(tensor) * tensor.element_size()


def span(tensor: torch.Tensor) -> torch.Tensor:
    """A 1-D view of everything from the tensor's first to its last element."""
    return tensor.as_strided((span_length(tensor),), (1,))


def has_lines(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what a 2-D copy reads: contiguous, or a matrix whose rows are and do not overlap."""
    if tensor.is_contiguous():
        return True
    return tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def same_geometry(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, size and stride agree."""
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()


def empty_twin(tensor: torch.Tensor, device: torch.device, *, pinned: bool = False) -> torch.Tensor:
    """An uninitialised tensor of the same geometry on ``device``, as small as that geometry allows."""
    flat = torch.empty(span_length(tensor), dtype=tensor.dtype, device=device, pin_memory=pinned)
    return flat.as_strided(tensor.shape, tensor.stride())


def empty_result(value: torch.Tensor, *, pinned: bool = False) -> torch.Tensor:
    """An uninitialised host tensor of the value's geometry, for the caller of a compiled graph.

    Dynamo guards more than size and stride: a view has a ``_base``, of which it guards as much. So this is a tensor by
    itself, and where the strides have gaps a slice of a dense tensor of as many dimensions, as eager's is (the window
    that is cut from a longer cache). Only if the dense one is larger than twice the span it is left out.
    """
    host = torch.device("cpu")
    dense = _dense_shape(value)
    if dense is None:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=host, pin_memory=pinned)
    whole = torch.empty(dense, dtype=value.dtype, device=host, pin_memory=pinned)
    offset = value.storage_offset() if value.storage_offset() + span_length(value) <= whole.numel() else 0
    return whole.as_strided(value.shape, value.stride(), offset)


def _dense_shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Sizes of the dense tensor with these strides that the tensor is a slice of; None if it has no gaps or no such."""
    strides = tensor.stride()
    if tensor.is_contiguous() or strides[-1] != 1 or 0 in strides:
        return None
    inner = [outer // stride for outer, stride in pairwise(strides) if outer % stride == 0]
    shape = (tensor.shape[0], *inner)
    if len(shape) < tensor.dim() or any(whole < part for whole, part in zip(shape, tensor.shape, strict=True)):
        return None
    return shape if math.prod(shape) <= 2 * span_length(tensor) else None


def copy_span(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = False) -> None:
    """Copy between two tensors of the same geometry."""
    if target.is_contiguous() and source.is_contiguous():
        target.copy_(source, non_blocking=non_blocking)
        return
    span(target).copy_(span(source), non_blocking=non_blocking)
