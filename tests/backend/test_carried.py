"""Prefetches carried from one step into the next: values, bytes, changed weights, other plans, faults, the end."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.compiled import CompiledGraph
from hetegen_compile.errors import AcceleratorError
from tests.backend.modules import WIDTH, Mlp, random
from tests.models.architectures import tiny_model
from tests.models.harness import (
    RecordingBackend,
    assert_like_eager,
    assert_offloaded,
    emulated,
    half_the_weights,
    live_threads,
)

BUDGET = 40 << 10
"""Bytes: a ring of two half weights or so, activations, and some weights resident."""

STEPS = 6


class Compiled:
    """An Mlp compiled with half of its rows on the host, and what its steps leave behind."""

    def __init__(self, layers: int = 6, *, dynamic: bool | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Mlp(layers).eval()
        self.backend = RecordingBackend()
        options = emulated(**{"gpu_memory": BUDGET, **options})
        self._compiled = torch.compile(self.model, backend=self.backend, options=options, dynamic=dynamic)

    def check(self, seed: int = 1, tokens: int = 3) -> None:
        """One step gives what eager gives."""
        x = random(tokens, WIDTH, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(self._compiled(x), self.model(x), rtol=1e-4, atol=1e-5)

    @property
    def graph(self) -> CompiledGraph:
        return self.backend.graphs[0]

    @property
    def carried(self) -> Any:
        return self.graph.runtime.carried

    @property
    def uploaded(self) -> int:
        """Bytes of weights that have gone up, copies under way included."""
        self.backend.accelerator.synchronize()
        return self.backend.accelerator.counters.uploaded_bytes["weights"]

    @property
    def plan(self) -> Any:
        (plan,) = self.graph.plans
        return plan

    def layer(self, *, carried: bool) -> Any:
        """A Linear whose weight is (not) prefetched by the step before."""
        bound = self.plan.bound
        names = [self.plan.facts.names[i] for i in bound.streamed if (i in bound.carried) == carried]
        return self.model.get_submodule(names[0].removesuffix(".weight"))


@pytest.fixture
def steady() -> Compiled:
    """After steps enough that everything at the start of a step is carried."""
    compiled = Compiled()
    for seed in range(3):
        compiled.check(seed)
    assert compiled.carried.held_bytes > 0
    return compiled


@pytest.mark.parametrize("seed", range(4))
def test_values_are_eagers_and_each_weight_goes_up_once_a_step(seed: int) -> None:
    compiled = Compiled(seed=seed)
    compiled.check()
    schedule = compiled.plan.schedule
    streamed = schedule.streamed_bytes
    assert streamed > 0
    assert schedule.host_bytes > 0
    assert compiled.carried.held_bytes == 0, "a plan that has run once may not run again"
    first = compiled.uploaded
    compiled.check(2)
    ahead = compiled.carried.held_bytes
    assert 0 < ahead < streamed
    assert compiled.uploaded == first + streamed + ahead
    for step in range(STEPS):
        compiled.check(3 + step)
        assert compiled.uploaded == first + (step + 2) * streamed + ahead
    assert compiled.carried.wasted_bytes == 0


def _set_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.5


def _copy_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.copy_(weight * 0.5)


def _write_a_part(weight: nn.Parameter) -> None:
    """Its version shows it, samples of the bytes do not."""
    with torch.no_grad():
        weight[1::2, 7] += 1.0


@pytest.mark.parametrize("change", [_set_data, _copy_in_place, _write_a_part])
@pytest.mark.parametrize("of_carried", [True, False])
def test_a_weight_that_changes_between_steps(
    steady: Compiled, change: Callable[[nn.Parameter], None], of_carried: bool, caplog: pytest.LogCaptureFixture
) -> None:
    change(steady.layer(carried=of_carried).weight)
    before, held = steady.uploaded, steady.carried.held_bytes
    with caplog.at_level(logging.DEBUG, "hetegen_compile"):
        steady.check()
    wasted = steady.carried.wasted_bytes
    assert (0 < wasted <= held) if of_carried else wasted == 0
    assert steady.uploaded == before + steady.plan.schedule.streamed_bytes + wasted
    assert ("its weight has changed since" in caplog.text) == of_carried
    for seed in range(2, 4):
        steady.check(seed)
    assert steady.carried.wasted_bytes == wasted


def test_a_new_parameter(steady: Compiled) -> None:
    held = steady.carried.held_bytes
    steady.layer(carried=True).weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
    gc.collect()
    for seed in range(3):
        steady.check(seed)
    assert 0 < steady.carried.wasted_bytes <= held
    assert steady.carried.held_bytes == held


@pytest.mark.parametrize("through", ["data", "numpy"])
def test_a_weight_that_is_changed_unseen(steady: Compiled, through: str) -> None:
    weight = steady.layer(carried=True).weight
    version = weight._version
    if through == "data":
        weight.data += 0.1
    else:
        rows = weight.detach().numpy()
        rows *= 0.5
    assert weight._version == version
    steady.check()
    assert steady.carried.wasted_bytes > 0


def test_a_part_that_is_written_unseen_needs_refresh(steady: Compiled) -> None:
    with torch.no_grad():
        steady.layer(carried=True).weight.data[1::2, 7] += 1.0
    held = steady.carried.held_bytes
    hetegen_compile.refresh(steady.model)
    assert (steady.carried.held_bytes, steady.carried.wasted_bytes) == (0, held)
    steady.check()


def test_tensors_without_a_version_are_never_carried() -> None:
    with torch.inference_mode():
        compiled = Compiled()
    for seed in range(4):
        with torch.inference_mode():
            compiled.check(seed)
    assert compiled.plan.bound.carried
    assert compiled.carried.held_bytes == compiled.carried.wasted_bytes == 0
    schedule = compiled.plan.schedule  # nor is what is resident known to be current
    assert compiled.uploaded == 4 * (schedule.streamed_bytes + schedule.resident_bytes)


def test_two_plans_of_one_model_by_turns() -> None:
    """Prefill and decode: whoever repeats carries, and nothing is carried in vain more than once a change."""
    compiled = Compiled(12, gpu_memory=72 << 10, dynamic=True)
    for turn in range(3):
        compiled.check(turn, tokens=30)
        assert compiled.carried.held_bytes == 0
        for seed in range(4):
            compiled.check(seed, tokens=2)
        assert compiled.carried.held_bytes > 0
    assert len(compiled.graph.plans) == 2
    once = compiled.carried.held_bytes
    assert compiled.carried.wasted_bytes == 2 * once
    wasted = compiled.carried.wasted_bytes
    for seed in range(3):
        compiled.check(seed, tokens=30)
        compiled.check(seed, tokens=2)
    assert compiled.carried.wasted_bytes == wasted + once
    assert compiled.carried.held_bytes == 0


def test_two_models_by_turns_on_one_accelerator() -> None:
    one, other = Compiled(6, seed=7), Compiled(4, seed=7)
    for turn in range(3):
        for compiled in (one, other):
            for seed in range(3):
                compiled.check(10 * turn + seed)
            assert compiled.carried.held_bytes > 0
    assert one.backend.accelerator is other.backend.accelerator
    assert one.carried.wasted_bytes > 0
    for turn in range(3):
        one.check(turn)
        other.check(turn)


@pytest.mark.parametrize("when", ["begin", "run", "end"])
def test_an_exception_in_between(steady: Compiled, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    accelerator = steady.backend.accelerator
    operation = {"begin": "begin_step", "run": "upload", "end": "end_step"}[when]
    real = getattr(accelerator, operation)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if when == "end":
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accelerator, operation, interrupted)
        with pytest.raises(KeyboardInterrupt):
            steady.check(seed=11)
    for seed in range(3):
        steady.check(seed)
    assert steady.carried.held_bytes > 0


def test_a_copy_that_fails_is_raised_by_the_next_call_and_the_one_after_works(
    steady: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = steady.backend.accelerator
    assert isinstance(accelerator, EmulatedAccelerator)
    real, broken, failed = accelerator._work.fill_slot, {"on": True}, threading.Event()

    def fill_slot(op: Op, *args: Any) -> None:
        if broken["on"] and op.name.startswith("prefetch_ahead"):
            failed.set()
            raise OSError("the mapping is gone")
        real(op, *args)

    monkeypatch.setattr(accelerator._work, "fill_slot", fill_slot)
    steady.check()
    assert failed.wait(10), "no copy for the next step was started"
    broken["on"] = False
    with pytest.raises(AcceleratorError, match=r"prefetch_ahead\w* failed .*the mapping is gone"):
        steady.check()
    for seed in range(3):
        steady.check(seed)


@pytest.mark.parametrize("weights_first", [True, False])
def test_the_end_with_copies_under_way(monkeypatch: pytest.MonkeyPatch, weights_first: bool) -> None:
    before = live_threads()
    compiled = Compiled()
    for seed in range(2):
        compiled.check(seed)
    accelerator = compiled.backend.accelerator
    assert isinstance(accelerator, EmulatedAccelerator)
    under_way, go_on = threading.Event(), threading.Event()
    copy = accelerator._work.fill_slot

    def fill_slot(op: Op, *args: Any) -> None:
        if op.name.startswith("prefetch_ahead"):
            under_way.set()
            go_on.wait(10)
        copy(op, *args)

    monkeypatch.setattr(accelerator._work, "fill_slot", fill_slot)
    compiled.check(3)
    assert under_way.wait(10)
    assert compiled.carried.held_bytes > 0
    threading.Timer(0.05, go_on.set).start()
    monkeypatch.undo()
    if weights_first:
        for parameter in compiled.model.parameters():
            parameter.data = torch.empty(0)
    del compiled, accelerator
    torch._dynamo.reset()
    gc.collect()
    assert live_threads() == before


def test_generation_carries_in_decode() -> None:
    model, backend, known = tiny_model("llama"), RecordingBackend(), hetegen_compile.schedules()
    prompt = torch.randint(2, 256, (1, 12), generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        tokens: Tensor = model.generate(prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)  # type: ignore[operator]
        return tokens

    expected, options = run(), emulated(gpu_memory=half_the_weights(model))
    model.compile(backend=backend, options=options)
    results = [run() for _ in range(2)]
    for result in results:
        assert_like_eager(result, expected)
    schedules = tuple(s for s in hetegen_compile.schedules() if not any(s is other for other in known))
    assert_offloaded(backend, schedules, options)
    assert backend.graphs[0].runtime.carried.held_bytes > 0


def test_a_ring_of_another_length_keeps_nothing_of_the_old_one(steady: Compiled) -> None:
    """What was copied ahead lies in the old ring: it is given up, or both rings would be held."""
    runtime = steady.graph.runtime
    runtime.accelerator.synchronize()
    others = runtime.accelerator.counters.held_bytes["slots"] - runtime.ledger.ring_bytes
    longer = runtime.ledger.ring_bytes + (4 << 10)
    with runtime.lock:
        runtime.reserve(longer, runtime.limit_bytes)
    assert runtime.accelerator.counters.held_bytes["slots"] == longer + others
    assert steady.carried.held_bytes == 0
    steady.check(seed=5)
