"""Accelerators: the contract (``base``), the emulated one and CUDA."""

from __future__ import annotations

import logging

from hetegen_compile.accelerators.base import Accelerator, Op, StepFacts
from hetegen_compile.accelerators.choice import uses_cuda
from hetegen_compile.accelerators.counters import Counters
from hetegen_compile.accelerators.cuda import CudaAccelerator
from hetegen_compile.accelerators.emulated import EmulatedAccelerator

__all__ = [
    "Accelerator",
    "Counters",
    "CudaAccelerator",
    "EmulatedAccelerator",
    "Op",
    "StepFacts",
    "open_accelerator",
    "uses_cuda",
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
    if uses_cuda(kind, pace=pace, seed=seed):
        return CudaAccelerator(memory_bytes)
    if kind == "auto":
        _log.warning("no CUDA device: running on an emulated accelerator, whose times say nothing about speed")
    if memory_bytes is None:
        memory_bytes = DEFAULT_MEMORY_BYTES
    return EmulatedAccelerator(memory_bytes, pace=pace, seed=seed)
