"""Inputs and buffers written in place hold afterwards, on the host, what eager would have left."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.steps.segments import inductor_compiler, plain_compiler
from tests.backend.modules import BUDGET, Linear, around, random
from tests.models.harness import compiled_like_eager, emulated, through_inductor

STEPS = 3


def _like_eager(body: Any, make: Any, gpu_memory: int = BUDGET) -> Any:
    """Three steps on one set of inputs (``make()``), which is part of the result."""
    model = around(body)

    def run() -> tuple[Any, Any]:
        inputs = make()
        with torch.no_grad():
            results = [model(*inputs).clone() for _ in range(STEPS)]
        return results, inputs

    return compiled_like_eager(model, run, options=emulated(gpu_memory=gpu_memory))


def test_a_cache_written_by_index() -> None:
    def body(before: Linear, after: Linear, x: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        cache.index_copy_(1, position, before(x)[:, None])
        position.add_(1)
        return after(cache.sum(1))

    found = _like_eager(body, lambda: (random(2, 64), torch.zeros(2, 8, 64), torch.tensor([2])))
    assert found.compiled[1][2].item() == 2 + STEPS
    assert found.compiled[1][1][:, 2 : 2 + STEPS].abs().min() > 0


def test_random_numbers_as_many_as_something_that_is_written_has() -> None:
    """``rand_like`` reads a shape and no contents: which writes its copy on the host shows is all the same."""

    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        y = before(x)
        noisy = y + torch.rand_like(y)
        y[:, :8].mul_(1.5)
        return after(y + noisy + torch.rand_like(y))

    def seeded() -> tuple[Tensor]:
        torch.manual_seed(0)
        return (random(2, 64),)

    _like_eager(body, seeded)


def test_a_counter_and_a_mask() -> None:
    def body(before: Linear, after: Linear, x: Tensor, counter: Tensor, mask: Tensor) -> Tensor:
        counter.add_(2)
        mask[:, 0] = False
        return after(before(x) * counter) * mask

    _like_eager(body, lambda: (random(2, 64), torch.tensor(1), torch.ones(2, 64, dtype=torch.bool)))


def test_a_computed_write_is_copied_back_and_explained() -> None:
    def body(before: Linear, after: Linear, x: Tensor, state: Tensor) -> Tensor:
        state.mul_(torch.tanh(before(x)))
        return after(state)

    found = _like_eager(body, lambda: (random(2, 64), random(2, 64, seed=2)))
    assert "copied back whole" in found.schedules[-1].explain()


@pytest.mark.parametrize(
    ("rows", "whole", "part"),
    [
        pytest.param(6, slice(0, 5), slice(3, 5), id="two views"),
        pytest.param(6, slice(0, 3), slice(3, 5), id="apart"),
        pytest.param(6, slice(0, 6), slice(4, 6), id="all and a view"),
        pytest.param(8192, slice(0, 5), slice(3, 5), id="small views of much"),
    ],
)
def test_two_inputs_in_one_memory(rows: int, whole: slice, part: slice) -> None:
    def body(before: Linear, after: Linear, x: Tensor, whole: Tensor, part: Tensor) -> Tensor:
        part.mul_(torch.tanh(before(x)))
        return after(whole[:2] + 1) + whole[-2:]

    def make() -> tuple[Tensor, ...]:
        memory = random(rows, 64, seed=2)
        return random(2, 64), memory[whole], memory[part]

    _like_eager(body, make, BUDGET + rows * 64 * 4)  # what lies in one memory is mirrored as one


def test_a_cache_that_rolls() -> None:
    def body(before: Linear, after: Linear, x: Tensor, cache: Tensor) -> Tensor:
        moved = cache.roll(-1, dims=1)
        moved[:, -1] = before(x)
        cache.copy_(moved)
        return after(cache.mean(1))

    _like_eager(body, lambda: (random(2, 64), random(2, 4, 64, seed=2)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_buffer(mode: Any) -> None:
    class Counts(nn.Module):
        seen: Tensor
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))
            self.register_buffer("mean", torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            self.seen += 1
            self.mean.lerp_(y.mean(0), 0.1)
            result: Tensor = self.down(y - self.mean)
            return result

    torch.manual_seed(0)
    model = Counts().eval()

    def run() -> tuple[Any, ...]:
        model.seen.zero_()
        model.mean.zero_()
        with mode():
            results = [model(random(2, 64, seed=i)) for i in range(STEPS)]
        return results, model.seen.clone(), model.mean.clone()

    compiled_like_eager(model, run, options=emulated(gpu_memory=16 << 10))


class Normed(nn.Module):
    """A norm with statistics of its own between two Linears."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 64), norm, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """[sequences, tokens, width], in and out."""
        result: Tensor = self.down(self.norm(self.up(x).mT).mT)
        return result


@through_inductor
@pytest.mark.parametrize("compiler", [plain_compiler, inductor_compiler])
@pytest.mark.parametrize("make", [nn.BatchNorm1d, functools.partial(nn.InstanceNorm1d, track_running_stats=True)])
def test_statistics_of_a_norm_in_training(make: Callable[[int], nn.Module], compiler: Any) -> None:
    """torch writes them without a new version."""
    torch.manual_seed(0)
    model = Normed(make(64))
    before = copy.deepcopy(model.norm.state_dict())

    def run() -> Any:
        model.norm.load_state_dict(before)
        with torch.no_grad():
            results = [model.train()(random(2, 3, 64, seed=i)) for i in range(STEPS)] + [model.eval()(random(2, 3, 64))]
        return results, [buffer.clone() for buffer in model.norm.buffers()]

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=23 << 10), compiler=compiler)
    assert not torch.equal(found.compiled[1][0], before["running_mean"])


def test_a_tensor_made_in_inference_mode_is_written() -> None:
    def body(before: Linear, after: Linear, x: Tensor, cache: Tensor) -> Tensor:
        cache.mul_(0.5).add_(before(x))
        return after(cache)

    model = around(body)

    def run() -> tuple[Any, ...]:
        with torch.inference_mode():
            cache = torch.ones(2, 64)
            return [model(random(2, 64), cache).clone() for _ in range(STEPS)], cache.clone()

    compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET))


def test_a_part_of_a_value_is_written_with_itself() -> None:
    """``y[1:] += ...`` reads and writes one memory in one node, after an in-place addition to its view."""

    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        y = before(x) * 2
        y[1:] += y[0]
        return after(y)

    model = around(body)

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(3, 64))
        return result

    compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), calls=1)


def test_a_state_that_one_graph_overwrites_and_another_reads() -> None:
    """A prompt overwrites what single tokens go on from, which its accelerator has no use for: only the host writes."""

    def body(before: Linear, after: Linear, x: Tensor, state: Tensor) -> Tensor:
        y = before(x)
        if x.shape[0] > 1:
            state.copy_(y.mean(0))
            return after(y)
        y = y + state
        state.mul_(0.5)
        return after(y)

    model = around(body)

    def run() -> tuple[Any, ...]:
        state = torch.ones(64)
        with torch.no_grad():
            results = [model(random(rows, 64, seed=i), state).clone() for i, rows in enumerate((1, 1, 3, 1, 1, 3, 1))]
        return results, state

    compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), calls=2)
