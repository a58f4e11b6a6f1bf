"""Which launches of a step are chains, and that chains change nothing else."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor, nn

from hetegen_compile.steps import chains
from hetegen_compile.steps.chains import ChainRules
from tests.backend.modules import Mlp, random
from tests.models.architectures import generate, prompts, tiny_model
from tests.models.harness import RecordingBackend, assert_like_eager, emulated, half_the_weights

BUDGET = 40 << 10


def launched(source: str) -> tuple[list[list[str]], list[str]]:
    """What each chain launches, and what the step launches by itself: the targets of the assignments."""
    functions = {one.name: one for one in ast.parse(source).body if isinstance(one, ast.FunctionDef)}
    step = functions.pop("step")
    return [_launches(one) for one in functions.values()], _launches(step)


def _launches(function: ast.FunctionDef) -> list[str]:
    assigned = [line for line in function.body if isinstance(line, ast.Assign) and isinstance(line.value, ast.Call)]
    called = ("launch(", "list(launch(")  # caches that it has written the end of are put among its results
    return [ast.unparse(line.targets[0]) for line in assigned if ast.unparse(line.value).startswith(called)]


def compiled(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[RecordingBackend, Tensor]:
    backend = RecordingBackend()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(*inputs)
        model.compile(backend=backend, options=emulated(**{"gpu_memory": BUDGET, **options}))
        torch.manual_seed(0)
        result: Tensor = model(*inputs)
    torch.testing.assert_close(result, expected)
    return backend, result


def test_all_launches_of_a_fixed_size_are_in_chains_as_long_as_nothing_comes_between() -> None:
    backend, _ = compiled(Mlp().eval(), random(2, 64), split=0.25)
    source = backend.graphs[0].plans[0].bound.source
    found, alone = launched(source)
    assert alone == []
    assert sum(map(len, found)) > len(found) > 1
    assert source.count("launch_chain(") == len(found)
    step = source[source.index("def step(") :]
    between = [text.split("launch_chain(")[0] for text in step.split("_given = [")[1:]]
    assert len(between) == len(found)
    assert not any("launch_chain" in text or "wait(" in text for text in between), "their inputs are there"


def test_without_cuda_graphs_each_launch_is_its_own() -> None:
    backend, _ = compiled(Mlp().eval(), random(2, 64), split=0.25, cuda_graphs=False)
    found, alone = launched(backend.graphs[0].plans[0].bound.source)
    assert (found, len(alone) > 4) == ([], True)


def test_a_cache_that_grows_is_read_by_launches_of_their_own() -> None:
    model, inputs = tiny_model("llama"), prompts(1)
    expected = generate(model, inputs, None)
    backend = RecordingBackend()
    model.compile(backend=backend, options={**emulated(gpu_memory=half_the_weights(model)), "split": 0.5})
    assert_like_eager(generate(model, inputs, None), expected)
    layers: int = model.config.num_hidden_layers
    found, alone = launched(backend.graphs[-1].plans[-1].bound.source)
    assert layers <= len(alone) <= layers + 1, "attention, and what makes its positions (torch 2.11)"
    assert all(name.startswith("segment") for name in alone)
    assert sum(map(len, found)) > 4 * layers
    static, _ = launched(_decoded(model, "static").bound.source)
    assert sum(map(len, static)) > sum(map(len, found))


def _decoded(model: Any, cache: str) -> Any:
    torch._dynamo.reset()
    backend = RecordingBackend()
    model.compile(backend=backend, options={**emulated(gpu_memory=half_the_weights(model)), "split": 0.5})
    generate(model, prompts(1), cache)
    plan = backend.graphs[-1].plans[-1]
    assert launched(plan.bound.source)[1] == [], "of a static cache nothing varies"
    return plan


def test_a_size_that_varies_is_no_chains() -> None:
    model, backend = Mlp().eval(), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET, split=0.25), dynamic=True)
    with torch.no_grad():
        for tokens in (2, 3, 4):
            model(random(tokens, 64))
    found, alone = launched(backend.graphs[0].plans[0].bound.source)
    assert (found, bool(alone)) == ([], True)


def test_large_results_are_no_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "RESULT_BYTES", 2 * 64 * 4 - 1)
    backend, _ = compiled(Mlp().eval(), random(2, 64), split=0.25)
    found, alone = launched(backend.graphs[0].plans[0].bound.source)
    assert alone
    assert all(len(one) > 0 for one in found)


def test_values_die_in_a_chain_as_they_do_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for rule in (ChainRules.launches, lambda rules, node: False):
        monkeypatch.setattr(ChainRules, "launches", rule)
        torch._dynamo.reset()
        backend, _ = compiled(Mlp().eval(), random(8, 64), split=0.25)
        peaks.append(backend.accelerator.counters.step_peak_bytes)
    assert peaks[0] == peaks[1]
    assert not launched(backend.graphs[0].plans[0].bound.source)[0]


class Routed(nn.Module):
    """A product with a few experts that stay on the accelerator, between Linears that do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(64, 64), nn.Linear(64, 64)
        self.stack = nn.Parameter(torch.randn(2, 64, 64))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        made: Tensor = torch.ops.transformers.grouped_mm_fallback(self.before(x), self.stack, offs=ends)
        found: Tensor = self.after(made)
        return found


def test_what_may_wait_for_the_device_is_no_chains() -> None:
    """A product with experts reads where groups end: nothing can while launches are recorded."""
    ends = torch.tensor([1, 2], dtype=torch.int32)
    backend, _ = compiled(Routed().eval(), random(2, 64), ends, split=0.25, gpu_memory=80 << 10)
    (schedule,) = [plan.schedule for plan in backend.graphs[0].plans]
    assert "computed on the host" not in schedule.explain()
    found, alone = launched(backend.graphs[0].plans[0].bound.source)
    assert [name.rstrip("_0123456789") for name in alone] == ["segment"]
    assert len(found) >= 2


class Keeps(nn.Module):
    """Gives back what it computed on the way, as a cache that the next step is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.cat([cache[1:], self.first(x)])
        return self.last(kept.sin()), kept


def test_what_outlives_the_step_is_no_result_of_a_chain() -> None:
    """The next step's would be written over it."""
    torch.manual_seed(0)
    model, cache, backend = Keeps().eval(), random(3, 64), RecordingBackend()
    own = cache.clone()
    model_eager = Keeps().eval()
    model_eager.load_state_dict(model.state_dict())
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET, split=0.25))
    kept = []
    with torch.no_grad():
        for seed in range(4):
            x = random(1, 64, seed=seed)
            result, own = model(x, own)
            expected, cache = model_eager(x, cache)
            kept.append((own, cache))
            torch.testing.assert_close(result, expected)
    for mine, theirs in kept:
        torch.testing.assert_close(mine, theirs)
    source = backend.graphs[0].plans[0].bound.source
    (twin,) = (line.split(", ")[1].rstrip(")") for line in source.splitlines() if "twins.append(" in line)
    chained = [
        name for line in source.splitlines() if " = launch_chain(" in line for name in line.split(" = ")[0].split()
    ]
    assert chained
    assert not any(name.strip("(,)") == twin for name in chained)
