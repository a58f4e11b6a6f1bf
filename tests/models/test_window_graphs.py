"""Caches of sliding windows: how many graphs Dynamo makes over many prompt lengths, and that none is made for us alone.

transformers' Python code branches on lengths, and Dynamo makes a graph for each way through it. With a window W, the
dynamic cache and no attention mask these are, for prompts of n tokens,

- ``kv_length >= W`` where a mask may be left out (n < W or not),
- ``keys[:, :, -W + 1:]``, whose size torch decides by a guard (n < W - 1 or not),

three in all, and for a decode step with c tokens in the cache four: c < W - 2, c = W - 2 (the cut begins to bind),
c = W - 1 (a mask, though the cache is not full yet) and c >= W. Dynamo compiles one more for the first prompt's own
length, unless it is told ``dynamic=True``. With lengths on one side of the window only there are at most four.

A plain backend is called once more where a growing cache comes from a prefill (``results.py``), and we would be once
more if the window that came down from the accelerator were not cut from a tensor like eager's (``empty_result``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.models.architectures import tiny_model
from tests.models.harness import RecordingBackend, emulated, half_the_weights
from tests.models.test_token_buckets import LENGTHS, CountsGuards

AROUND = LENGTHS
"""Prompts shorter than the window, as long, longer by one, much longer, and one that reaches it while it decodes."""
BEYOND = (9, 12, 17, 20, 65, 40, 90, 16, 8, 10)
BRANCHES = 7
"""Ways through transformers' code with a dynamic cache and no mask."""


@dataclass(frozen=True)
class Case:
    architecture: str
    cache: str | None
    lengths: Sequence[int]
    calls: int


CASES = {
    "longer than the window": Case("mistral", None, BEYOND, calls=4),
    "both": Case("mistral", None, AROUND, calls=1 + BRANCHES),
    "both, static": Case("mistral", "static", AROUND, calls=5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_backend_calls_over_many_lengths(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, backend, counted = tiny_model(case.architecture, layers=1), RecordingBackend(), CountsGuards(monkeypatch)
    tokens = torch.randint(2, 256, (1, max(case.lengths)), generator=torch.Generator().manual_seed(1))
    config: dict[str, Any] = {"cache_implementation": case.cache, "max_new_tokens": 3, "min_new_tokens": 3}
    config["do_sample"] = False
    expected = [model.generate(tokens[:, :length], **config) for length in case.lengths]  # type: ignore[operator]
    budget = 4 * half_the_weights(model)
    model.compile(backend=backend, options=emulated(gpu_memory=budget))
    for length, right in zip(case.lengths, expected, strict=True):
        found = model.generate(tokens[:, :length], **config)  # type: ignore[operator]
        assert torch.equal(found, right), length
    assert len(backend.graphs) <= case.calls  # transformers 5.17 always has a mask, and fewer ways for that
    assert len(set(counted.plans)) == len(counted.plans), "a bucket was planned twice"
    assert counted.added == [0] * len(counted.added), "a plan added a guard"
    assert all(plan.schedule.host_bytes for graph in backend.graphs for plan in graph.plans)
    assert 0 < backend.accelerator.counters.peak_bytes <= budget
