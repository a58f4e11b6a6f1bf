"""Tensors in private file mappings, as safetensors gives them, and what of a range is resident."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor, nn

_PRESENT = 1 << 63


def mapped(path: Path, values: Tensor) -> Tensor:
    """``values`` written to a file and mapped privately."""
    path.write_bytes(values.contiguous().view(torch.uint8).numpy().tobytes())
    flat = torch.from_file(str(path), shared=False, size=values.numel(), dtype=values.dtype)
    return flat.view(values.shape)


def map_weights(model: nn.Module, folder: Path) -> None:
    """Put each parameter of the model into a mapping of its own; tied ones stay tied."""
    for name, parameter in model.named_parameters():
        parameter.data = mapped(folder / name, parameter.data)


def resident_pages(address: int, nbytes: int) -> int:
    """Pages of a range that the process has in memory."""
    first, count = address // mmap.PAGESIZE, -(-nbytes // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(8 * first)
        entries = memoryview(pagemap.read(8 * count)).cast("Q")
    return sum(bool(entry & _PRESENT) for entry in entries)
