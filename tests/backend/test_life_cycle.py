"""What is made goes away again, and what went wrong in one call leaves the next one working."""

from __future__ import annotations

import contextlib
import gc
import resource
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.accelerators.base import Op
from hetegen_compile.errors import AcceleratorError
from hetegen_compile.runtime import live_runtimes
from tests.backend.modules import BUDGET, WIDTH, Linear, Mlp, around, plain, random
from tests.models.architectures import prompts, tiny_model
from tests.models.harness import RecordingBackend, emulated, live_threads

REPEATS = 20
TIMES = 4


def _resident_bytes() -> int:
    """Of this process, from the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _reset(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return model


def _another(model: nn.Module) -> nn.Module:
    del model
    torch.manual_seed(0)
    return Mlp(2, 256).eval()


def _same(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize("between", [_reset, _another, _same])
def test_memory_and_threads_level_off(between: Callable[[nn.Module], nn.Module]) -> None:
    """Dynamo reset, the model deleted, the model compiled again: 20 times each."""
    model, x = _another(nn.Identity()), random(3, 256)
    held, threads, resident = [], [], []
    accelerators: list[weakref.ref[Any]] = []
    for _ in range(REPEATS):
        backend = RecordingBackend()
        model.compile(backend=backend, options=emulated(gpu_memory=400 << 10, seed=None))
        with torch.no_grad():
            for _ in range(2):
                model(x)
        held.append(sum(backend.accelerator.counters.held_bytes.values()))
        accelerators.append(weakref.ref(backend.accelerator))
        del backend
        model = between(model)
        gc.collect()
        threads.append(len(live_threads()))
        resident.append(_resident_bytes())
    assert max(held) <= 400 << 10
    assert held[-1] <= held[1]
    assert max(threads[1:]) <= max(3, threads[1])
    assert len({id(reference()) for reference in accelerators if reference() is not None}) <= 1
    growth = resident[-1] - resident[REPEATS // 2]
    assert growth < REPEATS * (2 * 256 * 256 * 4), f"{growth} bytes more after {REPEATS // 2} repetitions"


def test_nothing_is_left_after_the_last_model() -> None:
    model = Mlp().eval()
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET, seed=7))
    with torch.no_grad():
        model(random(2, WIDTH))
    accelerator = backend.accelerator
    assert isinstance(accelerator, EmulatedAccelerator)
    counters = accelerator.counters
    runtime = weakref.ref(next(one for one in live_runtimes() if one.accelerator is accelerator))
    threads = [stream.thread for stream in accelerator._engine._streams.values()]
    assert accelerator.pinned_bytes > 0
    pins = accelerator._pins
    del accelerator, backend, model
    torch._dynamo.reset()
    gc.collect()
    assert runtime() is None
    assert sum(counters.held_bytes.values()) == 0
    assert pins.pinned_bytes == 0
    assert not any(thread.is_alive() for thread in threads)


class Branches(nn.Module):
    """A graph break in what the model's forward calls: Dynamo keeps the graph before it, whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.body = around(_branches)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x) + 1
        return result


def _branches(before: Linear, after: Linear, x: Tensor) -> Tensor:
    y = before(x)
    return x if y.sum().item() > 1e9 else after(y)


def test_a_reset_frees_what_dynamo_keeps() -> None:
    """Again and again: threads, memory of the accelerator and pins are as after the first."""
    held, threads = [], []
    for _ in range(TIMES):
        model, backend = Branches().eval(), RecordingBackend()
        model.compile(backend=backend, options=emulated(gpu_memory=BUDGET, seed=None))
        with torch.no_grad():
            torch.testing.assert_close(model(random(2, WIDTH)), model.forward(random(2, WIDTH)), rtol=1e-4, atol=1e-5)
        accelerator = backend.accelerator
        assert isinstance(accelerator, EmulatedAccelerator)
        counters, pins = accelerator.counters, accelerator._pins
        assert counters.uploaded_bytes["weights"] > 0
        assert pins.pinned_bytes > 0
        kept = weakref.ref(backend.graphs[0])
        del accelerator, backend, model
        torch._dynamo.reset()
        gc.collect()
        assert kept() is not None, "Dynamo lets go of it now: this test asks for nothing any more"
        held.append(sum(counters.held_bytes.values()) + pins.pinned_bytes)
        threads.append(len(live_threads()))
    assert held == [0] * TIMES
    assert threads == [threads[0]] * TIMES


def test_a_graph_that_was_released_works_when_it_is_called() -> None:
    """As a thread does that was in the middle of the model when another one reset Dynamo."""
    model, x, backend = around(plain), random(2, WIDTH), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET, seed=None))
    with torch.no_grad():
        expected = model.forward(x)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            before = backend.graphs[0].runtime
            backend.reset()
            assert backend.graphs[0].runtime.accelerator is before.accelerator, "kept as long as somebody has it"
            del before
            backend.graphs[0].release()
            gc.collect()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(backend.graphs) == 1
    assert backend.accelerator.counters.uploaded_bytes["weights"] > 0


def test_two_threads_call_the_same_model() -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    inputs = [random(2, WIDTH, seed=seed) for seed in range(2)]
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    found[thread].append(model(inputs[thread]))
        except BaseException as error:
            errors.append(error)

    with torch.no_grad():
        expected = [model(x) for x in inputs]
        model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=BUDGET))
        model(inputs[0])
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    for number, results in found.items():
        assert len(results) == 20
        for result in results:
            torch.testing.assert_close(result, expected[number], rtol=1e-4, atol=1e-5)


class Interrupt:
    """Ctrl-C in the place of the n-th call of a method of the accelerator; the method is back behind the ``with``."""

    def __init__(self, owner: Any, name: str, call: int) -> None:
        self.left = call
        self._owner, self._name, self._method = owner, name, getattr(owner, name)

    def __enter__(self) -> Interrupt:
        setattr(self._owner, self._name, self)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self._method(*args, **kwargs)


@pytest.mark.parametrize("call", [1, 4, 11])
@pytest.mark.parametrize("where", ["submit", "drain_step"])
def test_an_interrupted_step_leaves_the_next_one_working(where: str, call: int) -> None:
    torch.manual_seed(0)
    model, x, backend = Mlp().eval(), random(2, WIDTH), RecordingBackend()
    with torch.no_grad():
        expected = model(x)
        model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
        for _ in range(2):
            model(x)
        accelerator = backend.accelerator
        assert isinstance(accelerator, EmulatedAccelerator)
        interrupted = 0
        with Interrupt(accelerator._engine, where, call) as interrupt:
            for _ in range(12):
                try:
                    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
                except KeyboardInterrupt:
                    interrupted += 1
        assert interrupted == 1
        assert interrupt.left < 0
        assert accelerator.counters.peak_bytes <= BUDGET


def test_a_second_interrupt_leaves_no_mirror_of_what_the_first_step_wrote() -> None:
    """The accelerator has written its copy of a cache, the host has not, and the wait for the streams is cut short."""

    def body(before: Linear, after: Linear, x: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        cache.index_copy_(1, position, before(x)[:, None])
        position.add_(1)
        return after(cache.sum(1))

    model, backend, apart = around(body), RecordingBackend(), 0
    inputs = random(2, WIDTH), torch.zeros(2, 64, WIDTH), torch.tensor([2])
    model.compile(backend=backend, options=emulated(gpu_memory=3 * BUDGET, seed=None))
    with torch.no_grad():
        model(*inputs)
        engine = backend.accelerator._engine  # type: ignore[attr-defined]
        for call in range(1, 40, 3):
            first, second = Interrupt(engine, "submit", call), Interrupt(engine, "drain", 1)
            with first, second, contextlib.suppress(KeyboardInterrupt):
                model(*inputs)
            apart += first.left <= 0 and second.left <= 0
            expected = model.forward(*[one.clone() for one in inputs])
            torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert apart > 3


def test_an_interrupted_generation_can_be_started_again() -> None:
    model, inputs, backend = tiny_model("llama"), prompts(1), RecordingBackend()
    config = {"cache_implementation": "static", "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **config)  # type: ignore[operator]
    model.compile(backend=backend, options=emulated(gpu_memory=200 << 10))
    torch.testing.assert_close(model.generate(**inputs, **config), expected)  # type: ignore[operator]
    engine = backend.accelerator._engine  # type: ignore[attr-defined]
    with Interrupt(engine, "submit", 150), pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, **config)  # type: ignore[operator]
    torch.testing.assert_close(model.generate(**inputs, **config), expected)  # type: ignore[operator]


def test_an_error_in_a_streams_work_names_the_node_and_the_next_call_works() -> None:
    torch.manual_seed(0)
    model, x, backend = Mlp().eval(), random(2, WIDTH), RecordingBackend()
    with torch.no_grad():
        expected = model(x)
        model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
        model(x)
        accelerator = backend.accelerator
        assert isinstance(accelerator, EmulatedAccelerator)
        names: list[str] = []
        work = accelerator._work.call

        def fail(op: Op, call: Any, issued: Any) -> None:
            names.append(op.name)
            if len(names) == 3:
                raise ValueError("a kernel that fails")
            work(op, call, issued)

        accelerator._work.call = fail  # type: ignore[method-assign]
        with pytest.raises(AcceleratorError, match="a kernel that fails") as error:
            model(x)
        assert str(error.value).startswith(names[2])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
