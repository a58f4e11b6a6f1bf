"""The budget that an error names: it is enough for all that is stated, and not much more than what works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hetegen_compile
from hetegen_compile.errors import BudgetError
from tests.backend.budgets import Kept, forward, needed_bytes
from tests.models.architectures import PROMPT, generate, prompts, tiny_model
from tests.models.harness import RecordingBackend, emulated, new_schedules

TOKENS = 5
"""That a generation adds to its prompt."""


@pytest.mark.parametrize(("architecture", "split"), [("gpt2", "auto"), ("llama", 0.5)])
def test_the_smallest_budget_is_enough_and_one_byte_less_is_not(architecture: str, split: Any) -> None:
    model, inputs = tiny_model(architecture, layers=1), prompts(2)
    expected, kept = forward(model, inputs), Kept(model)
    needed = needed_bytes(kept, lambda: forward(model, inputs), split=split)
    kept.compile(gpu_memory=needed - 1, split=split)
    with pytest.raises(BudgetError, match=str(needed)):
        forward(model, inputs)
    backend, known = kept.compile(gpu_memory=needed, split=split), hetegen_compile.schedules()
    for _ in range(2):
        torch.testing.assert_close(forward(model, inputs), expected, rtol=1e-4, atol=1e-5)
    (schedule,) = new_schedules(known)
    assert schedule.resident_bytes == 0
    assert sum(schedule.budget.values()) <= needed
    assert 0 < backend.accelerator.counters.peak_bytes <= needed


@pytest.mark.parametrize(
    ("architecture", "cache", "batches", "tokens", "refused"),
    [
        ("llama", None, (1, 2), TOKENS, 0.9),
        ("llama", None, (1,), 40, 0.8),
        ("qwen2", "static", (1, 2), 40, 0.8),
        ("opt", None, (2,), TOKENS, 0.93),
        ("gpt2", "static", (1,), TOKENS, 0.96),
        ("mistral", None, (1,), TOKENS, 0.96),
    ],
)
def test_the_smallest_budget_is_enough_for_all_that_is_stated(
    architecture: str, cache: str | None, batches: tuple[int, ...], tokens: int, refused: float
) -> None:
    """The first forward's error, a prefill's, counts the steps after it, up to ``context`` and ``max_batch``.

    The share ``refused`` of it is not enough, even where nothing is stated and each step is planned as it comes: it is
    less where prompts of a number of sequences are foreseen that was not seen yet, and where caches are made with room
    for all of a context of which the prompt is little.
    """
    model = tiny_model(architecture, layers=1)
    stated: dict[str, Any] = {"context": PROMPT + tokens, "max_batch": max(batches)}

    def run() -> list[Tensor]:
        return [generate(model, prompts(batch), cache, tokens)["sequences"] for batch in batches]

    expected, kept = run(), Kept(model)
    needed = needed_bytes(kept, run, split="auto", **stated)
    backend = kept.compile(gpu_memory=needed, split="auto", **stated)
    assert all(map(torch.equal, run(), expected))
    assert 0 < backend.accelerator.counters.peak_bytes <= needed
    kept.compile(gpu_memory=int(needed * refused), split="auto")
    with pytest.raises(BudgetError):
        run()


LONG = 48
"""Tokens of a context that is many windows long."""


@pytest.mark.parametrize(("architecture", "layers"), [("mistral", 1), ("gemma2", 2)])
def test_a_window_needs_no_more_for_a_longer_context(architecture: str, layers: int) -> None:
    """The first forward, a short prompt's, names a budget that is enough for all steps, and not for a cache of all."""
    model = tiny_model(architecture, layers)
    kept, tokens = Kept(model), LONG - PROMPT

    def needed(context: int) -> int:
        return needed_bytes(kept, lambda: generate(model, prompts(1), None, tokens), split="auto", context=context)

    short, long = needed(LONG // 2), needed(LONG)
    per_token = 8 * 2 * 16 * 4  # of a layer that keeps all: as it comes and goes, and what attention makes of it
    assert long - short <= (LONG // 2) * (layers - 1) * 2 * per_token
    backend = kept.compile(gpu_memory=long, split="auto", context=LONG)
    both = model, tiny_model(architecture, layers)
    found, expected = [generate(one, prompts(1), None, tokens)["sequences"] for one in both]
    assert torch.equal(found, expected)
    assert 0.7 * long <= backend.accelerator.counters.peak_bytes <= long


@pytest.mark.parametrize(("stated", "told"), [({}, True), ({"context": 12}, False)])
def test_the_error_says_where_a_cache_is_not_counted(stated: dict[str, int], told: bool) -> None:
    model = tiny_model("llama", layers=1)
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=1, **stated))
    with pytest.raises(BudgetError) as error:
        generate(model, prompts(1), None, 1)
    assert ("'context': tokens" in str(error.value)) == told
