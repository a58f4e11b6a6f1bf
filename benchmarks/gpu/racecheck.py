"""Stage ``racecheck``: random delays in every stream, poisoned slots, bit-identical results whatever the delays are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.children import Notebook
from benchmarks.gpu.instrumented import hostile
from benchmarks.gpu.models import Watched, compile_small, generate, require_like, small_model
from benchmarks.gpu.settings import Checks, Settings, require

CONFIGURATIONS = (
    ("static", False, False), (None, True, False), ("static", True, True), (None, False, True), ("static", False, True),
)  # fmt: skip
"""Cache, whether nothing can be pinned in place, and whether host parts are the worker's."""

_SPLIT_AHEAD = 0.6
"""Rows that are the worker's: so many that several threads compute them, who read ahead only then."""


def racecheck(settings: Settings, notebook: Notebook) -> None:
    """Each configuration under many seeds; raises ChecksFailedError at the end if one failed."""
    seeds = 12 if settings.cuda else 3
    checks = Checks(notebook)
    for cache, refuse_pins, ahead in CONFIGURATIONS:
        pins = "through the pinned ring" if refuse_pins else "pinned in place"
        name = f"{cache or 'dynamic'} cache, {pins}{', issued ahead' if ahead else ''}"
        checks.check(name, partial(under_delays, settings, cache, seeds, refuse_pins=refuse_pins, ahead=ahead))
    checks.finish()


def under_delays(
    settings: Settings, cache: str | None, seeds: int, *, refuse_pins: bool, ahead: bool
) -> dict[str, Any]:
    """Tokens and logits of every seed equal those without delays, bit by bit, and eager's tokens.

    The first generation compiles on its way; from the second on every step is of the graph that Dynamo takes for good.
    """
    model = small_model("llama")
    expected = generate(model, 1, cache)
    with hostile(refuse_pins=refuse_pins) as opened, Watched() as watched:
        split = _SPLIT_AHEAD if ahead else 0.25
        compile_small(model, settings, share=0.3, split=split, issue_ahead=ahead)
        require_like(expected, generate(model, 1, cache))
        without = generate(model, 1, cache)
        require_like(expected, without)
        plans = len(watched.made())
        require_identical(without, generate(model, 1, cache), "again without delays")
        (accelerator,) = opened
        for seed in range(seeds):
            accelerator.reseed(seed)
            require_identical(without, generate(model, 1, cache), f"seed {seed}")
        require(len(watched.made()) == plans, "steps were planned anew from one generation to the next")
        staged = sum(accelerator.counters.staged_bytes.values())
        counters = accelerator.counters
        replayed, native, read_ahead = counters.chains_replayed, counters.native_trips, counters.read_ahead_bytes
        accelerator.reseed(None)
    require((staged > 0) == refuse_pins, f"{staged} bytes went through the pinned ring")
    require(replayed >= seeds or not settings.cuda, f"{replayed} chains of launches were replayed with {seeds} seeds")
    require(native >= seeds or not (settings.cuda and ahead), f"{native} trips were one native call")
    require(read_ahead > 0 or not (settings.cuda and ahead), "no weights were read ahead")
    offloaded = _offloaded(watched, refuse_pins=refuse_pins)
    return {
        **offloaded, "seeds": seeds, "staged_bytes": staged, "chains_replayed": replayed, "native_trips": native,
        "read_ahead_bytes": read_ahead,
    }  # fmt: skip


def require_identical(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], when: str) -> None:
    """The same bits; else AssertionError with the first token that differs and by how much."""
    if all(map(torch.equal, expected, found)):
        return
    differs = (expected[1] != found[1]).flatten(1).any(1).nonzero().flatten().tolist()
    largest = (expected[1] - found[1]).abs().max().item()
    tokens = "tokens too" if not torch.equal(expected[0], found[0]) else "tokens equal"
    raise AssertionError(f"{when}: logits of tokens {differs} differ by up to {largest:.3g} ({tokens})")


def _offloaded(watched: Watched, *, refuse_pins: bool) -> dict[str, Any]:
    """Refusals to pin are what was asked for; otherwise there must be none."""
    if not refuse_pins:
        return watched.require_offloaded()
    require(any(schedule.refusals for schedule in watched.schedules), "the refused pins are not told")
    return {"streamed_bytes": max(schedule.streamed_bytes for schedule in watched.schedules)}
