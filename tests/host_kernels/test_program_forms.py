"""What has no native form is computed operation by operation; forms that are kept are of one geometry, and few."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.host_kernels import LINEAR, VECTORISED, HostLinear, bind_kernels
from hetegen_compile.host_kernels.program import _FORMS, _SCRATCH_BYTES, Call, HostProgram, Step
from tests.host_kernels.programs import assert_equal, assert_native_as_plain, linear, mlp, native, one, part, pointwise
from tests.host_kernels.programs import random as numbers

UP, DOWN = part(16, 24), part(24, 8)
PROGRAM, GIVEN = mlp(UP, "relu", DOWN)


def fresh() -> HostProgram:
    """One that has no forms yet."""
    return HostProgram(PROGRAM.steps, PROGRAM.arguments, PROGRAM.results)


def exact(x: Tensor) -> Tensor:
    return DOWN.exact(UP.exact(x).relu())


def assert_not_native(program: HostProgram, *arguments: Tensor | None) -> list[Tensor]:
    """The results, which the program does compute."""
    assert program.form(arguments) is None
    return program(*arguments)


def with_kernels(*kernels: tuple[float, str]) -> HostProgram:
    """The MLP with kernels by the number of tokens."""
    choice = {"float32": KernelChoice(kernels)}
    up, down = (bind_kernels(choice, own.rows, own.host.lo, own.host.hi, 0) for own in (UP, DOWN))
    return HostProgram([linear(up, 0, 1, 2), pointwise("relu", 5), linear(down, 6, 3, 4)], 5, (7,))


def test_as_many_tokens_as_f_linear_is_chosen_for() -> None:
    program = with_kernels((2.0, "vectorised"), (8.0, "F.linear"))
    few, many = numbers(2, 16), numbers(2, 4, 16)
    assert_native_as_plain(program, few, *GIVEN)
    (found,) = assert_not_native(program, many, *GIVEN)
    torch.testing.assert_close(found, exact(many).float())


def test_activations_of_another_dtype_are_refused_as_torch_does() -> None:
    program, given = mlp(part(16, 24, dtype=torch.bfloat16), "relu", part(24, 8, dtype=torch.bfloat16))
    native(program, numbers(2, 16, dtype=torch.bfloat16), *given)
    assert program.form((numbers(2, 16), *given)) is None
    with pytest.raises(RuntimeError, match="dtype"):
        program(numbers(2, 16), *given)


def test_autocast_is_torchs() -> None:
    program, x = fresh(), numbers(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = assert_not_native(program, x, *GIVEN)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(x), rtol=3e-2, atol=3e-2)
    assert_equal(native(program, x, *GIVEN), program.plain((x, *GIVEN)))


@pytest.mark.parametrize(
    "strided",
    [lambda: numbers(4, 32)[:, ::2], lambda: numbers(16, 4).t(), lambda: numbers(4, 20)[:, 2:18]],
    ids=["every other", "transposed", "narrowed"],
)
def test_activations_that_are_not_contiguous(strided: Callable[[], Tensor]) -> None:
    program, x = fresh(), strided()
    assert_native_as_plain(program, x.contiguous(), *GIVEN)
    (found,) = assert_not_native(program, x, *GIVEN)
    torch.testing.assert_close(found, exact(x).float())
    assert_native_as_plain(program, x.contiguous(), *GIVEN)


def test_what_is_not_contiguous_may_also_be_read_by_the_functions() -> None:
    program = HostProgram([linear(UP.host, 0, 1), pointwise("mul", 3, 2)], 3, (4,))
    x, scale = numbers(2, 16), numbers(24, 2).t()
    (found,) = assert_not_native(program, x, UP.rows, scale)
    torch.testing.assert_close(found, F.linear(x, UP.rows) * scale)
    assert_native_as_plain(program, x, UP.rows, scale.contiguous())


def test_a_weight_whose_rows_are_not_contiguous() -> None:
    rows, x = numbers(16, 24).t(), numbers(2, 16)
    assert HostProgram([linear(HostLinear(0, 24, 0, ((math.inf, VECTORISED),)), 0, 1)], 2, (2,)).form((x, rows)) is None
    bound = bind_kernels({"float32": KernelChoice(((1.0, "vectorised"),))}, rows, 0, 24, 0)
    (found,) = assert_not_native(HostProgram([linear(bound, 0, 1)], 2, (2,)), x, rows)
    torch.testing.assert_close(found, F.linear(x, rows))


def test_no_tokens() -> None:
    (found,) = assert_not_native(fresh(), numbers(2, 16)[:0], *GIVEN)
    assert found.shape == (0, 8)


@pytest.mark.parametrize("scale", [numbers(24), numbers(2, 1), numbers(1, 2, 24), numbers(2, 24).bfloat16()], ids=str)
def test_a_product_that_is_broadcast_or_promoted(scale: Tensor) -> None:
    program = HostProgram([linear(UP.host, 0, 1), pointwise("mul", 3, 2)], 3, (4,))
    x = numbers(2, 16)
    (found,) = assert_not_native(program, x, UP.rows, scale)
    torch.testing.assert_close(found, F.linear(x, UP.rows) * scale)


def test_functions_of_what_is_no_number_of_ours() -> None:
    for x in (numbers(2, 24, dtype=torch.float64), torch.tensor([[-1, 1]])):
        (found,) = assert_not_native(HostProgram([pointwise("relu", 0)], 1, (1,)), x)
        assert_equal([found], [x.relu()])


def test_weights_that_do_not_fit() -> None:
    """Their numbers are refused before anything is read: more columns than x has, less, a range that is another's."""
    x = numbers(2, 16)
    for dim, axis in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cut = part(16, 24, dim=dim, axis=axis)
        program, _ = one(cut)
        native(program, x, cut.rows, cut.bias)
        short = numbers(2, cut.host.hi - 1 if dim != axis else 15)
        assert program.form((short, cut.rows, cut.bias)) is None
        other, _ = one(part(16, 24, dim=dim, axis=axis))
        assert other.form((x, cut.rows.narrow(axis, 0, 2), cut.bias)) is None
        for bias in (cut.bias[:-3], cut.bias.bfloat16(), numbers(99)[::2]):
            another, _ = one(cut)
            assert another.form((x, cut.rows, bias)) is None


def test_one_linear_of_torchs_makes_all_of_it_torchs() -> None:
    program, given = mlp(UP, "silu", part(24, 8, kernel=LINEAR))
    x = numbers(2, 16)
    assert_equal(assert_not_native(program, x, *given), program.plain((x, *given)))


def test_few_forms_are_kept() -> None:
    program = fresh()
    for tokens in range(1, 2 * _FORMS + 2):
        x = numbers(tokens, 16)
        (found,) = native(program, x, *GIVEN)
        torch.testing.assert_close(found, exact(x).float())
        assert len(program._forms) <= _FORMS
    form = program.form((x, *GIVEN))
    assert form is not None
    assert program.form((numbers(tokens, 16, seed=1), *GIVEN)) is form


def test_a_form_writes_into_tensors_that_fit() -> None:
    x = numbers(2, 16)
    program = HostProgram(PROGRAM.steps, 5, (6, 7))
    form = program.form((x, *GIVEN))
    assert form is not None
    given = [torch.full((2, 24), 7.0), torch.full((2, 8), 7.0)]
    assert form.takes(given)
    wide = torch.empty(2, 16)[:, ::2]
    others = ([given[0]], [*given, x], given[::-1], [given[0], wide], [given[0].bfloat16(), given[1]])
    assert not any(map(form.takes, others))
    Call(form, (x, *GIVEN), given).run()
    assert_equal(given, program.plain((x, *GIVEN)))


def test_calls_of_one_form_do_not_know_of_each_other() -> None:
    """Two are under way where a worker is behind."""
    program = HostProgram(PROGRAM.steps, 5, (7,))
    xs = [numbers(1, 16, seed=seed) for seed in range(2)]
    form = program.form((xs[0], *GIVEN))
    assert form is not None
    found = [[torch.empty(1, 8)] for _ in xs]
    calls = [Call(form, (x, *GIVEN), results) for x, results in zip(xs, found, strict=True)]
    for call in calls:
        call.run()
    for x, results in zip(xs, found, strict=True):
        assert_equal(results, program.plain((x, *GIVEN)))


def test_weights_of_another_geometry_have_a_form_of_their_own() -> None:
    program, x = fresh(), numbers(1, 16)
    up, *rest = GIVEN
    assert isinstance(up, Tensor)
    apart = torch.zeros(up.shape[0], 2 * up.shape[1])[:, : up.shape[1]].copy_(up)
    for rows in (up, apart, up):
        (found,) = native(program, x, rows, *rest)
        torch.testing.assert_close(found, exact(x).float())
    assert len(program._forms) == 2


def test_what_would_take_much_memory_is_not_native() -> None:
    program = fresh()
    tokens = _SCRATCH_BYTES // (24 * torch.float32.itemsize) + 1  # of the first Linear's result alone
    assert program.form((torch.zeros(tokens, 16), *GIVEN)) is None
    assert program.form((torch.zeros(4, 16), *GIVEN)) is not None


def test_steps_without_a_linear() -> None:
    """x * x and its activation, of one size and another."""
    program = HostProgram([pointwise("mul", 0, 0), pointwise("silu", 1)], 1, (2,))
    for shape in ((3,), (2, 5), (70,)):
        assert_native_as_plain(program, numbers(*shape))


def test_a_step_that_is_given_other_arguments_still_has_its_function() -> None:
    """``relu(x, inplace=False)``: False is no tensor."""
    step = Step(F.relu, pointwise("relu", 0).operands, (*pointwise("relu", 0).args, False), {}, "relu")
    assert_native_as_plain(HostProgram([step], 1, (1,)), numbers(3, 5))
