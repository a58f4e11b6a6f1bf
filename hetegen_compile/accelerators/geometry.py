"""Copies that keep a tensor's geometry: size, stride and dtype, whatever the strides are.

A tensor is copied as the span of its storage between its first and its last element. That is one contiguous
copy on every device, also for transposed, gapped and expanded tensors; gaps are copied along.
"""

from __future__ import annotations

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


def copy_span(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = False) -> None:
    """Copy between two tensors of the same geometry."""
    span(target).copy_(span(source), non_blocking=non_blocking)
