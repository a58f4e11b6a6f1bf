"""Stage ``racecheck``: random delays in every stream, poisoned slots, bit-identical results whatever the delays are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.children import Notebook
from benchmarks.gpu.instrumented import hostile
from benchmarks.gpu.models import Watched, compile_small, generate, require_like, small_model
from benchmarks.gpu.settings import Checks, Settings, require


def racecheck(settings: Settings, notebook: Notebook) -> None:
    """Each configuration under many seeds; raises ChecksFailedError at the end if one failed."""
    seeds = 12 if settings.cuda else 3
    checks = Checks(notebook)
    for cache in ("static", None):
        for refuse_pins in (False, True):
            name = f"{cache or 'dynamic'} cache, {'through the pinned ring' if refuse_pins else 'pinned in place'}"
            checks.check(name, partial(under_delays, settings, cache, seeds, refuse_pins=refuse_pins))
    checks.finish()


def under_delays(settings: Settings, cache: str | None, seeds: int, *, refuse_pins: bool) -> dict[str, Any]:
    """Tokens and logits of every seed equal those without delays, bit by bit, and eager's tokens.

    The first generation compiles on its way; from the second on every step is of the graph that Dynamo takes for good.
    """
    model = small_model("llama")
    expected = generate(model, 1, cache)
    with hostile(refuse_pins=refuse_pins) as opened, Watched() as watched:
        compile_small(model, settings, share=0.3, split=0.25)
        require_like(expected, generate(model, 1, cache))
        without = generate(model, 1, cache)
        require_like(expected, without)
        (accelerator,) = opened
        for seed in range(seeds):
            accelerator.reseed(seed)
            found = generate(model, 1, cache)
            for what, one, other in zip(("tokens", "logits"), without, found, strict=True):
                require(torch.equal(one, other), f"seed {seed}: {what} differ from those without delays")
        staged = sum(accelerator.counters.staged_bytes.values())
        accelerator.reseed(None)
    require((staged > 0) == refuse_pins, f"{staged} bytes went through the pinned ring")
    return {**_offloaded(watched, refuse_pins=refuse_pins), "seeds": seeds, "staged_bytes": staged}


def _offloaded(watched: Watched, *, refuse_pins: bool) -> dict[str, Any]:
    """Refusals to pin are what was asked for; otherwise there must be none."""
    if not refuse_pins:
        return watched.require_offloaded()
    require(any(schedule.refusals for schedule in watched.schedules), "the refused pins are not told")
    return {"streamed_bytes": max(schedule.streamed_bytes for schedule in watched.schedules)}
