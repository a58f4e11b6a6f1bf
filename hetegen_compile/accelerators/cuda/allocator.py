"""What lies in a GPU's memory beside the tensors that a plan counts."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable

import torch

logger = logging.getLogger("hetegen_compile")

BLOCK_BYTES = (20 << 20) + (2 << 20)
"""Torch's allocator reserves in blocks: of 2 MiB for tensors below 1 MiB, of 20 MiB for those up to 10 MiB. For each
stream that tensors are made on (compute, up) the last of them are rarely full."""


RECORDED_BYTES = 48 << 20
"""What recorded launches (``replays.py``) may take: results and workspaces, for which torch's allocator reserves apart
from everything else, and the driver's own of each graph."""

GRAPH_BYTES = 144 << 10
"""What the driver took of an H200 for a graph of up to eight launches, at most: 6 MiB for 45 of them."""


ASKED_EVERY_S = 0.5
"""After so many seconds the driver is asked again what other processes have left."""


def beside_allocator_bytes(device: torch.device | int) -> int:
    """Bytes of a GPU in use beside torch's allocator: the CUDA context, libraries' own memory, other processes.

    The driver's figures and the allocator's are not read at one instant, hence never less than 0.
    """
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return max(0, int(total_bytes) - int(free_bytes) - torch.cuda.memory_reserved(device))


def reserved_now_bytes(device: torch.device) -> int:
    """What the allocator has reserved, read without the pass over all its figures that ``memory_reserved`` makes."""
    return int(torch.cuda.memory_stats_as_nested_dict(device)["reserved_bytes"]["all"]["current"])


class Unclaimed:
    """What the allocator can get from the driver without giving anything back first, its rounding taken off.

    The driver, which takes a lock for it, is asked what is free when the allocator has reserved more or less since, and
    now and then: other processes may have taken some.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reserved_bytes = -1
        self._free_bytes = self._total_bytes = 0
        self._asked_s = 0.0

    def nbytes(self) -> int:
        """What it can get now."""
        device, reserved_bytes = self._device, reserved_now_bytes(self._device)
        now_s = time.monotonic()
        if reserved_bytes != self._reserved_bytes or now_s - self._asked_s > ASKED_EVERY_S:
            self._free_bytes, self._total_bytes = map(int, torch.cuda.mem_get_info(device))
            self._reserved_bytes, self._asked_s = reserved_bytes, now_s
        allowed_bytes = int(torch.cuda.get_per_process_memory_fraction(device) * self._total_bytes) - reserved_bytes
        return max(0, min(self._free_bytes, allowed_bytes) - 2 * BLOCK_BYTES)


class Excess:
    """What the allocator has reserved beyond the budget and does not use is given back to the driver, between steps.

    Caches that grow leave memory behind that nothing longer fits. Giving back waits for the device and makes the next
    step ask the driver, so what did not help is tried again only when an eighth more is reserved.
    """

    def __init__(self) -> None:
        self._left_bytes = 0

    def give_back(self, held_bytes: int, limit_bytes: int, held_now_bytes: Callable[[], int]) -> None:
        """``held_bytes`` were held when the last step ended."""
        if held_bytes <= limit_bytes:
            self._left_bytes = 0
        elif held_bytes > self._left_bytes * 9 // 8:
            torch.cuda.empty_cache()
            self._left_bytes = held_now_bytes()
            logger.debug(
                "of %s reserved bytes %s are left; the budget is %s", held_bytes, self._left_bytes, limit_bytes
            )


def overhead_bytes(device: torch.device) -> dict[str, int]:
    """What libraries and the allocator's rounding take of a budget, item by item."""
    return {
        "cuBLAS workspace": cublas_workspace_bytes(torch.cuda.get_device_capability(device)),
        "rounding of torch's allocator": 2 * BLOCK_BYTES,
        "recorded launches": RECORDED_BYTES,
    }


def cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """What torch gives cuBLAS for a handle and stream: what it says itself (torch 2.13), else what it documents.

    That is ``CUBLAS_WORKSPACE_CONFIG``, a list of ``:KiB:count``, else 32 MiB on Hopper and newer.
    """
    if hasattr(torch.backends.cuda, "cublas_workspace_size") and torch.version.cuda is not None:
        return int(torch.backends.cuda.cublas_workspace_size())
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return sum(int(kib) * int(count) for kib, count in pairs) * 1024
    return 32 << 20 if capability[0] >= 9 else (4096 * 2 + 16 * 8) * 1024
