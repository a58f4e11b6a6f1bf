"""Linears on few tokens at the speed of main memory: C++ of our own (``linear.cpp``), built by torch's tool chain.

Why not ``F.linear``: at one token torch's 16-bit kernels reach half of the memory's read rate, and from two tokens on
most of its kernels fall far below. Why C++ of our own and not an Inductor graph: one build serves every shape and
number of tokens (half a minute, kept in Inductor's cache on disk), and a call through ctypes costs a few
microseconds and releases the GIL while it runs, without Dynamo's guards.

The weight is read where it lies. Sums are float32 whatever the dtype. The threads are torch's: the calling thread's
number of them, from the same OpenMP pool.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from hetegen_compile.errors import HostKernelUnavailableError, first_line

logger = logging.getLogger("hetegen_compile")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types of the weights that the kernel takes."""


_LINEARS, _PROGRAMS = ("linear.cpp", "partial_linear.cpp"), ("program.cpp",)
"""Built as one, or, where a compiler fails with the programs, Linears alone."""


class Reading(IntEnum):
    """How weights are read, numbered as in ``linear.cpp``; the names, in lower case, begin those of its functions.

    ROWS: one after the other, which hardware prefetchers follow, for one token and for two.
    TILES: several rows at once, which the program prefetches into the first-level cache. On an H200's host (16 virtual
        processors of a Xeon) eight rows at once read 134 GB/s, four 123, one 99; on one processor of an EPYC with AVX2
        four rows read 19 to 21 GB/s of bfloat16 where one row reads 12 to 16, of float32 18 to 23 and 15 to 19.
    TILES_THROUGH_L2: prefetched into the second-level cache and further ahead. One processor of an EPYC with AVX-512
        reads 22 to 27 GB/s of float32 where ``TILES`` reads 16 to 19, of bfloat16 20 to 24 and 15 to 19; the H200's
        host read 123 where ``TILES`` read 134.

    For one token, rows of up to 2 KiB without gaps between them are read one after the other in any case.
    """

    ROWS = 0
    TILES = 1
    TILES_THROUGH_L2 = 2

    @property
    def prefix(self) -> str:
        """What the names of its functions begin with."""
        return self.name.lower()


@dataclass(frozen=True)
class ReadingFunctions:
    """The functions of one reading, by the weight's dtype."""

    linear: Mapping[torch.dtype, Callable[..., None]]
    partial_linear: Mapping[torch.dtype, Callable[..., None]]
    grouped_linear: Mapping[torch.dtype, Callable[..., None]]


class Library:
    """The built library: ``reads`` has the functions of each ``Reading``.

    ``partial_blocks`` of (tokens, columns of the result, rows): for so many a partial Linear is given sums.

    ``run_trip`` takes what ``program.py`` prepares, if it has ``programs``.
    """

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        operands = [pointer, number, pointer, number, pointer, pointer]
        groups = [pointer, number, pointer, number, number, pointer, number, pointer, number, number]
        self.reads = tuple(
            ReadingFunctions(
                self._by_dtype(f"{reading.prefix}_linear", [*operands, *[number] * 3]),
                self._by_dtype(f"{reading.prefix}_partial_linear", [*operands, pointer, *[number] * 3]),
                self._by_dtype(f"{reading.prefix}_grouped_linear", groups),
            )
            for reading in Reading
        )
        self.partial_blocks = self._typed("partial_blocks", [number] * 3, number)
        self.programs = hasattr(handle, "run_trip")
        if not self.programs:
            return
        trip = [pointer, pointer, number, pointer, pointer, pointer, ctypes.c_uint32]
        self.run_trip = self._typed("run_trip", trip, number)
        self.still_pending = ctypes.cast(handle.still_pending, pointer).value

    def _by_dtype(self, prefix: str, arguments: Sequence[type]) -> dict[torch.dtype, Callable[..., None]]:
        return {dtype: self._typed(f"{prefix}_{str(dtype).removeprefix('torch.')}", arguments) for dtype in DTYPES}

    def _typed(self, name: str, arguments: Sequence[type], returned: type | None = None) -> Callable[..., Any]:
        function: ctypes._FuncPointer = getattr(self._handle, name)
        function.argtypes, function.restype = arguments, returned
        return function

    @cached_property
    def activations(self) -> dict[torch.dtype, torch.dtype]:
        """By the weight's dtype, the dtype that whole and grouped Linears take activations in."""
        taken = dict.fromkeys(DTYPES, torch.float32)
        return {**taken, torch.bfloat16: torch.bfloat16} if self._handle.bfloat16_dot() else taken


@cache
def library() -> Library:
    """The kernel, built on first use in this process or loaded from Inductor's cache.

    Raises:
        HostKernelUnavailableError: it cannot be built (no C++ compiler, a torch without its tool chain); the reason is
            kept, later calls raise it again without a new attempt.
    """
    built = _build()
    if isinstance(built, str):
        raise HostKernelUnavailableError(built)
    return built


@cache
def _build() -> Library | str:
    both = _built(*_LINEARS, *_PROGRAMS)
    if isinstance(both, Library):
        return both
    alone = _built(*_LINEARS)
    if isinstance(alone, Library):
        logger.warning("host programs cannot be built, their operations are computed one by one: %s", both)
        return alone
    return f"the vectorised host kernel cannot be built, install a C++ compiler (g++ or CXX): {alone}"


def _built(*names: str) -> Library | str:
    """The library of these sources, or the first line of why there is none."""
    source = _source(*names)
    try:
        from torch._inductor.codecache import CppCodeCache

        try:
            return Library(CppCodeCache.load(source))
        except FileNotFoundError:
            raise
        except (ImportError, OSError) as error:  # a file that a killed compiler left, which torch takes for whole
            logger.warning("the host kernel that lies in Inductor's cache cannot be loaded, built anew: %s", error)
            return Library(CppCodeCache.load(f"{source}\n// built anew\n"))
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return first_line(error)


def _source(*names: str) -> str:
    return "\n".join(files(__package__).joinpath(name).read_text() for name in names)


@cache
def sources_digest() -> str:
    """Differs where the kernels' sources do: what was measured with others does not hold."""
    return hashlib.sha256(_source(*_LINEARS, *_PROGRAMS).encode()).hexdigest()


def vectorised_rows(
    reading: Reading, x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int
) -> Tensor:
    """``ir.linear_rows`` for weights of ``DTYPES`` whose last dimension is contiguous, sums in float32.

    Raises:
        HostKernelUnavailableError: the kernel cannot be built.
    """
    functions = library().reads[reading]
    if dim == 0:
        return _columns(x, rows, None if bias is None else bias[lo:hi], functions.linear)
    return _partial_sum(x[..., lo:hi], rows, bias, functions.partial_linear)


def vectorised_groups(reading: Reading, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Consecutive tokens, each group with a matrix of its own, as ``vectorised_rows`` computes them; one call for all.

    Args:
        reading: how the matrices are read.
        x: activations [tokens, in], not empty along ``in``.
        matrices: [groups, out, in], whose last dimension is contiguous.
        ends: where each group's tokens end, int32 [groups], ascending, at most ``tokens``.

    Returns:
        [tokens, out]; what lies beyond the last end is not set.
    """
    kernel = library()
    dtype = matrices.dtype
    _, stride, flat = _flat(x, kernel.activations[dtype])
    count, out_columns, width = matrices.shape
    ends = ends.contiguous()
    out = x.new_empty((x.shape[0], out_columns))
    kernel.reads[reading].grouped_linear[dtype](
        flat.data_ptr(), stride, matrices.data_ptr(), matrices.stride(0), matrices.stride(1),
        ends.data_ptr(), count, out.data_ptr(), out_columns, width,
    )  # fmt: skip
    return out


def _columns(x: Tensor, rows: Tensor, bias: Tensor | None, linear: Mapping[torch.dtype, Callable[..., None]]) -> Tensor:
    kernel = library()
    dtype = rows.dtype
    tokens, stride, flat = _flat(x, kernel.activations[dtype])
    count, width = rows.shape
    out = x.new_empty((*x.shape[:-1], count))
    linear[dtype](
        flat.data_ptr(), stride, rows.data_ptr(), rows.stride(0), _address(bias), out.data_ptr(), tokens, count, width
    )
    return out


def _partial_sum(
    x: Tensor, rows: Tensor, bias: Tensor | None, linear: Mapping[torch.dtype, Callable[..., None]]
) -> Tensor:
    kernel = library()
    tokens, stride, flat = _flat(x, torch.float32)
    count, width = rows.shape
    out = x.new_empty((*x.shape[:-1], width))
    sums = torch.empty((kernel.partial_blocks(tokens, width, count), tokens, width), dtype=torch.float32, device="cpu")
    linear[rows.dtype](
        flat.data_ptr(), stride, rows.data_ptr(), rows.stride(0), _address(bias), out.data_ptr(), sums.data_ptr(),
        tokens, width, count,
    )  # fmt: skip
    return out


def _flat(x: Tensor, dtype: torch.dtype) -> tuple[int, int, Tensor]:
    """(tokens, elements from one token to the next, a tensor that holds them): each token contiguous, of a dtype."""
    width = x.shape[-1]
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.is_contiguous():
        return x.numel() // width, width, x
    flat = x.reshape(-1, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return flat.shape[0], flat.stride(0), flat


def _address(bias: Tensor | None) -> int | None:
    return None if bias is None else bias.data_ptr()
