"""Pinned host memory for CUDA: registering memory in place, and CUDA views of pinned buffers."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

REGISTER_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every CUDA context of the process."""

SUCCESS = 0
INVALID_VALUE = 1
"""``cudaErrorInvalidValue``."""

LARGEST_REGISTRATION_BYTES = 1 << 39
"""One call of ``cudaHostRegister`` stays below 512 GiB."""


class CudaHostMemory:
    """``cudaHostRegister`` and ``cudaHostUnregister`` on one device, decided by their return codes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, nbytes: int) -> int:
        """Pin a range in place; the driver's error code if it refuses (it overlaps a registered range, a limit)."""
        if nbytes >= LARGEST_REGISTRATION_BYTES:
            return INVALID_VALUE
        code = int(_runtime().cudaHostRegister(address, nbytes, REGISTER_PORTABLE))
        if code != SUCCESS:
            self._clear_last_error()
        return code

    def unregister(self, address: int) -> None:
        """End the pinning of a range, after every copy from it is over."""
        torch.cuda.synchronize(self._device)
        if int(_runtime().cudaHostUnregister(address)) != SUCCESS:
            self._clear_last_error()

    def _clear_last_error(self) -> None:
        """Take the runtime's last error, which would surface at an unrelated kernel launch.

        A kernel of torch's own asks torch's own runtime library for it, whichever copy of that is loaded.
        """
        try:
            torch.zeros(1, device=self._device).add_(1)
        except RuntimeError:
            return


def pinned_by_others(address: int, nbytes: int) -> bool:
    """Whether someone else has pinned a range (``pin_memory``, a registration): both of its ends are.

    What lies between is not looked at: CUDA tells it only byte by byte.
    """
    ends = (address, address + nbytes - 1)
    return all(torch.frombuffer((ctypes.c_uint8 * 1).from_address(end), dtype=torch.uint8).is_pinned() for end in ends)


def _runtime() -> Any:
    """The CUDA runtime library that torch itself uses."""
    return torch.cuda.cudart()


class _PinnedBytes:
    """A pinned host buffer seen through ``__cuda_array_interface__``, which keeps it alive."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.__cuda_array_interface__ = {
            "shape": (buffer.numel() * buffer.element_size(),),
            "typestr": "|u1",
            "data": (buffer.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def cuda_view(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CUDA tensor over the bytes of a pinned, contiguous 1-D host tensor, not empty; nothing is copied.

    Kernels that read it read host memory over the link, so it should be read once. Needs NumPy (torch parses
    the interface's type with it). Raises RuntimeError if torch made a copy of it.
    """
    view = torch.as_tensor(_PinnedBytes(buffer), device=device).view(buffer.dtype)
    if view.data_ptr() != buffer.data_ptr():
        raise RuntimeError("torch copied a pinned buffer instead of viewing it")
    return view
