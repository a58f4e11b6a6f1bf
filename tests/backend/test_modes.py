"""Autocast, random numbers and threads around a compiled model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hetegen_compile
from hetegen_compile.steps import run_step
from hetegen_compile.steps.segments import inductor_compiler, plain_compiler
from tests.backend.modules import BUDGET, WIDTH, Linear, Mlp, around, plain, random
from tests.models.harness import RecordingBackend, compiled_like_eager, emulated, through_inductor


def _run(model: nn.Module, *inputs: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return [model(*inputs) for _ in range(3)]

    return run


@through_inductor
@pytest.mark.parametrize("compiler", [plain_compiler, inductor_compiler])
def test_autocast_around_the_call(compiler: Any) -> None:
    model = around(plain)
    step = _run(model, random(3, 64))

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return step()

    def close(result: Any, expected: Any) -> None:
        for one, other in zip(result, expected, strict=True):
            assert one.dtype == other.dtype == torch.bfloat16
            torch.testing.assert_close(one, other, rtol=1.6e-2, atol=4e-3)

    options = emulated(gpu_memory=40 << 10)  # half-precision copies of weights are workspace
    found = compiled_like_eager(model, run, options=options, calls=1, compiler=compiler, compare=close)
    with torch.no_grad():
        assert model(random(3, 64)).dtype == torch.float32, "without autocast the model is traced again"
    assert len(found.backend.graphs) == 2


@pytest.mark.parametrize("split", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_the_bias_of_an_in_out_weight_is_cast_as_well(split: float) -> None:
    model = Conv1D(64, 64).eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(random(3, 64))
        backend = RecordingBackend()
        found = torch.compile(model, backend=backend, options=emulated(gpu_memory=BUDGET, split=split))(random(3, 64))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=4e-3)
    assert backend.accelerator.counters.trips_up or split == 0.0


def test_autocast_inside_the_forward() -> None:
    rest = Mlp(6)

    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = before(x)
        result: Tensor = rest(after(y.float()))
        return result

    def close(result: Any, expected: Any) -> None:
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1.6e-2, atol=4e-3)

    model = around(body)
    options = emulated(gpu_memory=72 << 10)  # the Linears under autocast need not be split: nothing is cut there
    compiled_like_eager(model, _run(model, random(3, 64)), options=options, calls=1, compare=close)


def test_a_step_is_below_autograd_and_its_writes_have_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[tuple[bool, bool]] = set()
    running, keys = run_step._run, torch._C.DispatchKey

    def run_noted(*arguments: Any) -> Any:
        excluded = torch._C._dispatch_tls_local_exclude_set()
        found.add((excluded.has(keys.AutogradFunctionality), excluded.has(keys.ADInplaceOrView)))
        return running(*arguments)

    monkeypatch.setattr(run_step, "_run", run_noted)
    counted = nn.Parameter(torch.zeros(64))

    def body(before: Linear, after: Linear, x: Tensor, other: Tensor) -> Tensor:
        y = before(x)
        for one in (counted, other):
            one.add_(y.mean(0))
        return after(y + counted + other)

    def run() -> Any:
        other, counted.grad = torch.zeros(64), None
        with torch.no_grad():
            counted.zero_()
            versions = counted._version, other._version
            result = model(random(3, 64), other)
        assert (counted._version - versions[0], other._version - versions[1]) == (1, 1)
        nn.functional.linear(result, counted[None]).sum().backward()
        assert counted.grad is not None
        return [result, counted.detach().clone(), other, counted.grad.clone()]

    model = around(body)
    compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET))
    assert found == {(True, False)}


def test_a_custom_operator_has_autograd_around_it() -> None:
    """One that is registered with autograd alone would not be found below it."""
    with torch.library._scoped_library("hetegen_tests", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "Autograd")
        library.impl("twice", torch.empty_like, "Meta")

        def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
            return after(torch.ops.hetegen_tests.twice(before(x)))

        model = around(body)
        compiled_like_eager(model, _run(model, random(3, 64)), options=emulated(gpu_memory=BUDGET))


def test_dropout_does_nothing_in_evaluation() -> None:
    dropout = nn.Dropout(0.5).eval()

    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        return after(dropout(before(x)))

    model = around(body)
    compiled_like_eager(model, _run(model, random(3, 64)), options=emulated(gpu_memory=BUDGET), calls=1)


def test_random_numbers_are_those_of_eager() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        y = before(x) + torch.rand(3, 64)
        return after(torch.nn.functional.dropout(y, 0.5, training=True)) * torch.randn_like(y)

    model = around(body)
    found = compiled_like_eager(model, _run(model, random(3, 64)), options=emulated(gpu_memory=BUDGET), calls=1)
    assert not torch.allclose(found.compiled[0], found.compiled[1])


def test_a_linear_whose_size_comes_from_data() -> None:
    def body(before: Linear, after: Linear, x: Tensor, count: Tensor) -> Tensor:
        return after(before(x) * count.item())

    model = around(body)
    run = _run(model, random(3, 64), torch.tensor(2.0))
    compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET))


def test_guards_on_modules_may_be_left_out() -> None:
    """torch's own option, which the README names, beside ours: new weights in place are still seen."""
    model = Mlp(2).eval()
    options = {**emulated(gpu_memory=BUDGET), "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled = torch.compile(model, backend="hetegen", options=options)
    for seed in range(3):
        x = random(2, WIDTH, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
            next(model.parameters()).mul_(0.5)
    schedule = hetegen_compile.schedules()[-1]
    assert schedule.host_bytes > 0
    assert schedule.streamed_bytes > 0


def test_threads_take_turns() -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    inputs = [random(2, 64, seed=seed) for seed in range(2)]
    found = compiled_like_eager(model, _run(model, inputs[0]), options=emulated(gpu_memory=BUDGET), calls=1)
    with torch.no_grad():
        expected = [model.forward(x) for x in inputs]
    results: dict[int, list[Tensor]] = {0: [], 1: []}
    together = threading.Barrier(2)

    def work(i: int) -> None:
        together.wait()
        with torch.no_grad():
            results[i] += [model(inputs[i]) for _ in range(8)]

    threads = [threading.Thread(target=work, args=(i,)) for i in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(found) for found in results.values()] == [8, 8]
    for i, tensors in results.items():
        for tensor in tensors:
            torch.testing.assert_close(tensor, expected[i])
    assert sum(len(schedule.step_times_s) for schedule in found.schedules) == 3 + 2 * 8
