"""What every pass is given: one frozen context.

A pass is ``pass_(module, context)``. An analysis returns a value (``findings``), a decision a frozen plan (``plans``),
a rewrite changes the module in place and returns None. The runner puts what a pass returned into the context's
field of the same meaning, so that a pass that runs too early fails on None and not on a stale value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor, fx

from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.options import Options
from hetegen_compile.passes.claims import HostWeights, ResidentWeights, Way
from hetegen_compile.passes.expressions import evaluate
from hetegen_compile.passes.findings import Block, Costs, Effects, MemoryNeed, Prediction
from hetegen_compile.passes.plans import UNFORESEEN, Placement, Residency, Splits


@dataclass(frozen=True)
class Bucket:
    """A range of tokens per forward that one plan serves, both ends included; ``high`` None is open."""

    low: int
    high: int | None


@dataclass(frozen=True)
class Refusal:
    """Something that was left as it was, and why; shown by ``explain()``."""

    where: str
    reason: str


class HostOnlyGraphError(Exception):
    """The graph has to run on the host as it is: the two sides would write and read one storage in ways that no
    transfer of values keeps in step. The message says which nodes."""


ON_HOST = "runs on the host in eager mode"
"""What becomes of a graph that raised it."""

SegmentCompiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""From a segment and example inputs to a callable that takes the inputs and returns a sequence."""


@dataclass(frozen=True)
class SegmentCache:
    """Compiled segments of one captured graph, by key; shared by the plans of all its buckets.

    ``refused`` has the reason for each that the compiler failed on and that runs as plain FX code.
    """

    compile_segment: SegmentCompiler
    compiled: MutableMapping[Hashable, Callable[..., Any]]
    refused: MutableMapping[Hashable, Refusal] = field(default_factory=dict)


def _no_runner(refusal: Refusal) -> None:
    raise AssertionError(f"nobody would tell that {refusal.where} is left as it is: run the pass in a pipeline")


@dataclass(frozen=True)
class Context:
    """Everything a pass may know. Fields from ``effects`` on are filled in as the pipeline runs.

    Attributes:
        options, profile: what the user chose, and the hardware.
        sizes: of the call that the plan is made for.
        bucket: the numbers of tokens that the plan serves.
        budget_bytes: the hard limit on the accelerator's memory.
        resident: weights that other graphs already keep there.
        weights: the model's, by placeholder.
        segments: those compiled for other plans of the graph.
        activation_bytes: what a schedule of the same graph is known to need for activations; None: it is estimated.
        residency_way: how the memory for resident weights is shared out; None: as is estimated to be best.
        lean: the smallest ring and no resident weights.
        share_trips: whether Linears with the same input share a trip; else each has one of its own.
        largest: the sizes that the budget has room for; ``spare``: whether that includes room beyond the context and
            the batch that the options state.
        lengths: sizes that grow from step to step (of caches and masks).
        sequences: those of this call; ``tokens_per_sequence``: how many each of them gets (0: unknown).
        overhead_bytes: what the device's libraries take of the budget, item by item.
        device: where segments will run.
        cannot_issue_ahead: why the accelerator has no worker ("": it has).
        host_memory: says what has to be staged; None: all weights are pinned.
        staged: placeholders of the weights whose rows go through the pinned ring, with the reason.

    A stage tells the runner by ``refuse`` what it leaves as it is; ``refused`` has it under the stage's name until that
    stage runs again.
    """

    options: Options
    profile: HardwareProfile
    sizes: Mapping[sympy.Symbol, sympy.Integer]
    bucket: Bucket
    budget_bytes: int
    resident: ResidentWeights
    weights: Mapping[str, Tensor]
    segments: SegmentCache
    refuse: Callable[[Refusal], None] = _no_runner
    refused: Mapping[str, tuple[Refusal, ...]] = field(default_factory=dict)
    activation_bytes: int | None = None
    residency_way: Way | None = None
    lean: bool = False
    share_trips: bool = True
    largest: Mapping[sympy.Symbol, sympy.Integer] = field(default_factory=dict)
    lengths: frozenset[sympy.Symbol] = frozenset()
    spare: bool = True
    tokens_per_sequence: int = 0
    sequences: int = 0
    overhead_bytes: Mapping[str, int] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    cannot_issue_ahead: str = ""
    host_memory: HostWeights | None = None
    effects: Effects | None = None
    blocks: tuple[Block, ...] = ()
    costs: Costs | None = None
    staged: Mapping[str, str] = field(default_factory=dict)
    residency: Residency | None = None
    splits: Splits | None = None
    placement: Placement | None = None
    memory: MemoryNeed | None = None
    prediction: Prediction | None = None

    @property
    def usable_bytes(self) -> int:
        """The budget less what the device's libraries take of it and what is kept for what was not foreseen."""
        return self.budget_bytes - sum(self.overhead_bytes.values())

    @property
    def limit_bytes(self) -> int:
        """What a step may hold: what was not foreseen, too."""
        return self.usable_bytes + self.overhead_bytes.get(UNFORESEEN, 0)

    @property
    def largest_twice(self) -> bool:
        """Whether room is kept for the largest value once more, and for large uploads beside everything else.

        A GPU's memory goes through torch's allocator: what is free may lie in pieces, and what came up on another
        stream may be given back later than the host lets go of it. The emulated accelerator counts what is alive.
        A dry run for a GPU says so by the option: it has no device.
        """
        return self.device.type == "cuda" or self.options.accelerator == "cuda"

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What is left as it is, each once, in the order of the stages."""
        return tuple(dict.fromkeys(refusal for refusals in self.refused.values() for refusal in refusals))

    def refusing(self, stage: str, refusals: Iterable[Refusal]) -> Context:
        """The context with what ``stage`` refuses now in the place of what it refused before."""
        return replace(self, refused={**self.refused, stage: tuple(refusals)})

    def number(self, expression: sympy.Expr) -> float:
        """A cost expression at this context's sizes; a size that depends on data counts as 1."""
        return evaluate(expression, self.sizes)

    def room(self, expression: sympy.Expr) -> int:
        """Bytes that the budget keeps for what has ``expression`` bytes: at the largest sizes, never less than now."""
        now = self.number(expression)
        return int(max(now, evaluate(expression, {**self.sizes, **self.largest})) if self.largest else now)


_T = TypeVar("_T")


def require(value: _T | None, stage: str) -> _T:
    """``value``, or an error that says which stage has to run before."""
    if value is None:
        raise AssertionError(f"{stage} has to run before this pass")
    return value
