"""Random calls of ``generate()``, one after the other on one compiled model: eager's tokens within the budget."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hetegen_compile
from hetegen_compile.accelerators import EmulatedAccelerator
from tests.models.architectures import ARCHITECTURES, VOCABULARY, tiny_model
from tests.models.harness import RecordingBackend, emulated, half_the_weights, new_schedules
from tests.properties.budgets import with_named_budgets
from tests.properties.examples import random_models

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 2},
}


@dataclass(frozen=True)
class Call:
    """One generation; the prompts of a batch are each shorter by a token than the one before, padded left."""

    batch: int
    prompt: int
    tokens: int
    cache: str | None
    mode: str

    def run(self, model: Any) -> Tensor:
        """The tokens."""
        generator = torch.Generator().manual_seed(self.prompt)
        mask = (torch.arange(self.prompt)[None, :] >= torch.arange(self.batch)[:, None]).long()
        prompt = torch.randint(2, VOCABULARY, mask.shape, generator=generator) * mask
        torch.manual_seed(self.prompt)
        found: Tensor = model.generate(
            prompt, attention_mask=mask, max_new_tokens=self.tokens, min_new_tokens=self.tokens,
            cache_implementation=self.cache, **MODES[self.mode],
        )  # fmt: skip
        return found


@dataclass(frozen=True)
class Case:
    """A model, how it is compiled, and what is asked of it; ``room`` is a multiple of half of its weights."""

    architecture: str
    room: float
    split: Any
    overhead: int
    seed: int
    calls: tuple[Call, ...]


calls = st.builds(
    Call, batch=st.integers(1, 3), prompt=st.integers(4, 14), tokens=st.integers(2, 6),
    cache=st.sampled_from([None, "static"]), mode=st.sampled_from(sorted(MODES)),
)  # fmt: skip
cases = st.builds(
    Case, architecture=st.sampled_from(sorted(ARCHITECTURES)), room=st.floats(1.0, 3.0),
    split=st.sampled_from([0.5, "auto", 0.25]), overhead=st.sampled_from([0, 1 << 20]), seed=st.integers(0, 100),
    calls=st.lists(calls, min_size=1, max_size=3).map(tuple),
)  # fmt: skip


@random_models(4)
@given(cases)
def test_random_generations_are_eagers(case: Case) -> None:
    model = tiny_model(case.architecture, layers=1)
    expected = [call.run(model) for call in case.calls]
    budget = int(half_the_weights(model) * case.room) + case.overhead
    overhead = {"libraries": case.overhead} if case.overhead else {}
    with mock.patch.object(EmulatedAccelerator, "overhead_bytes", return_value=overhead):
        found = with_named_budgets(budget, lambda budget: _generated(model, case, budget))
    for call, one, other in zip(case.calls, found, expected, strict=True):
        assert torch.equal(one, other), call


def _generated(model: Any, case: Case, budget: int) -> list[Tensor]:
    """The tokens of all calls; within the budget, and with rows on the host where the options have some there."""
    torch._dynamo.reset()
    gc.collect()
    model._compiled_call_impl = None
    known, backend = hetegen_compile.schedules(), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split=case.split, seed=case.seed))
    found = [call.run(model) for call in case.calls]
    assert backend.accelerator.counters.peak_bytes + case.overhead <= budget
    assert case.split == "auto" or sum(schedule.host_bytes for schedule in new_schedules(known)) > 0
    return found
