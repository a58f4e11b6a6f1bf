"""A predicted generation: what ``plan_generation`` returns and the report reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetegen_compile.reports.schedule import Schedule
from hetegen_compile.reports.verdict import verdict


@dataclass(frozen=True)
class Generation:
    """Seconds of a whole generation, and what they make of tokens."""

    prefill_s: float
    decode_s: float
    tokens: int

    @property
    def total_s(self) -> float:
        """Seconds from the prompt to the last token."""
        return self.prefill_s + self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences per second of the whole generation."""
        return self.tokens / self.total_s


@dataclass(frozen=True)
class GenerationPlan:
    """A predicted generation. All figures are predictions of the cost model on the named hardware.

    Attributes:
        model, hardware, dtype: what it is of, for people.
        prompt, new_tokens, batch, context: tokens of a prompt, tokens generated for each sequence (0: an encoder),
            sequences, and the tokens of cache that the budget holds.
        prefill: the schedule of the prompt's forward.
        decode: the schedule of one token at the longest context that the budget holds; None without decode steps.
        decode_step_s: seconds of a decode step by the tokens in the cache: first, middle and last.
        ours: the whole generation with this plan.
        floor_s: a bound for the whole generation that no schedule beats.
        baselines: the whole generation done otherwise; None where it does not fit.
        accelerator_bytes: peak bytes on the accelerator, item by item, of the forward that needs most.
        budget_bytes: the limit that they keep to.
        host_bytes: peak bytes in host memory, item by item; ``pinned_bytes`` of the weights are pinned in place.
        host_memory_bytes: what the hardware has.
        notes: what a reader has to know.
    """

    model: str
    hardware: str
    dtype: str
    prompt: int
    new_tokens: int
    batch: int
    context: int
    prefill: Schedule
    decode: Schedule | None
    decode_step_s: Mapping[int, float]
    ours: Generation
    floor_s: float
    baselines: Mapping[str, Generation | None]
    accelerator_bytes: Mapping[str, int]
    budget_bytes: int
    host_bytes: Mapping[str, int]
    pinned_bytes: int
    host_memory_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def prefill_s(self) -> float:
        """Seconds of the prompt's forward."""
        return self.ours.prefill_s

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second over the whole generation, prefill included."""
        return self.ours.tokens_per_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens per second of the decode steps alone; None without any."""
        steps = self.new_tokens - 1
        return self.batch * steps / self.ours.decode_s if self.decode is not None and steps else None

    @property
    def verdict(self) -> str:
        """What splitting buys on this hardware, or that it buys nothing."""
        return verdict(
            self.ours.total_s, {name: None if one is None else one.total_s for name, one in self.baselines.items()}
        )

    @property
    def accelerator_peak_bytes(self) -> int:
        """Most bytes on the accelerator at one time."""
        return sum(self.accelerator_bytes.values())

    @property
    def host_peak_bytes(self) -> int:
        """Most bytes in host memory at one time."""
        return sum(self.host_bytes.values())
