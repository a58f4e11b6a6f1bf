"""How a tensor that the accelerator lacks comes up: by itself, as a view of its storage, as rows of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetegen_compile.accelerators.base import Accelerator, Op, Value
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.accelerators.growing import Block, block_of
from hetegen_compile.mirrors.fingerprints import SAMPLE_BYTES, Fingerprint
from hetegen_compile.mirrors.identity import covers_storage, geometry_of, lies_in_little
from hetegen_compile.mirrors.record import Held, Record
from hetegen_compile.mirrors.request import MIRRORS, Request

ALWAYS_WATCHED_BYTES = 1 << 16


class Uploader:
    """Makes what is missing of a record. Does not look for room."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def make(self, record: Record, request: Request, step: int) -> Held:
        """Upload or view the tensor, with a fingerprint of what its bytes are now."""
        watched = request.watched or request.tensor.nbytes <= ALWAYS_WATCHED_BYTES
        fingerprint = _fingerprint(request.tensor) if watched else None
        held = self._upload(record, request, step)
        return replace(held, name=request.name, fingerprint=fingerprint, used=step)

    def upload(self, request: Request) -> Value:
        """The tensor by itself."""
        return self._accelerator.upload(Op(request.name, category=request.category), request.tensor.detach())

    def move(self, request: Request, value: Value, tokens: int) -> tuple[Value, Block]:
        """A copy of the value of a cache, with room for so many tokens, and the memory that it lies in."""
        op = Op(f"room behind {request.name}", category=request.category)
        self._accelerator.close_no_gates()
        moved = self._accelerator.new_cache(op, request.tensor, tokens)
        self._accelerator.launch(op, _fill, (moved, value), outputs=0, mutates=(0,))
        block = block_of(moved)
        assert block is not None, "a new cache lies in a block"
        return moved, block

    def finish(self) -> None:
        """Wait until all that has been issued is over."""
        self._accelerator.synchronize()

    def share_memory(self, one: Value, other: Value) -> bool:
        """Whether two values lie in one allocation."""
        return self._accelerator.share_memory(one, other)

    def laid_out_as(self, tensor: Tensor, value: Value, category: str) -> Value:
        """The value with the strides that the host's tensor has."""
        arguments = (value, tuple(tensor.shape), tuple(tensor.stride()))
        return self._accelerator.launch(Op("twin", category=category), _laid_out, arguments)

    def _upload(self, record: Record, request: Request, step: int) -> Held:
        tensor, op = request.tensor.detach(), Op(request.name, category=request.category)
        if request.base is not None and geometry_of(request.base) != geometry_of(tensor):
            return self._rows_of(record, request, request.base.detach(), step)
        if not _through_base(record, request):
            return Held(self.upload(request), op.category, tensor.nbytes)
        if record.base is None:
            whole = tensor if covers_storage(tensor) else _whole(tensor)
            record.hold(self._accelerator.upload(op, whole), whole.nbytes)
            if whole is tensor:
                return Held(record.base, op.category, 0)
        view = tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()
        return Held(self._accelerator.launch(op, _view, (record.base, tensor.dtype, view)), op.category, 0)

    def _rows_of(self, record: Record, request: Request, base: Tensor, step: int) -> Held:
        """The last rows of what is uploaded as a whole."""
        op, place = Op(request.name, category=request.category), geometry_of(base)
        if place not in record.held:
            record.held[place] = Held(self._accelerator.upload(op, base), op.category, base.nbytes, used=step)
        rows = request.tensor.shape[0]
        return Held(self._accelerator.launch(op, _last_rows, (record.held[place].value, rows)), op.category, 0)


def new_bytes(missing: Sequence[tuple[Record, Request]]) -> int:
    """Bytes that mirrors which are not there yet will hold; parts of one base or storage share it."""
    sizes: dict[Any, int] = {}
    for record, request in missing:
        tensor = request.tensor
        if _through_base(record, request):
            sizes[id(record)] = int(tensor.untyped_storage().nbytes()) if record.base is None else 0
        else:
            uploaded = tensor if request.base is None else request.base
            geometry = geometry_of(uploaded)
            sizes[id(record), geometry] = 0 if geometry in record.held else uploaded.nbytes
    return sum(sizes.values())


def _through_base(record: Record, request: Request) -> bool:
    """Whether the tensor's mirror is (a view of) one of its whole storage."""
    tensor = request.tensor
    whole = request.whole or record.base is not None or covers_storage(tensor) or lies_in_little(tensor)
    return request.category == MIRRORS and whole


def _whole(tensor: Tensor) -> Tensor:
    """All of the tensor's storage."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def _fill(target: Tensor, source: Tensor) -> tuple[()]:
    target.copy_(source)
    return ()


def _last_rows(base: Tensor, rows: int) -> Tensor:
    return base[base.shape[0] - rows :]


def _view(base: Tensor, dtype: torch.dtype, view: tuple[Any, ...]) -> Tensor:
    same_type = base if base.dtype == dtype else base.view(dtype)
    shape, stride, offset = view
    return same_type.as_strided(shape, stride, same_type.storage_offset() + offset)


def _laid_out(value: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if value.stride() == stride:
        return value
    told = zip(value.stride(), stride, shape, strict=True)
    if tuple(value.shape) == shape and all(own == wanted or size == 1 for own, wanted, size in told):
        return value.as_strided(shape, stride, value.storage_offset())
    return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device).copy_(value)


def _fingerprint(tensor: Tensor, most_bytes: int | None = None) -> Fingerprint | None:
    """Of all bytes between the tensor's first and last element; None where there are none or no version."""
    if tensor.numel() == 0 or tensor.is_inference():
        return None
    start, nbytes = int(tensor.storage_offset()) * tensor.element_size(), span_bytes(tensor)
    return Fingerprint(tensor.untyped_storage(), start, nbytes if most_bytes is None else min(nbytes, most_bytes))


def first_bytes(tensor: Tensor) -> Fingerprint | None:
    """Of what a step has just made or written on both sides: enough to see at the next step that all was changed.

    The first token of a cache is there however much of it is filled.
    """
    return _fingerprint(tensor, SAMPLE_BYTES)


__all__ = ["Uploader", "first_bytes", "new_bytes"]
