"""Prompts of many lengths: few backend calls, one plan a bucket, no guard that a plan added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import hetegen_compile
from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.compiled import CompiledGraph
from hetegen_compile.passes.context import Bucket
from hetegen_compile.planning.planner import Planner
from tests.models.architectures import tiny_model
from tests.models.harness import RecordingBackend, emulated, half_the_weights

LENGTHS = (5, 7, 9, 2, 3, 12, 17, 20, 33, 64, 65, 40, 4, 11, 70, 90, 16, 6, 25, 8)
"""No prompt of one token: Dynamo makes graphs of their own for sizes of 1."""

BUCKETS = {Bucket(1, 1), Bucket(2, 4), Bucket(5, 16), Bucket(17, 64), Bucket(65, 256)}
"""All that these lengths may have plans for."""


class CountsGuards:
    """Guards of the shape environment before and after every plan."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[tuple[Any, Any]] = []
        self.added: list[int] = []
        self.again: list[tuple[Any, Any]] = []
        plan_bucket, decide_again = Planner.plan_bucket, Planner.decide_again

        def counted(planner: Planner, sizes: Any, target: Any, weights: Any) -> Any:
            before = self._guards(planner._module)
            found = plan_bucket(planner, sizes, target, weights)
            self.added.append(self._guards(planner._module) - before)
            self.plans.append((planner, found.context.bucket))
            return found

        def again(planner: Planner, base: Any, sizes: Any, target: Any, weights: Any) -> Any:
            before, segments = self._guards(planner._module), len(planner._segments.compiled)
            found = decide_again(planner, base, sizes, target, weights)
            self.added.append(self._guards(planner._module) - before)
            self.again.append((planner, base.context.bucket))
            assert found.module is base.module, "the segments were cut anew"
            assert len(planner._segments.compiled) == segments
            return found

        monkeypatch.setattr(Planner, "plan_bucket", counted)
        monkeypatch.setattr(Planner, "decide_again", again)

    def _guards(self, module: fx.GraphModule) -> int:
        modes = [node.meta["example_value"].fake_mode for node in module.graph.find_nodes(op="placeholder")
                 if isinstance(node.meta.get("example_value"), Tensor)]  # fmt: skip
        return len(modes[0].shape_env.guards) if modes and modes[0].shape_env is not None else 0


def _plans_of(graphs: Sequence[CompiledGraph]) -> list[int]:
    return [len(graph.plans) for graph in graphs]


@pytest.mark.parametrize(("cache", "calls"), [(None, 3), ("static", 4)])
def test_twenty_prompt_lengths(cache: str | None, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of the first length and of others; decode, with a static cache of the first length and of others.

    The budget binds: larger prompts take the place of weights, and no plan is made a second time for that.
    """
    model, backend, counted = tiny_model("llama", layers=1), RecordingBackend(), CountsGuards(monkeypatch)
    tokens = torch.randint(2, 256, (1, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    config: dict[str, Any] = {"cache_implementation": cache, "max_new_tokens": 3, "min_new_tokens": 3}
    config["do_sample"] = False
    expected = [model.generate(tokens[:, :length], **config) for length in LENGTHS]  # type: ignore[operator]
    known = len(hetegen_compile.schedules())
    model.compile(backend=backend, options=emulated(gpu_memory="330KiB"))
    for length, right in zip(LENGTHS, expected, strict=True):
        found = model.generate(tokens[:, :length], **config)  # type: ignore[operator]
        assert torch.equal(found, right), length
    assert len(backend.graphs) <= calls, "backend calls"
    assert len(set(counted.plans)) == len(counted.plans), "a bucket was planned twice"
    assert {bucket for _, bucket in counted.plans} == BUCKETS
    assert counted.again, "memory was never shared out anew: the budget does not bind"
    assert len(hetegen_compile.schedules()) - known <= len(counted.plans), "one schedule a graph and bucket"
    assert sum(_plans_of(backend.graphs)) == len(counted.plans)
    assert any(len(graph.plans) >= 4 for graph in backend.graphs), "one graph serves several buckets"
    assert any(plan.schedule.streamed_bytes for graph in backend.graphs for plan in graph.plans)
    assert counted.added == [0] * len(counted.added)
    assert backend.accelerator.counters.peak_bytes <= 330 << 10


@pytest.mark.parametrize("overhead", [{}, {"workspace": 32 << 20}])
def test_generations_in_a_row_share_memory_out_once(overhead: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and decode agree on what is resident, also where the device's libraries take a part of the budget."""
    monkeypatch.setattr(EmulatedAccelerator, "overhead_bytes", lambda self: overhead)
    model, backend, counted = tiny_model("llama", layers=1), RecordingBackend(), CountsGuards(monkeypatch)
    budget = 2 * half_the_weights(model) + sum(overhead.values())
    model.compile(backend=backend, options=emulated(gpu_memory=budget))
    prompt = torch.randint(2, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.generate(prompt, cache_implementation="static", max_new_tokens=3, min_new_tokens=3)  # type: ignore[operator]
    made = len(counted.plans), len(counted.again)
    model.generate(prompt, cache_implementation="static", max_new_tokens=3, min_new_tokens=3)  # type: ignore[operator]
    assert (len(counted.plans), len(counted.again)) == made
    assert any(plan.first_rows and plan.schedule.streamed_bytes for graph in backend.graphs for plan in graph.plans)
