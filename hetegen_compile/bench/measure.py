"""Measure a model's generation under several splits of one compilation."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hetegen_compile.bench.timing import CACHES, Cache, Timing, warm_and_timed, with_peak
from hetegen_compile.bench.weights import random_model
from hetegen_compile.dry_run.models import DTYPES, generates, named_config
from hetegen_compile.errors import BudgetError, OptionError, UnsupportedModelError
from hetegen_compile.options import parse_options, whole_number
from hetegen_compile.overrides import override_issue_ahead, override_split
from hetegen_compile.reports.schedule import Schedule, schedules

logger = logging.getLogger("hetegen_compile")

Split = float | Literal["auto"]


class Way(NamedTuple):
    """What is measured by a name; ``issue_ahead``: None for what the options say."""

    split: Split = "auto"
    issue_ahead: bool | None = None


SPLITS: Mapping[str, Split] = {"hetegen": "auto", "all streamed": 0.0}
"""What is compared by name: the plan of the cost model, and the same residency with everything else streamed."""


@dataclass(frozen=True)
class Measured:
    """One split.

    Attributes:
        way: its name.
        timing: of one generation; on a paced accelerator in the profile's seconds times the pace.
        pace: 1.0 where the accelerator runs at its own speed.
        peak_bytes: of accelerator memory.
        schedule: the plan of a decode step.
        cache: the generation's.
    """

    way: str
    timing: Timing
    pace: float
    peak_bytes: int
    schedule: Schedule
    cache: Cache


def bench(
    source: str, *, dtype: str, prompt: int, new_tokens: int, options: Mapping[str, Any], cache: Cache = "dynamic"
) -> list[Measured]:
    """Random weights in the shape of a named model, one greedy generation for each split.

    Raises:
        OptionError: a dtype, a cache, an option or a number of tokens that cannot be.
        UnsupportedModelError: no such model, or not a causal language model.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: valid are {', '.join(map(repr, DTYPES))}")
    if cache not in CACHES:
        raise OptionError(f"cache={cache!r}: valid are {', '.join(map(repr, CACHES))}")
    whole_number("prompt", prompt, at_least=1)
    whole_number("new_tokens", new_tokens, at_least=2)  # the first is the prefill's
    parse_options(options)
    config = named_config(source)
    if not generates(config):
        raise UnsupportedModelError(f"{source} ({config.model_type}) is no causal language model")
    model = random_model(config, DTYPES[dtype])
    tokens = torch.randint(4, config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    return list(measure_splits(model, tokens, new_tokens, {"context": prompt + new_tokens, **options}, cache=cache))


def measure_splits(
    model: Any,
    prompt: Tensor,
    new_tokens: int,
    options: Mapping[str, Any],
    splits: Mapping[str, Split] | Iterable[tuple[str, Way]] = SPLITS,
    *,
    cache: Cache,
) -> Iterator[Measured]:
    """Compile once, generate under each split: a generation that warms up and a measured one.

    ``splits`` that are no mapping are asked for one by one, so that they may depend on what was found.

    A split whose activations leave no room for the residency that was decided is compiled by itself, with its own.
    """
    compile_anew(model, options)
    pace = options.get("pace") or 1.0
    alone = False
    for name, way in _ways(splits):
        if alone:
            compile_anew(model, options)  # this one is compared under the common residency again
            alone = False
        known = schedules()
        try:
            timing, peak = _timed(model, prompt, new_tokens, way, cache)
        except BudgetError as error:
            logger.warning("%s is compiled by itself: %s", name, error)
            alone = True
            compile_anew(model, {**options, "split": way.split})
            timing, peak = _timed(model, prompt, new_tokens, way, cache)
        schedule = decode_schedule(way.split, known)
        yield Measured(name, timing, pace, peak or schedule.accelerator_peak_bytes, schedule, cache)


def _ways(splits: Mapping[str, Split] | Iterable[tuple[str, Way]]) -> Iterable[tuple[str, Way]]:
    if isinstance(splits, Mapping):
        return [(name, Way(split)) for name, split in splits.items()]
    return splits


def compile_anew(model: Any, options: Mapping[str, Any]) -> None:
    """Compile with hetegen; nothing is left of earlier compilations."""
    torch._dynamo.reset()
    gc.collect()  # graphs that are still alive share the accelerator and its budget
    model.compile(backend="hetegen", options=dict(options))


def _timed(model: Any, prompt: Tensor, new_tokens: int, way: Way, cache: Cache) -> tuple[Timing, int | None]:
    with override_split(way.split), override_issue_ahead(way.issue_ahead):
        return with_peak(lambda: warm_and_timed(model, prompt, new_tokens, cache))


def decode_schedule(split: Split, known: Sequence[Schedule] = ()) -> Schedule:
    """The newest plan of one token with this split that is not ``known``.

    Raises:
        UnsupportedModelError: there is none, so the model did not run through hetegen.
    """
    old = set(map(id, known))
    found = [s for s in schedules() if s.tokens == (1, 1) and s.split == split and id(s) not in old]
    if not found or not found[-1].rows:
        reasons = [refusal.reason for schedule in schedules() for refusal in schedule.refusals]
        raise UnsupportedModelError(f"no decode step was planned for this model: {'; '.join(reasons) or 'no graph'}")
    return found[-1]
