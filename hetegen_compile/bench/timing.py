"""Tokens per second of ``generate``, by the times at which its tokens come out."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Cache = Literal["dynamic", "static"]
"""Of keys and values: one that grows by a token a step, what ``generate`` makes by itself, or one of fixed length."""

CACHES: tuple[Cache, ...] = get_args(Cache)

WARM_UP_TOKENS = 8
"""Of the generation that is not measured, where it may be shorter: plans, a traced step, recorded launches."""


class Arrivals:
    """A streamer that keeps the time of each token; the prompt comes first."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt, then each token, on the host."""
        del value
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class Timing:
    """One generation: seconds of the prefill and of each decode step, and the new tokens."""

    prefill_s: float
    steps_s: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def step_s(self) -> float:
        """The median decode step."""
        return statistics.median(self.steps_s)


def generate_timed(model: Any, prompt: Tensor, new_tokens: int, cache: Cache) -> Timing:
    """A greedy generation of exactly so many tokens."""
    arrivals = Arrivals()
    started = time.perf_counter()
    sequences = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, cache_implementation=None if cache == "dynamic" else cache, pad_token_id=0, streamer=arrivals,
    )  # fmt: skip
    _, first, *others = arrivals.times_s
    steps = [after - before for before, after in zip([first, *others], others, strict=False)]
    tokens = tuple(sequences[0, prompt.shape[1] :].tolist())
    return Timing(first - started, tuple(steps), tokens)


def warm_and_timed(model: Any, prompt: Tensor, new_tokens: int, cache: Cache) -> Timing:
    """A generation that warms up and the measured one; a static cache's length is part of what is compiled."""
    generate_timed(model, prompt, new_tokens if cache == "static" else min(new_tokens, WARM_UP_TOKENS), cache)
    return generate_timed(model, prompt, new_tokens, cache)


def with_peak(work: Callable[[], Timing]) -> tuple[Timing, int | None]:
    """``work`` and the most device memory that torch's allocator had reserved in it; None without CUDA."""
    if not torch.cuda.is_available():
        return work(), None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    timing = work()
    return timing, torch.cuda.max_memory_reserved()
