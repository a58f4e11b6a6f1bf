"""Which accelerator the option ``accelerator`` means on this machine."""

from __future__ import annotations

from typing import get_args

import torch

from hetegen_compile.errors import AcceleratorUnavailableError, OptionError
from hetegen_compile.options import AcceleratorChoice


def uses_cuda(accelerator: str, *, pace: float | None = None, seed: int | None = None) -> bool:
    """Whether the option ``accelerator`` means CUDA on this machine.

    Raises:
        OptionError: it is none of "auto", "cuda" and "emulated"; or it means CUDA, and ``pace`` or ``seed`` is given.
        AcceleratorUnavailableError: "cuda" without a device.
    """
    valid = get_args(AcceleratorChoice)
    if accelerator not in valid:
        raise OptionError(f"accelerator={accelerator!r}: valid are {', '.join(map(repr, valid))}")
    if accelerator == "cuda":
        require_cuda()
    cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    if cuda and (pace is not None or seed is not None):
        raise OptionError("pace and seed are for accelerator='emulated'; a CUDA device runs at its own pace")
    return cuda


def require_cuda() -> None:
    """Raises AcceleratorUnavailableError without a CUDA device that torch can use."""
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        reason = "this build of torch has no CUDA; install a CUDA build of torch"
    else:
        reason = "torch finds no CUDA device; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    raise AcceleratorUnavailableError(f'{reason}, or use accelerator="emulated" or "auto"')


__all__ = ["require_cuda", "uses_cuda"]
