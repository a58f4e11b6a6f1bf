"""What every pass is given: one frozen context, and the plans that earlier passes decided.

A pass is ``pass_(module, context)``. An analysis returns a value, a decision a frozen plan, a rewrite
changes the module in place and returns None. The runner puts what a pass returned into the context's
field of the same meaning, so that a pass that runs too early fails on None and not on a stale value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import sympy
import torch
from torch import Tensor, fx

from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.options import Options


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


@dataclass(frozen=True)
class NodeCost:
    """One node's work at the context's sizes and what each resource needs for all of it.

    ``flops`` and bytes are plain numbers; ``link_s`` is the time to stream a Linear's whole weight (0 for
    other nodes). ``tokens`` is the number of rows of a Linear's activations.
    """

    flops: float
    traffic_bytes: float
    weight_bytes: int
    tokens: int
    host_s: float
    accelerator_s: float
    link_s: float


Costs = Mapping[int, NodeCost]
"""Costs of the nodes by their place in program order (``NodeInfo.position``)."""


@dataclass(frozen=True)
class LinearPlan:
    """Which rows of one Linear's weight are consumed where; the ranges tile ``[0, rows)`` in this order."""

    rows: int
    host: int
    streamed: tuple[tuple[int, int], ...]
    resident: tuple[int, int] | None

    @property
    def streamed_rows(self) -> int:
        return sum(hi - lo for lo, hi in self.streamed)

    @property
    def resident_rows(self) -> int:
        return 0 if self.resident is None else self.resident[1] - self.resident[0]


Splits = Mapping[int, LinearPlan]
"""Plans of the Linears by their place in program order (``NodeInfo.position``)."""


GROWTH = "room for caches to grow"
"""The budget's item for inputs and outputs of varying size, half of it for each."""


@dataclass(frozen=True)
class Residency:
    """Weights that stay on the accelerator, and how its memory is shared out, item by item in bytes.

    ``weights`` maps the placeholder's name to the first row that is resident; the rows after it are, too.

    ``whole_graph`` says that everything fits: nothing is offloaded and the graph is compiled in one piece.
    ``evicts`` says that weights of other graphs have to leave first.
    """

    weights: Mapping[str, int]
    ring_bytes: int
    chunk_bytes: int
    budget: Mapping[str, int]
    whole_graph: bool = False
    evicts: bool = False

    @property
    def transient_bytes(self) -> int:
        """What a step makes beside what it reads: activations, and the growth of the caches that it returns."""
        return self.budget["activations"] + self.budget[GROWTH] // 2


@dataclass(frozen=True)
class Placement:
    """Sides of the nodes that are not Linears; a node may be on both.

    ``written_back`` maps a placeholder that the graph writes in a way only the accelerator repeats to the
    reason: it is copied back whole after each step.
    """

    host: frozenset[fx.Node]
    accelerator: frozenset[fx.Node]
    written_back: Mapping[fx.Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Effects:
    """What the captured program does to memory; storages are those of ``NodeInfo``.

    Attributes:
        writes: for each storage that is written in place, the program positions of the writes, ascending.
        writers: the nodes at these positions, as errors name them.
        outputs: the storages of each returned value, in order.
    """

    writes: Mapping[int, tuple[int, ...]]
    writers: Mapping[int, str]
    outputs: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Work:
    """What one node occupies: a resource (``host``, ``accelerator``, ``up``, ``down``, ``pin``) for some seconds."""

    resource: str
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """The simulated step: per node its work and its interval, in seconds from the start of the step."""

    work: Mapping[fx.Node, Work]
    start_s: Mapping[fx.Node, float]
    end_s: Mapping[fx.Node, float]
    step_s: float
    lower_bound_s: float
    busy_s: Mapping[str, float]


SegmentCompiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""From a segment and example inputs to a callable that takes the inputs and returns a sequence."""


@dataclass(frozen=True)
class SegmentCache:
    """Compiled segments of one captured graph, by key; shared by the plans of all its buckets."""

    compile_segment: SegmentCompiler
    compiled: MutableMapping[Hashable, Callable[..., Any]]


class HostOnlyGraphError(Exception):
    """The graph has to run on the host as it is: the two sides would write and read one storage in ways that no
    transfer of values keeps in step. The message says which nodes."""


class ResidentWeights(Protocol):
    """What the residency decision needs to know about weights that are already on the accelerator."""

    def is_resident(self, weight: Tensor) -> bool:
        """Whether the whole weight is on the accelerator already."""

    def held_bytes(self) -> int:
        """Bytes of all resident weights, those of other graphs included."""


class HostWeights(Protocol):
    """What the staging decision needs to know about the host memory that weights lie in."""

    def staged(self, names: Collection[str], weights: Mapping[str, Tensor]) -> Mapping[str, str]:
        """Those of ``names`` that can be neither pinned nor adopted, with the reason; ``weights`` are all there are."""


@dataclass(frozen=True)
class Context:
    """Everything a pass may know. Fields from ``effects`` on are filled in as the pipeline runs.

    ``activation_bytes`` is what an earlier schedule of the same graph is known to need for activations;
    ``ring_bytes`` the length that the accelerator's staging ring has already; ``device`` where segments will run;
    ``host_memory`` None says that all weights are pinned. ``staged`` are the placeholders of the weights whose rows
    go through the pinned ring, with the reason.
    """

    options: Options
    profile: HardwareProfile
    sizes: Mapping[sympy.Symbol, sympy.Integer]
    bucket: Bucket
    budget_bytes: int
    resident: ResidentWeights
    weights: Mapping[str, Tensor]
    refuse: Callable[[Refusal], None]
    segments: SegmentCache
    refusals: tuple[Refusal, ...] = ()
    activation_bytes: int = 0
    ring_bytes: int = 0
    device: torch.device = torch.device("cpu")
    host_memory: HostWeights | None = None
    effects: Effects | None = None
    costs: Costs | None = None
    staged: Mapping[str, str] = field(default_factory=dict)
    residency: Residency | None = None
    splits: Splits | None = None
    placement: Placement | None = None
    prediction: Prediction | None = None

    def number(self, expression: sympy.Expr) -> float:
        """A cost expression at this context's sizes; a size that depends on data counts as 1."""
        if not expression.free_symbols:
            return float(expression)
        unknown = dict.fromkeys(expression.free_symbols - self.sizes.keys(), sympy.Integer(1))
        return float(expression.xreplace({**self.sizes, **unknown}))


_T = TypeVar("_T")


def require(value: _T | None, stage: str) -> _T:
    """``value``, or an error that says which stage has to run before."""
    if value is None:
        raise AssertionError(f"{stage} has to run before this pass")
    return value
