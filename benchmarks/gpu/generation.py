"""Stages ``generation`` and ``variants``: architectures, caches, budgets, types of weights against eager on the host.

Two stages, for they run at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import hetegen_compile
from benchmarks.children import Notebook
from benchmarks.gpu.models import (
    Watched,
    compile_small,
    finish_within_budgets,
    generate,
    prompts,
    require_like,
    slow_host,
    small_model,
)
from benchmarks.gpu.settings import Checks, Settings, require
from hetegen_compile.reports.schedule import EXPERTS


@dataclass(frozen=True)
class Case:
    """One model, cache and budget; ``split`` sends a share of all rows to the host."""

    model: str
    cache: str | None
    share: float = 0.5
    split: float = 0.5
    batch: int = 1
    ahead: bool = False

    @property
    def name(self) -> str:
        """For people."""
        how = ", issued ahead" if self.ahead else ""
        return f"{self.model}, {self.cache or 'dynamic'} cache, budget {self.share:.0%}, batch {self.batch}{how}"


CASES = (
    Case("llama", "static"),
    Case("opt", None),
    Case("mistral", "static"),
    Case("mistral", None, share=0.3),
    Case("gpt2", None, batch=2),
    Case("gemma2", "static"),
    Case("qwen2", None, share=0.7, split=0.25),
)
"""In order of importance; sliding windows are those of mistral (every layer) and gemma2 (every other)."""

AHEAD = (
    Case("llama", "static", ahead=True),
    Case("opt", None, share=0.3, ahead=True),
    Case("gemma2", "static", batch=2, ahead=True),
)
"""Host parts by a worker, and what needs them behind gates."""

_STEPS = 3
"""Decode steps whose logits are compared in 16 bits: attention has other kernels there than in float32."""


def generation(settings: Settings, notebook: Notebook) -> None:
    """All cases; raises ChecksFailedError at the end if one failed."""
    checks = Checks(notebook)
    checks.check("three splits of one compilation, static cache", partial(three_splits, settings))
    for case in CASES:
        checks.check(case.name, partial(like_eager, case, settings))
    finish_within_budgets(checks)


def variants(settings: Settings, notebook: Notebook) -> None:
    """Issued ahead, 16-bit weights, all resident, beams, experts; raises ChecksFailedError at the end if one failed."""
    checks = Checks(notebook)
    for case in AHEAD:
        checks.check(case.name, partial(like_eager, case, settings))
    checks.check("bfloat16 and float16 within eager's own error", partial(half_precision, settings))
    checks.check("everything fits", partial(everything_fits, settings))
    checks.check("beams", partial(beams, settings))
    checks.check("a mixture's experts on the host", partial(experts, settings))
    checks.check("a mixture's experts on host and link", partial(shared_experts, settings))
    finish_within_budgets(checks)


def like_eager(case: Case, settings: Settings) -> dict[str, Any]:
    """Tokens equal, logits close, something on the host, something streamed, within the budget; twice."""
    model = small_model(case.model)
    expected = generate(model, case.batch, case.cache)
    with Watched() as watched:
        compile_small(model, settings, share=case.share, split=case.split, issue_ahead=case.ahead)
        difference = require_like(expected, generate(model, case.batch, case.cache))
        require_like(expected, generate(model, case.batch, case.cache))
    traced = {span.resource for schedule in watched.schedules for span in schedule.spans}
    require(("worker" in traced) == case.ahead, f"issued ahead: {not case.ahead}, asked for {case.ahead}")
    return {**watched.require_offloaded(), "largest_difference": difference}


def three_splits(settings: Settings) -> dict[str, Any]:
    """All streamed, half and all on the host, from one capture."""
    model = small_model("llama")
    expected = generate(model, 1, "static")
    found = {}
    compile_small(model, settings, split=0.5)
    for split in (0.5, 0.0, 1.0):
        with Watched() as watched, hetegen_compile.override_split(split):
            require_like(expected, generate(model, 1, "static"))
        found[str(split)] = watched.require_offloaded(host=split > 0, streamed=split < 1)
    return found


def half_precision(settings: Settings) -> dict[str, Any]:
    """16-bit weights: logits of a prompt and decode steps no further from float32's than twice eager's on the host."""
    figures = {}
    for dtype in (torch.bfloat16, torch.float16):
        with Watched() as watched:
            error = _error_over_eagers("llama", dtype, settings, split=0.5)
        figures[str(dtype)] = {**watched.require_offloaded(), "error_over_eagers": error}
    return figures


def _error_over_eagers(name: str, dtype: torch.dtype, settings: Settings, **options: Any) -> float:
    """How far logits of 16-bit weights are from float32's, in the mean, compared with eager's; at most 2."""
    model = small_model(name, dtype)
    eager, exact = _logits(model), _logits(_in_float32(name, model))
    compile_small(model, settings, **options)
    found = _logits(model)
    own, theirs = (float((one - exact).abs().mean()) for one in (found, eager))
    require(own <= 2 * theirs, f"{dtype}: mean error of a logit {own:.3g}, eager's {theirs:.3g}")
    return own / theirs


def _logits(model: Any) -> torch.Tensor:
    """Of a prompt and of some given tokens behind it, one a step, with a cache that grows."""
    given = prompts(2)
    with torch.no_grad():
        results = [model(given, use_cache=True)]
        for step in range(_STEPS):
            results.append(model(given[:, step : step + 1], past_key_values=results[-1].past_key_values))
    return torch.cat([result.logits.float() for result in results], 1)


def _in_float32(name: str, model: Any) -> Any:
    """The same weights."""
    twin = small_model(name)
    twin.load_state_dict({key: tensor.float() for key, tensor in model.state_dict().items()})
    return twin


def everything_fits(settings: Settings) -> dict[str, int]:
    """Without a budget the whole graph is compiled in one piece."""
    model = small_model("llama")
    expected = generate(model, 1, "static")
    with Watched() as watched:
        compile_small(model, settings, share=None)
        require_like(expected, generate(model, 1, "static"))
    require(all(schedule.whole_graph for schedule in watched.schedules), "something was offloaded")
    return {"graphs": len(watched.schedules)}


def beams(settings: Settings) -> dict[str, Any]:
    """Beam search reorders the cache between steps."""
    model = small_model("llama")
    expected = generate(model, 1, None, num_beams=3)[0]
    with Watched() as watched:
        compile_small(model, settings, split=0.5)
        found = generate(model, 1, None, num_beams=3)[0]
    require(torch.equal(expected, found), f"{found.tolist()} are not eager's {expected.tolist()}")
    return watched.require_offloaded()


def experts(settings: Settings) -> dict[str, Any]:
    """A mixture whose experts exceed the budget: the host computes with those that have tokens."""
    model = small_model("mixtral")
    expected = generate(model)
    with Watched() as watched:
        compile_small(model, settings, share=0.4, split="auto")
        difference = require_like(expected, generate(model))
    return {**watched.require_offloaded(streamed=False, experts=True), "largest_difference": difference}


def shared_experts(settings: Settings) -> dict[str, Any]:
    """The same with a quarter of the experts on the host and the others streamed; bfloat16 has a product of its own."""
    options: dict[str, Any] = {"share": 0.4, "split": 0.25, "hardware": slow_host(settings)}
    model = small_model("mixtral")
    expected = generate(model)
    with Watched() as watched:
        compile_small(model, settings, **options)
        difference = require_like(expected, generate(model))
    with Watched() as halved:
        error = _error_over_eagers("mixtral", torch.bfloat16, settings, **options)
    for schedule in (*watched.schedules, *halved.schedules):
        shares = {(row.host_share, row.streamed_share) for row in schedule.rows if row.op == EXPERTS}
        require(shares == {(0.25, 0.75)}, f"shares of the experts on host and link are {shares}")
    return {
        "float32": {**watched.require_offloaded(), "largest_difference": difference},
        "bfloat16": {**halved.require_offloaded(), "error_over_eagers": error},
    }
