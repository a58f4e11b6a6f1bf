"""Native programs compute what their operations compute one by one: layouts, sizes, dtypes, names, shapes."""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hetegen_compile.host_kernels import TILED, TILED_THROUGH_L2, VECTORISED, HostKernel, vectorised
from hetegen_compile.host_kernels.program import POINTWISE, HostProgram, Place, Step
from hetegen_compile.host_kernels.vectorised import DTYPES, Reading
from tests.host_kernels.programs import assert_equal, assert_native_as_plain, linear, mlp, native, one, part, pointwise
from tests.host_kernels.programs import random as numbers

OURS = (VECTORISED, TILED, TILED_THROUGH_L2)
kernels = pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
layouts = pytest.mark.parametrize(("dim", "axis"), [(0, 0), (0, 1), (1, 0), (1, 1)])


@kernels
@dtypes
@layouts
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6])
def test_a_part_of_a_linear(kernel: HostKernel, dtype: torch.dtype, dim: int, axis: int, tokens: int) -> None:
    for width, columns in ((1, 1), (37, 5), (5, 70), (64, 48), (131, 67)):
        cut = part(width, columns, dim=dim, axis=axis, dtype=dtype, kernel=kernel)
        x = numbers(tokens, width, dtype=dtype, seed=2)
        program, weights = one(cut)
        assert_native_as_plain(program, x, *weights)
        torch.testing.assert_close(program(x, *weights)[0], cut.exact(x).to(dtype), rtol=1e-2, atol=1e-2)
        without = HostProgram([linear(cut.host, 0, 1)], 2, (2,))
        assert_native_as_plain(without, x, cut.rows)


@kernels
@dtypes
@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_stands_between_two_linears(kernel: HostKernel, dtype: torch.dtype, name: str, tokens: int) -> None:
    for hidden in (3, 64, 97):
        up = part(41, hidden, dtype=dtype, kernel=kernel)
        down = part(hidden, 29, axis=1, dtype=dtype, kernel=kernel, seed=5)
        program, weights = mlp(up, name, down)
        assert_native_as_plain(program, numbers(tokens, 41, dtype=dtype, seed=2), *weights)


def test_linears_read_as_their_kernels_do() -> None:
    """Results do not tell the two ways in tiles apart; ``program.cpp`` numbers all as ``linear.cpp`` does."""
    enum = re.search(r"enum Reading : int64_t \{ (.*), kReadings \};", vectorised._source("linear.cpp"))
    assert enum is not None
    names = [name.removeprefix("k").lower() for name in enum[1].split(", ")]
    assert names == [reading.prefix.replace("_", "") for reading in Reading]
    found = []
    for kernel in OURS:
        for dim in (0, 1):
            cut = part(16, 8, dim=dim, kernel=kernel)
            program, weights = one(cut)
            form = program.form((numbers(1, 16), *weights))
            assert form is not None
            found.append((names[form.code[0].operation % len(names)], form.code[0].operation // len(names)))
    assert found == [(name, dim) for name in names for dim in (0, 1)]


@dtypes
@layouts
def test_two_linears_of_one_x_multiplied_with_each_other(dtype: torch.dtype, dim: int, axis: int) -> None:
    """x, the rows of three weights -> gate, its activation, up, their product, down."""
    gate, up = (part(40, 33, dim=dim, axis=axis, dtype=dtype, seed=seed) for seed in (0, 1))
    down = part(33, 21, dim=dim, axis=axis, dtype=dtype, seed=2)
    steps = [
        linear(gate.host, 0, 1), pointwise("silu", 4), linear(up.host, 0, 2), pointwise("mul", 5, 6),
        linear(down.host, 7, 3),
    ]  # fmt: skip
    program = HostProgram(steps, 4, (8,))
    assert_native_as_plain(program, numbers(3, 40, dtype=dtype, seed=9), gate.rows, up.rows, down.rows)


def test_results_in_the_order_in_which_they_are_asked_for() -> None:
    up, down = part(16, 24), part(24, 8, dim=1)
    weights = (numbers(2, 16), up.rows, up.bias, down.rows, down.bias)
    program, _ = mlp(up, "relu", down)
    results = [native(HostProgram(program.steps, 5, places), *weights) for places in ((5, 6, 7), (7, 5), (6,))]
    first, activated, last = results[0]
    assert (first.shape, activated.shape, last.shape) == ((2, 24), (2, 24), (2, 8))
    assert_equal(results[1], [last, first])
    assert_equal(results[2], [activated])
    assert_equal(results[0], HostProgram(program.steps, 5, (5, 6, 7)).plain(weights))


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (1, 2, 2, 40)], ids=len)
@layouts
def test_activations_of_any_number_of_dimensions(shape: tuple[int, ...], dim: int, axis: int) -> None:
    program, weights = one(part(40, 24, dim=dim, axis=axis))
    (found,) = native(program, numbers(*shape), *weights)
    assert found.shape == (*shape[:-1], 24)
    assert_native_as_plain(program, numbers(*shape), *weights)


def test_each_call_makes_new_results_and_reads_what_it_is_given() -> None:
    program, weights = mlp(part(16, 24), "silu", part(24, 8))
    x, other = numbers(2, 16), numbers(2, 16, seed=1)
    first = native(program, x, *weights)
    kept = [tensor.clone() for tensor in first]
    second = native(program, other, *weights)
    assert_equal(first, kept)
    assert_equal(second, program.plain((other, *weights)))
    weights[0].zero_()
    assert_equal(native(program, x, *weights), program.plain((x, *weights)))


Arguments = tuple[Tensor | None, ...]


@st.composite
def programs(draw: Callable[[Any], Any]) -> tuple[HostProgram, Arguments]:
    """Up to 6 steps that read x or any earlier result; a Linear's rows and bias are arguments of its own."""
    kinds = draw(st.lists(st.sampled_from(("linear", "linear", *POINTWISE)), min_size=1, max_size=6))
    dtype, kernel = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(OURS))
    columns = {0: draw(st.integers(1, 70))}
    arguments: list[Tensor | None] = [numbers(draw(st.integers(1, 6)), columns[0], dtype=dtype, seed=99)]
    first, steps = 1 + 2 * len(kinds), list[Step]()
    for index, kind in enumerate(kinds):
        operand = draw(st.sampled_from(sorted(columns)))
        if kind == "linear":
            out, dim, axis, biased = draw(st.tuples(st.integers(1, 70), *[st.integers(0, 1)] * 3))
            cut = part(columns[operand], out, dim=dim, axis=axis, dtype=dtype, kernel=kernel, seed=index)
            steps.append(linear(cut.host, operand, len(arguments), len(arguments) + 1 if biased else None))
            arguments += [cut.rows, cut.bias]
        else:
            out, alike = columns[operand], [place for place, wide in columns.items() if wide == columns[operand]]
            steps.append(pointwise(kind, operand, *([draw(st.sampled_from(alike))] if kind == "mul" else [])))
            arguments += [None, None]
        columns[first + index] = out
    results = draw(st.lists(st.sampled_from(range(first, first + len(steps))), min_size=1, unique=True))
    return HostProgram(steps, first, results), tuple(arguments)


@given(programs())
def test_any_program(drawn: tuple[HostProgram, Arguments]) -> None:
    program, arguments = drawn
    assert_native_as_plain(program, *arguments)


def test_threads_compute_beside_each_other() -> None:
    """What lies between the operations is each thread's own, and programs of two sizes share it one after the other."""
    sized = [mlp(part(300, size), "relu", part(size, 40)) for size in (500, 90)]
    x = numbers(4, 300)
    expected = [native(program, x, *weights) for program, weights in sized]
    failures: list[AssertionError] = []

    def compute(order: int) -> None:
        try:
            for turn in range(150):
                own, weights = sized[(turn + order) % 2]
                again = HostProgram(own.steps, own.arguments, own.results)
                assert_equal(again(x, *weights), expected[(turn + order) % 2])
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=partial(compute, order)) for order in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- step by step ------------------------------------------------------------------------------------------


def test_plain_lets_values_die_behind_their_last_reader() -> None:
    """0 -> 1 -> 2 -> 3 -> 4, where 2 is a result and the last step reads 1 again."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []

    def spy(*operands: Tensor) -> Tensor:
        alive.append([ref() is not None for ref in made])
        result = operands[0] + 1
        made.append(weakref.ref(result))
        return result

    reads = [(0,), (1,), (2,), (3, 1), (4,)]
    steps = [Step(spy, tuple(map(Place, read)), tuple(map(Place, read)), {}, "relu") for read in reads]
    results = HostProgram(steps, 1, (2, 5)).plain((numbers(2, 4),))
    assert alive[3] == [True, True, True]
    assert alive[4] == [False, True, False, True]
    assert [ref() is not None for ref in made] == [False, True, False, False, True]
    assert [result is ref() for result, ref in zip(results, (made[1], made[4]), strict=True)] == [True, True]


def test_plain_calls_each_function_as_the_graph_did() -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return numbers(1)

    x = numbers(2, 4)
    HostProgram([Step(spy, (0,), (Place(0), 0, None), {"other": Place(0), "flag": 0}, "relu")], 1, (1,)).plain((x,))
    ((args, kwargs),) = calls
    assert args[0] is kwargs["other"] is x
    assert (args[1:], kwargs["flag"]) == ((0, None), 0), "a number is no place"


def test_shares_are_of_the_last_call_and_sum_to_1() -> None:
    """The Linear takes most of the time natively, and the function where it sleeps."""
    big = part(4096, 200)

    def sleeps(x: Tensor) -> Tensor:
        time.sleep(0.05)
        return x

    program = HostProgram([linear(big.host, 0, 1), Step(sleeps, (Place(2),), (Place(2),), {}, "relu")], 2, (2, 3))
    x = numbers(1, 4096)
    assert sum(program.shares()) == pytest.approx(1.0)
    for _ in range(2):
        natively, plainly = (
            [shares_of(program, partial(compute, program), (x, big.rows)) for _ in range(3)]
            for compute in (lambda own, weights: native(own, *weights), HostProgram.plain)
        )
        assert max(linears for linears, _ in natively) > 0.5
        assert min(slept for _, slept in plainly) > 0.5


def shares_of(program: HostProgram, compute: Callable[[Arguments], object], weights: Arguments) -> list[float]:
    compute(weights)
    shares = program.shares()
    assert sum(shares) == pytest.approx(1.0)
    return shares
