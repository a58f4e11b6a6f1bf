"""Host programs: host parts and the pointwise operations between them as one native call (``program.cpp``).

Why: behind a host Linear nothing of Python is left in the processor's caches. On an H200's host what Python does for a
Linear, its activation function and the next Linear took some hundred microseconds a layer, and the memory stood still.

A program serves what our kernels serve: few tokens, activations of the weights' dtype, no autocast. Everything else is
computed operation by operation, as the same program's ``plain`` way.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetegen_compile.host_kernels.choose import HostLinear
from hetegen_compile.host_kernels.vectorised import DTYPES, Reading, library

_ALIGNMENT_BYTES = 64
_NOWHERE = -1
_FORMS = 64
"""Geometries that are kept of one program."""
_SCRATCH_BYTES = 32 << 20
"""A thread keeps this much at most for what lies between two steps."""
_FIRST_POINTWISE = 2 * len(Reading)
"""Operations: Linears by reading, then partial Linears by reading, then what is pointwise."""

POINTWISE = ("relu", "silu", "gelu", "gelu_tanh", "mul")
"""What may stand between two Linears, in the order of ``program.cpp``."""

_FUNCTIONS: Mapping[Any, str] = {
    torch.relu: "relu",
    torch.nn.functional.relu: "relu",
    torch.nn.functional.silu: "silu",
    torch.nn.functional.gelu: "gelu",
    torch.mul: "mul",
    operator.mul: "mul",
}


def pointwise_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The name in ``POINTWISE`` of a call, or "": it has no native form (written in place, other arguments)."""
    try:
        name = _FUNCTIONS.get(target, "")
    except TypeError:  # a target that cannot be hashed
        return ""
    if not name:
        return ""
    operands = 2 if name == "mul" else 1
    more = {**dict(zip(("inplace",), args[operands:], strict=False)), **kwargs}
    if name == "gelu":
        more = {"approximate": "none", **kwargs}
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(more.pop("approximate"), "")
    elif more.pop("inplace", False):
        return ""
    return name if not more and len(args) <= operands + 1 else ""


@dataclass(frozen=True)
class Step:
    """One operation of a program.

    Attributes:
        function: computes it by itself.
        operands: places of its tensors; those of a Linear are x, rows and bias (None: there is no bias).
        args, kwargs: what ``function`` is called with, ``Place`` standing for a tensor.
        pointwise: its name in ``POINTWISE``; "": ``function`` is a ``HostLinear``.
    """

    function: Callable[..., Any]
    operands: tuple[int | None, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    pointwise: str = ""


class Place(int):
    """Where a value of a program is: the arguments first, then the steps' results."""


class _Instruction(ctypes.Structure):
    """``Instruction`` of ``program.cpp``; what is not set is 0."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "operation", "dtype", "out", "first", "second", "third", "wide", "sums", "x_offset", "bias_offset", "m",
            "n", "k", "ldx", "ldw",
        )
    )  # fmt: skip


class _Program(ctypes.Structure):
    """``HetegenProgram``."""

    _fields_ = (
        ("instructions", ctypes.c_void_p), ("count", ctypes.c_int64), ("pointers", ctypes.c_void_p),
        ("given", ctypes.c_int64), ("offsets", ctypes.c_void_p), ("scratch_bytes", ctypes.c_int64),
        ("ended_s", ctypes.c_void_p), ("ahead_bytes", ctypes.c_int64), ("read_bytes", ctypes.c_int64),
    )  # fmt: skip


class _Value(NamedTuple):
    """What lies at a place. ``lines``: whether it is a matrix of contiguous rows, ``row_stride`` elements apart."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dense: bool
    lines: bool = False
    row_stride: int = 0

    @property
    def length(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of a dense one."""
        return self.length * self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Elements over columns."""
        return self.length // (self.shape[-1] or 1) if self.shape else 0


def _value_of(tensor: Tensor) -> _Value:
    lines = tensor.dim() == 2 and tensor.stride(1) == 1
    return _Value(tuple(tensor.shape), tensor.dtype, tensor.is_contiguous(), lines, tensor.stride(0) if lines else 0)


class _NotNativeError(Exception):
    """These arguments are none that ``program.cpp`` takes."""


class Form:
    """A program for arguments of one geometry.

    ``ended_s``: when each step of the last call had ended, since that began.
    """

    def __init__(self, program: HostProgram, arguments: Sequence[_Value | None]) -> None:
        builder = _Builder(program, arguments)
        self.results = tuple(builder.values[place] for place in program.results)
        self.code = (_Instruction * len(builder.code))(*builder.code)
        self.offsets = (ctypes.c_int64 * max(1, len(builder.offsets)))(*builder.offsets)
        self.ended_s = (ctypes.c_double * len(builder.code))()
        self.scratch_bytes = builder.scratch_bytes
        self.ahead_bytes = program.ahead_bytes

    def takes(self, results: Sequence[Tensor]) -> bool:
        """Whether it can write its results into these tensors."""
        return len(results) == len(self.results) and all(
            tensor.shape == value.shape and tensor.dtype == value.dtype and tensor.is_contiguous()
            for tensor, value in zip(results, self.results, strict=True)
        )


class Wait(NamedTuple):
    """What a trip waits with: addresses of C functions of an event, None where there are none.

    Attributes:
        wait: blocks until the event is over and returns 0, or an error.
        pending: returns ``not_yet`` while it is not over.
    """

    wait: int | None = None
    pending: int | None = None
    not_yet: int = 0


NO_WAIT = Wait()


class Call:
    """One call of a form, prepared: of these arguments, into these results, which it keeps."""

    def __init__(self, form: Form, arguments: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
        self._form, self._kept = form, (*arguments, *results)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in (*arguments, *results)]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._native = _Program(
            ctypes.addressof(form.code), len(form.code), ctypes.addressof(self._pointers), len(addresses),
            ctypes.addressof(form.offsets), form.scratch_bytes, ctypes.addressof(form.ended_s), form.ahead_bytes, 0,
        )  # fmt: skip
        self._address = ctypes.addressof(self._native)

    def run(self) -> None:
        """Compute."""
        self.trip()

    def trip(self, wait: Wait = NO_WAIT, event: int | None = None, gate: int | None = None, number: int = 0) -> int:
        """A worker's trip: wait for ``event``, reading weights ahead meanwhile, compute, write ``number`` at ``gate``.

        Returns:
            0, or what waiting returned; nothing has been computed then.
        """
        failed: int = library().run_trip(wait.wait, wait.pending, wait.not_yet, event, self._address, gate, number)
        return failed

    @property
    def read_bytes(self) -> int:
        """Of weights that the last trip read ahead."""
        return int(self._native.read_bytes)

    @property
    def ended_s(self) -> float:
        """Seconds that the form's last call took, without waiting."""
        return float(self._form.ended_s[-1])


class HostProgram:
    """A callable of its arguments: the list of the results of some steps, at ``results``, new tensors each time.

    ``arguments`` is their number; the first step is a Linear or reads one. While a trip waits for its activations it
    reads up to ``ahead_bytes`` of the weights of the Linears that it begins with, into the processors' caches.
    """

    def __init__(self, steps: Sequence[Step], arguments: int, results: Sequence[int], ahead_bytes: int = 0) -> None:
        self.ahead_bytes = ahead_bytes
        self.steps = tuple(steps)
        self.arguments = arguments
        self.results = tuple(results)
        self._forms: dict[tuple[Any, ...], Form | None] = {}
        self._ended_s = [1.0] * len(steps)
        self._last_reader = {
            operand: index for index, step in enumerate(self.steps) for operand in step.operands if operand is not None
        }

    def __call__(self, *arguments: Tensor | None) -> list[Tensor]:
        """The results, natively where that is possible."""
        form = self.form(arguments)
        if form is None:
            return self.plain(arguments)
        results = [torch.empty(value.shape, dtype=value.dtype, device="cpu") for value in form.results]
        Call(form, arguments, results).run()
        self._ended_s = list(form.ended_s)
        return results

    def shares(self) -> list[float]:
        """How the last call's time was shared out among the steps."""
        ended_s = [0.0, *self._ended_s]
        total_s = ended_s[-1] or 1.0
        return [(after - before) / total_s for before, after in itertools.pairwise(ended_s)]

    def form(self, arguments: Sequence[Tensor | None]) -> Form | None:
        """How it is called natively with such arguments; None: it is not."""
        if torch.is_autocast_enabled("cpu"):
            return None
        key = tuple(
            [tensor if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in arguments]
        )
        if key not in self._forms:
            if len(self._forms) >= _FORMS:
                self._forms.clear()
            self._forms[key] = self._made(arguments)
        return self._forms[key]

    def _made(self, arguments: Sequence[Tensor | None]) -> Form | None:
        try:
            return Form(self, [None if tensor is None else _value_of(tensor) for tensor in arguments])
        except _NotNativeError:
            return None

    def plain(self, arguments: Sequence[Tensor | None]) -> list[Tensor]:
        """Step by step, each by its own function; what nothing reads any more dies on the way."""
        places: list[Any] = [*arguments, *(None for _ in self.steps)]
        began_s, ended_s = time.perf_counter(), []
        for index, step in enumerate(self.steps):
            args = [places[one] if isinstance(one, Place) else one for one in step.args]
            kwargs = {name: places[one] if isinstance(one, Place) else one for name, one in step.kwargs.items()}
            places[self.arguments + index] = step.function(*args, **kwargs)
            del args, kwargs
            for operand in step.operands:
                if operand is not None and operand not in self.results and self._last_reader[operand] == index:
                    places[operand] = None
            ended_s.append(time.perf_counter() - began_s)
        self._ended_s = ended_s
        return [places[place] for place in self.results]


class _Builder:
    """Instructions for arguments of one geometry.

    Raises:
        _NotNativeError: there are none.
    """

    def __init__(self, program: HostProgram, arguments: Sequence[_Value | None]) -> None:
        self.values = {place: value for place, value in enumerate(arguments) if value is not None}
        self.code: list[_Instruction] = []
        self.offsets: list[int] = []
        self.scratch_bytes = 0
        self._table = {place: place for place in self.values}
        self._table |= {place: len(arguments) + number for number, place in enumerate(program.results)}
        self._given = len(arguments) + len(program.results)
        for place, step in enumerate(program.steps, start=len(arguments)):
            instruction, value = self._pointwise(step) if step.pointwise else self._linear(step)
            if place not in self._table:
                self._table[place] = self._scratch(value.nbytes)
            instruction.out, self.values[place] = self._table[place], value
            self.code.append(instruction)
        _require(self.scratch_bytes <= _SCRATCH_BYTES)

    def _scratch(self, nbytes: int) -> int:
        self.offsets.append(self.scratch_bytes)
        self.scratch_bytes += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return self._given + len(self.offsets) - 1

    def _pointwise(self, step: Step) -> tuple[_Instruction, _Value]:
        places = [place for place in step.operands if place is not None]
        value = self.values[places[0]]
        alike = (self.values[place] for place in places)
        _require(value.dtype in DTYPES and all(one.dense and one[:2] == value[:2] for one in alike))
        operation = _FIRST_POINTWISE + POINTWISE.index(step.pointwise)
        second = self._table[places[1]] if len(places) > 1 else _NOWHERE
        instruction = _Instruction(operation, DTYPES.index(value.dtype), first=self._table[places[0]], second=second)
        instruction.n = value.length
        return instruction, _Value(value.shape, value.dtype, dense=True)

    def _linear(self, step: Step) -> tuple[_Instruction, _Value]:
        host = step.function
        assert isinstance(host, HostLinear)
        x_place, rows_place, bias_place = step.operands
        assert x_place is not None
        assert rows_place is not None
        x, rows = self.values[x_place], self.values[rows_place]
        _require(x.dense and x.tokens > 0 and x.dtype == rows.dtype and rows.dtype in DTYPES and rows.lines)
        reading, partial = host.kernel(x.tokens).reading, host.dim == 1
        if reading is None:
            raise _NotNativeError
        columns, width = (rows.shape[1], rows.shape[0]) if partial else rows.shape
        narrowed = host.axis != host.dim  # the range is one of the activations' columns, else of the result's
        start = host.lo if narrowed else 0
        _require(start + width <= x.shape[-1] if narrowed else width == x.shape[-1])
        _require(host.hi - host.lo == (width if narrowed else columns) and library().programs)
        taken = torch.float32 if partial else library().activations[rows.dtype]
        instruction = _Instruction(
            reading + len(Reading) * partial, DTYPES.index(rows.dtype),
            first=self._table[x_place], second=self._table[rows_place], third=_NOWHERE, wide=_NOWHERE, sums=_NOWHERE,
            x_offset=start, m=x.tokens, n=columns, k=width, ldx=x.shape[-1], ldw=rows.row_stride,
        )  # fmt: skip
        if bias_place is not None:
            instruction.third, instruction.bias_offset = self._table[bias_place], 0 if narrowed else host.lo
            bias = self.values[bias_place]  # what is None in a Linear is no argument of its program
            _require(bias.dtype == rows.dtype and bias.dense and instruction.bias_offset + columns <= bias.length)
        if taken != rows.dtype:
            instruction.wide = self._scratch(x.tokens * width * taken.itemsize)
        if partial:
            blocks = library().partial_blocks(x.tokens, columns, width)
            instruction.sums = self._scratch(blocks * x.tokens * columns * torch.float32.itemsize)
        return instruction, _Value((*x.shape[:-1], columns), rows.dtype, dense=True)


def _require(condition: bool) -> None:
    if not condition:
        raise _NotNativeError


__all__ = ["NO_WAIT", "POINTWISE", "Call", "Form", "HostProgram", "Place", "Step", "Wait", "pointwise_name"]
