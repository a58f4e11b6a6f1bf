"""Trips that read weights ahead: how much, until when, and that what they compute stays the same bits."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hetegen_compile.host_kernels import LINEAR, TILED, TILED_THROUGH_L2, VECTORISED, HostKernel, HostLinear
from hetegen_compile.host_kernels.program import NO_WAIT, Call, HostProgram, Wait
from hetegen_compile.host_kernels.vectorised import library
from tests.host_kernels.programs import linear, mlp, one, part, pointwise
from tests.host_kernels.programs import random as numbers

WIDTH, ROWS = 200, 611
PIECE_ROWS = 24
NOT_YET = 600
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def forever() -> Wait:
    """An event that is never over, as far as reading ahead knows."""
    return Wait(None, library().still_pending, 1)


def call(program: HostProgram, arguments: Sequence[Tensor], ahead_bytes: int) -> tuple[Call, list[Tensor]]:
    own = HostProgram(program.steps, program.arguments, program.results, ahead_bytes)
    form = own.form(arguments)
    assert form is not None
    results = [torch.full(value.shape, torch.nan, dtype=value.dtype) for value in form.results]
    return Call(form, arguments, results), results


def assert_same_bits(program: HostProgram, arguments: Sequence[Tensor], ahead_bytes: int, wait: Wait) -> int:
    """What the program computes does not depend on reading ahead; the bytes that were read."""
    plain, expected = call(program, arguments, 0)
    assert plain.trip(wait) == 0
    assert plain.read_bytes == 0
    ahead, found = call(program, arguments, ahead_bytes)
    assert ahead.trip(wait) == 0
    for one_found, one_expected in zip(found, expected, strict=True):
        assert not one_expected.isnan().any()
        assert torch.equal(one_found, one_expected)
    return ahead.read_bytes


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [VECTORISED, TILED, TILED_THROUGH_L2], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits(dtype: torch.dtype, kernel: HostKernel, tokens: int, count: int) -> None:
    program, given = mlp(
        part(WIDTH, ROWS, dtype=dtype, kernel=kernel), "relu", part(ROWS, 64, dtype=dtype, kernel=kernel, axis=1)
    )
    piece_bytes = PIECE_ROWS * WIDTH * dtype.itemsize
    with threads(count):
        x = numbers(tokens, WIDTH, dtype=dtype)
        assert assert_same_bits(program, (x, *given), 7 * piece_bytes + 1, forever()) == 7 * piece_bytes


def test_a_weight_is_read_as_far_as_there_are_pieces() -> None:
    program, given = one(part(WIDTH, ROWS))
    with threads(2):
        read = assert_same_bits(program, (numbers(1, WIDTH), *given), 1 << 30, forever())
    assert read == ROWS // PIECE_ROWS * PIECE_ROWS * WIDTH * 4


def test_rows_with_gaps() -> None:
    """A block's Linear that has some of its columns on the host."""
    program, given = one(part(WIDTH, ROWS, axis=1))
    assert given[0].stride(0) > given[0].shape[1]
    with threads(2):
        assert assert_same_bits(program, (numbers(1, WIDTH), *given), 1 << 16, forever()) > 0


def gate_and_up(gate: int = ROWS) -> tuple[HostProgram, tuple[Tensor, ...]]:
    first, second = part(WIDTH, gate), part(WIDTH, gate, seed=5)
    steps = [linear(first.host, 0, 1, 2), linear(second.host, 0, 3, 4), pointwise("mul", 5, 6)]
    return HostProgram(steps, 5, (7,)), (first.rows, first.bias, second.rows, second.bias)


def test_what_is_left_is_read_of_the_next_linear() -> None:
    program, given = gate_and_up()
    nbytes = (ROWS // PIECE_ROWS + 3) * PIECE_ROWS * WIDTH * 4
    with threads(2):
        assert assert_same_bits(program, (numbers(1, WIDTH), *given), nbytes, forever()) == nbytes


def behind_relu() -> tuple[HostProgram, tuple[Tensor, ...]]:
    own = part(WIDTH, ROWS)
    return HostProgram([pointwise("relu", 0), linear(own.host, 3, 1, 2)], 3, (4,)), (own.rows, own.bias)


@pytest.mark.parametrize(
    "made", [behind_relu, lambda: one(part(WIDTH, ROWS, dim=1)), lambda: one(part(WIDTH, 32))],
    ids=["what begins with something else", "partial sums", "what one thread computes"],
)  # fmt: skip
def test_nothing_is_read_ahead_of(made: Callable[[], tuple[HostProgram, tuple[Tensor, ...]]]) -> None:
    program, given = made()
    with threads(2):
        assert assert_same_bits(program, (numbers(1, WIDTH), *given), 1 << 30, forever()) == 0


class Event:
    """One that has happened when it has been asked so often; ``failure``: what it and waiting for it return then.

    ``then``: is called when it is asked for the last time.
    """

    HANDLE = 4321

    def __init__(self, over_after: int, failure: int = 0, then: Callable[[], None] = lambda: None) -> None:
        self.asked, self.waited, self._over_after, self._failure = 0, 0, over_after, failure
        self._then = then
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
        self._functions = function(self._wait), function(self._pending)
        wait, pending = (ctypes.cast(one, ctypes.c_void_p).value for one in self._functions)
        self.wait = Wait(wait, pending, NOT_YET)

    def _wait(self, handle: int | None) -> int:
        assert handle == self.HANDLE
        self.waited += 1
        return self._failure

    def _pending(self, handle: int | None) -> int:
        assert handle == self.HANDLE
        self.asked += 1
        if self.asked <= self._over_after:
            return NOT_YET
        self._then()
        return self._failure


@pytest.mark.parametrize("count", [1, 2])
def test_reading_ends_when_the_activations_are_there(count: int) -> None:
    program, given = one(part(WIDTH, 4 * ROWS))
    made, (found,) = call(program, (numbers(1, WIDTH), *given), 1 << 30)
    plain, (expected,) = call(program, (numbers(1, WIDTH), *given), 0)
    plain.trip()
    event = Event(over_after=3)
    with threads(count):
        assert made.trip(event.wait, Event.HANDLE) == 0
    assert (event.asked, event.waited) == (4, 0), "what is known to have happened is not waited for"
    assert 0 < made.read_bytes < given[0].nbytes
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("reading", "computing"), [(1, 3), (3, 1), (2, 4), (4, 2)])
def test_other_threads_may_compute_than_have_read(reading: int, computing: int) -> None:
    program, given = gate_and_up()
    plain, (expected,) = call(program, (numbers(1, WIDTH), *given), 0)
    plain.trip()
    made, (found,) = call(program, (numbers(1, WIDTH), *given), 1 << 30)
    event = Event(over_after=5, then=lambda: torch.set_num_threads(computing))
    with threads(reading):
        assert made.trip(event.wait, Event.HANDLE) == 0
    assert made.read_bytes > 0
    assert torch.equal(found, expected)


def test_nothing_is_read_of_what_is_there() -> None:
    program, given = one(part(WIDTH, ROWS))
    made, _ = call(program, (numbers(1, WIDTH), *given), 1 << 30)
    event = Event(over_after=0)
    assert made.trip(event.wait, Event.HANDLE) == 0
    assert (event.asked, event.waited, made.read_bytes) == (1, 0, 0)
    assert made.trip(NO_WAIT) == 0
    assert made.read_bytes == 0


def test_nothing_is_computed_where_waiting_fails() -> None:
    program, given = one(part(WIDTH, ROWS))
    made, (found,) = call(program, (numbers(1, WIDTH), *given), 1 << 16)
    event = Event(over_after=1, failure=700)
    assert made.trip(event.wait, Event.HANDLE) == 700
    assert event.waited == 1
    assert found.isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")
@pytest.mark.parametrize("ahead_bytes", [0, 5 * PIECE_ROWS * 1024 * 4])
def test_what_is_read_is_touched(ahead_bytes: int) -> None:
    """Shared memory that nobody has touched has no pages: reading makes them."""
    rows, width = 480, 1024
    memory = mmap.mmap(-1, rows * width * 4)
    try:
        weights = torch.frombuffer(memory, dtype=torch.float32).view(rows, width)
        program, _ = one(replace(part(width, rows), host=HostLinear(0, rows, 0, ((math.inf, VECTORISED),))))
        made, _ = call(program, (numbers(1, width), weights, numbers(rows)), ahead_bytes)
        assert made.trip(Event(over_after=10**6, failure=700).wait, Event.HANDLE) == 700, "nothing is computed"
        assert pages_there(weights) == ahead_bytes // mmap.PAGESIZE
        assert made.read_bytes == ahead_bytes
    finally:
        del weights, made
        memory.close()


def pages_there(tensor: Tensor) -> int:
    found = (ctypes.c_ubyte * (tensor.nbytes // mmap.PAGESIZE))()
    address, length = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
    assert ctypes.CDLL(None).mincore(address, length, found) == 0
    return sum(one & 1 for one in found)


def test_torchs_kernels_have_no_trips() -> None:
    program, given = one(part(WIDTH, ROWS, kernel=LINEAR))
    assert HostProgram(program.steps, 3, (3,), 1 << 20).form((numbers(1, WIDTH), *given)) is None
