"""Copies of columns of a host matrix to a CUDA device: ``cudaMemcpy2DAsync``, called in torch's own runtime library.

``Tensor.copy_`` from a host tensor with gaps makes a contiguous temporary and is not asynchronous; torch exposes no
other way. The function is looked up in the CUDA runtime that torch has loaded, by its name and major version.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from hetegen_compile.errors import AcceleratorError

HOST_TO_DEVICE = 1
"""``cudaMemcpyHostToDevice``."""


def upload_lines(target: torch.Tensor, source: torch.Tensor, stream: int) -> None:
    """Queue a copy of a pinned host matrix, whose rows are contiguous and may lie apart, to a contiguous device matrix.

    ``stream`` is the handle of the stream. The geometry has been checked by the caller.

    Raises:
        AcceleratorError: the driver refuses the copy, or torch's runtime library is not found.
    """
    height, width = source.shape
    item = source.element_size()
    code = _copy_function()(
        target.data_ptr(), width * item, source.data_ptr(), source.stride(0) * item, width * item, height,
        HOST_TO_DEVICE, stream,
    )  # fmt: skip
    if code != 0:
        raise AcceleratorError(f"cudaMemcpy2DAsync of {height} rows of {width * item} bytes failed with error {code}")


@cache
def _copy_function() -> Any:
    name = f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}"
    try:
        function = ctypes.CDLL(name).cudaMemcpy2DAsync
    except (OSError, AttributeError) as error:
        raise AcceleratorError(
            f"{name} has no cudaMemcpy2DAsync ({error}): set options={{'pair_mlp': False}}, which needs no 2-D copies"
        ) from error
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    function.restype = ctypes.c_int
    return function
