"""What a child of the comparison is asked for and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hetegen_compile.bench.timing import Cache
from hetegen_compile.options import format_bytes

HETEGEN, STREAMED, HOST_ROWS = "hetegen", "all streamed", "host rows"
AHEAD, IN_TURN = "hetegen, issued ahead", "hetegen, in turn"
"""The plan of the cost model with a worker and gates, or without: what ``issue_ahead="auto"`` has not chosen."""


@dataclass(frozen=True)
class Job:
    """One way at one memory limit.

    Attributes:
        way: a name of ``WAYS``.
        shape: of ``random_models.SHAPES``.
        dtype: of weights and activations.
        gpu_memory: bytes; None where the limit does not matter.
        prompt, new_tokens: tokens of the measured generation.
        threads: of torch on the host; None: torch's default.
        accelerator: "cuda" or "emulated".
        hardware: profile of hetegen's cost model.
        cache: of keys and values where the model is compiled; peers have the one that grows.
        step_s: emulated: a decode step is paced to take at least so long.
        trace: file for the trace of a decode step, or None.
        issue_ahead: that option of hetegen; "auto" also measures what it has not chosen.
        others_s: seconds of the child's life after which none of hetegen's other ways is begun; None: all are measured.
    """

    way: str
    shape: str
    dtype: str
    gpu_memory: int | None
    prompt: int
    new_tokens: int
    threads: int | None
    accelerator: str
    hardware: str
    step_s: float
    cache: Cache = "static"
    trace: str | None = None
    issue_ahead: bool | Literal["auto"] = "auto"
    others_s: float | None = None

    @property
    def name(self) -> str:
        """For files and progress."""
        limit = "" if self.gpu_memory is None else f", {format_bytes(self.gpu_memory)}"
        return f"{self.way}{limit}"


@dataclass(frozen=True)
class Row:
    """One way at one memory limit, measured.

    Attributes:
        way: what ran.
        gpu_memory: the limit; None: it does not hold for this way.
        prefill_tokens_per_s, decode_tokens_per_s: by the clock; on a paced accelerator of the profile's clock.
        decode_steps_s: seconds of each decode step.
        peak_bytes: of accelerator memory that the process reserved.
        predicted_tokens_per_s, floor_tokens_per_s: of decode, by the cost model.
        tokens: what was generated.
        steps: on CUDA what each decode step spent its time on (``recorder.Step``).
        note: why there are no figures, or what to know about them.
    """

    way: str
    gpu_memory: int | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    decode_steps_s: tuple[float, ...] = ()
    peak_bytes: int | None = None
    predicted_tokens_per_s: float | None = None
    floor_tokens_per_s: float | None = None
    tokens: tuple[int, ...] = ()
    note: str = ""
    steps: tuple[Mapping[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``Row(**values)`` makes it again."""
        return asdict(self)
