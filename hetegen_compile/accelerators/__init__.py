"""Accelerators: the contract (``base``), the emulated one and CUDA."""

from __future__ import annotations

import logging

import torch

from hetegen_compile.accelerators.base import Accelerator, Counters, Op, Span, StepFacts
from hetegen_compile.accelerators.cuda import CudaAccelerator
from hetegen_compile.accelerators.emulated import EmulatedAccelerator
from hetegen_compile.errors import OptionError

__all__ = [
    "Accelerator",
    "Counters",
    "CudaAccelerator",
    "EmulatedAccelerator",
    "Op",
    "Span",
    "StepFacts",
    "open_accelerator",
]

_log = logging.getLogger("hetegen_compile")

DEFAULT_MEMORY_BYTES = 8 << 30
"""Of the emulated accelerator, where neither the user nor a hardware profile says another."""


def open_accelerator(
    kind: str, *, memory_bytes: int | None = None, pace: float | None = None, seed: int | None = None
) -> Accelerator:
    """Open the accelerator that ``kind`` names: ``"auto"``, ``"cuda"`` or ``"emulated"``.

    ``"auto"`` is CUDA where there is a device, else the emulated one, with one line at WARNING that says so.

    Args:
        kind: which accelerator.
        memory_bytes: device memory that may be used; default: what is free on CUDA, else 8 GiB.
        pace: emulated only, see EmulatedAccelerator.
        seed: emulated only, see EmulatedAccelerator.

    Raises:
        AcceleratorUnavailableError: ``"cuda"`` without a device.
        OptionError: another ``kind``, or ``pace`` or ``seed`` for CUDA.
    """
    if kind not in ("auto", "cuda", "emulated"):
        raise OptionError(f"accelerator={kind!r}: valid are 'auto', 'cuda' and 'emulated'")
    if kind == "cuda" or (kind == "auto" and torch.cuda.is_available()):
        if pace is not None or seed is not None:
            raise OptionError("pace and seed are for accelerator='emulated'; a CUDA device runs at its own pace")
        return CudaAccelerator(memory_bytes)
    if kind == "auto":
        _log.warning("no CUDA device: running on an emulated accelerator, whose times say nothing about speed")
    if memory_bytes is None:
        memory_bytes = DEFAULT_MEMORY_BYTES
    return EmulatedAccelerator(memory_bytes, pace=pace, seed=seed)
