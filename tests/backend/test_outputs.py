"""What the caller gets back is what eager would have given: dtype, device, shape, strides and aliasing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backend.modules import BUDGET, Linear, around, random
from tests.models.harness import compiled_like_eager, emulated


def _like_eager(body: Any, *shapes: tuple[int, ...]) -> Any:
    """Compare ``body``'s results and which of them share memory with an input or with each other."""
    model = around(body)

    def run() -> tuple[Any, list[list[bool]]]:
        inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
        with torch.no_grad():
            results = model(*inputs)
        return results, _shared([*inputs, *results])

    return compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), calls=1).compiled


def _shared(values: list[Any]) -> list[list[bool]]:
    """Which values are tensors in the same memory."""
    memory = [v.untyped_storage().data_ptr() if isinstance(v, Tensor) else object() for v in values]
    return [[one == other for other in memory] for one in memory]


def test_dtypes_and_strides() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
        y = after(before(x))
        return y.transpose(0, 1), y.half(), y.argmax(-1), y > 0, y[:, ::2], y.sum()

    _like_eager(body, (3, 64))


def test_views_of_one_result_share_memory() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
        y = after(before(x))
        return y, y.view(-1), y[1:]

    _like_eager(body, (3, 64))


def test_a_view_of_an_input_is_one() -> None:
    def body(before: Linear, after: Linear, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return after(before(x)), z.t(), x[1:]

    _, shared = _like_eager(body, (3, 64), (5, 2))
    assert shared[1][3]
    assert shared[0][4]


def test_an_input_returned_as_it_is() -> None:
    def body(before: Linear, after: Linear, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return z, after(before(x)), x

    _, shared = _like_eager(body, (3, 64), (5, 2))
    assert shared[1][2]
    assert shared[0][4]


def test_one_result_twice() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
        y = after(before(x))
        return y, y

    results, _ = _like_eager(body, (3, 64))
    assert results[0] is results[1]


def test_values_that_are_no_tensors() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> tuple[Any, ...]:
        return after(before(x)), None, x.shape[0] + 1, 2.5, "text", True

    _like_eager(body, (3, 64))


def test_no_linear_on_the_way_to_a_result() -> None:
    def body(before: Linear, after: Linear, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return after(before(x)), torch.cat([z, z + 1]), torch.arange(4), torch.tensor(3.0)

    _like_eager(body, (3, 64), (5, 2))


def test_an_activation_of_the_middle_is_a_result_too() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
        y = before(x)
        return y, after(y), y.mean(-1)

    _like_eager(body, (2, 3, 64))


def _residual_stream(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
    x += before(x)
    x += after(x)
    return x, x[1:]


def _written_through_a_view(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
    y = before(x)
    gate, value = y.chunk(2, -1)
    gate.mul_(torch.tanh(value))
    return gate, value, y, after(y)


def _computed_then_set(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
    y = before(x)
    y[0] = y[1] * 2
    return y.t(), y, after(y)


def _moved_after_it_was_computed(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
    y = before(x)
    y[0] = 0
    return torch.cat([y.t(), y.t()]), after(y)


def _views_of_views(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
    y = before(x)
    return y, y[:, :3].t(), after(y)


def _a_list_that_is_written(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
    y = before(x)
    torch._foreach_mul_([x, y], 2.0)
    return x, y, after(y)


def _an_item_of_a_list_of_one(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
    y = before(x)
    return torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y.sin(), (y,)), after(x)


def _written_in_inference_mode(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        y = before(x)
        y[0].add_(y[1])
    return after(y), y * 1


Body = Callable[[Linear, Linear, Tensor], tuple[Tensor, ...]]


@pytest.mark.parametrize(
    "body",
    [
        _residual_stream, _written_through_a_view, _computed_then_set, _moved_after_it_was_computed, _views_of_views,
        _a_list_that_is_written, _an_item_of_a_list_of_one, _written_in_inference_mode,
    ],
)  # fmt: skip
def test_what_shares_memory_that_is_computed_into(body: Body) -> None:
    """Two calls: results and the input afterwards, and who shares memory, as in eager."""
    _in_two_calls(body)


def _in_two_calls(body: Body, *, offloads: bool = True) -> Any:
    model = around(body)

    def run() -> list[Any]:
        found = []
        for seed in range(2):
            x = random(3, 64, seed=seed)
            with torch.no_grad():
                results = model(x)
            found.append((results, x, _shared([x, *results])))
        return found

    return compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), calls=1, offloads=offloads)


def test_an_input_that_is_given_other_memory() -> None:
    """No transfer of values follows that, so the graph runs on the host and says so."""

    def body(before: Linear, after: Linear, x: Tensor) -> tuple[Tensor, ...]:
        x.data = before(x)
        return x, after(x)

    (schedule,) = _in_two_calls(body, offloads=False).schedules
    assert "gives a tensor that is there other memory" in schedule.explain()
