"""What every pass is given: one frozen context, and the plans that earlier passes decided.

A pass is ``pass_(module, context)``. An analysis returns a value, a decision a frozen plan, a rewrite
changes the module in place and returns None. The runner puts what a pass returned into the context's
field of the same meaning, so that a pass that runs too early fails on None and not on a stale value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, TypeVar

import sympy
import torch
from torch import Tensor, fx

from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.options import Options
from hetegen_compile.passes.expressions import evaluate


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
    other nodes). ``host_s`` is beside a working link, ``host_alone_s`` without. ``tokens`` is the number of rows of a
    Linear's activations.
    """

    flops: float
    traffic_bytes: float
    weight_bytes: int
    tokens: int
    host_s: float
    accelerator_s: float
    link_s: float
    host_alone_s: float | None = None

    @property
    def contention(self) -> float:
        """Share of the host's rate that remains while the link works."""
        return 1.0 if not self.host_alone_s or not self.host_s else min(1.0, self.host_alone_s / self.host_s)


Costs = Mapping[int, NodeCost]
"""Costs of the nodes by their place in program order (``NodeInfo.position``)."""


@dataclass(frozen=True)
class LinearPlan:
    """Which rows of one Linear's weight are consumed where; the ranges tile ``[0, rows)`` in this order.

    In a block, which has no resident rows, "rows" are ranges along the axis that the block's intermediate lies on;
    where a Linear makes several intermediates side by side (``ways``), each of them has its host part first.

    Attributes:
        rows: length of the axis that is cut.
        host: how many of them are the host's.
        streamed: ranges that are prefetched, each in a slot of its own.
        resident: the range that lies on the accelerator.
        axis: of the weight as it is stored.
        block: position of the last Linear of the block that this one is cut with; None: it is cut by itself.
        ways: intermediates of the block that this Linear makes.
        lines: where columns are streamed as rectangles, the rows of each: they lie further together than the same bytes
            cut by columns, and their results are columns of one partial sum.
    """

    rows: int
    host: int
    streamed: tuple[tuple[int, int], ...]
    resident: tuple[int, int] | None
    axis: int = 0
    block: int | None = None
    ways: int = 1
    lines: tuple[tuple[int, int], ...] = ()

    @property
    def host_ranges(self) -> tuple[tuple[int, int], ...]:
        """The host's ranges, one for each of the ``ways``."""
        width, host = self.rows // self.ways, self.host // self.ways
        return tuple((way * width, way * width + host) for way in range(self.ways)) if host else ()

    @property
    def streamed_rows(self) -> int:
        return sum(hi - lo for lo, hi in self.streamed)

    @property
    def resident_rows(self) -> int:
        return 0 if self.resident is None else self.resident[1] - self.resident[0]


Splits = Mapping[int, LinearPlan]
"""Plans of the Linears by their place in program order (``NodeInfo.position``)."""


@dataclass(frozen=True)
class Block:
    """Linears of one input, pointwise operations on their results, and the one Linear that reads what comes of them.

    Nodes are named by their places in program order.

    Attributes:
        siblings: the Linears that read the block's input.
        ways: for each of them how many intermediates lie side by side in its result (2 for a fused gate and up).
        parts: (node, sibling, way) for each view that is one of a sibling's intermediates.
        region: the nodes that compute between the Linears, in program order.
        consumer: the Linear at the end.
        columns: columns of one intermediate.
    """

    siblings: tuple[int, ...]
    ways: tuple[int, ...]
    parts: tuple[tuple[int, int, int], ...]
    region: tuple[int, ...]
    consumer: int
    columns: int

    @property
    def linears(self) -> tuple[int, ...]:
        """All Linears of the block."""
        return (*self.siblings, self.consumer)


MIRRORED = "mirrors of inputs, buffers and caches"
"""The budget's item for what the step reads beside weights, at the sizes of this call."""
ACTIVATIONS = "activations"
"""The budget's item for what the step makes, segments' inner values included, at the largest sizes of the plan."""
GROWTH = "room for caches to grow"
"""The budget's item for what caches take beyond this call, up to the stated context."""
BATCHES = "room for larger batches"
"""The budget's item for the sequences up to ``max_batch`` that this call does not have."""
OTHERS = "steps of other graphs"
"""The budget's item for what other graphs on the accelerator need beyond this one."""
UNFORESEEN = "what earlier plans did not foresee"
"""The budget's item for what a step or its verification needed beyond an earlier plan."""
RESIDENT = "resident weights"
RING = "staging ring"

STAGED_CHUNK_BYTES = 16 << 20
"""Bytes of a chunk of a staged weight: where the link's rate has levelled off, so the pinned ring stays small."""


@dataclass(frozen=True)
class Residency:
    """Weights that stay on the accelerator, and how its memory is shared out, item by item in bytes.

    ``weights`` maps the placeholder's name to the first row that is resident; the rows after it are, too (a stack: 0).

    Attributes:
        whole_graph: everything fits: nothing is offloaded and the graph is compiled in one piece.
        claims: what this graph would keep on the accelerator.
        first_rows: first resident row of every claimed weight, those of other graphs included (a weight of no
            resident row is not in it).
        mirrored: bytes of the mirrors that the step reads, an expression over the graph's sizes.
        host_weights: placeholders of stacked weights that stay on the host, with what is computed with them.
        stack_bytes: of stacked weights that are resident.
        tables: embedding tables that are mirrored, too, because everything fits: nothing is left to the host.
        staged_chunk_bytes: most bytes of a chunk of a weight that goes through the pinned ring.
    """

    weights: Mapping[str, int]
    ring_bytes: int
    chunk_bytes: int
    budget: Mapping[str, int]
    whole_graph: bool = False
    claims: Sequence[Claim] = ()
    first_rows: Mapping[Hashable, int] = field(default_factory=dict)
    mirrored: sympy.Expr = sympy.Integer(0)
    host_weights: frozenset[str] = frozenset()
    stack_bytes: int = 0
    tables: frozenset[str] = frozenset()
    staged_chunk_bytes: int = STAGED_CHUNK_BYTES

    @property
    def step_bytes(self) -> int:
        """What this graph's step needs beside resident weights and the ring."""
        return sum(self.budget.get(item, 0) for item in (MIRRORED, ACTIVATIONS, GROWTH, BATCHES))


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
    """What one node occupies: a resource (``host``, ``accelerator``, ``up``, ``down``, ``pin``) for some seconds.

    ``issue_s`` is what issuing it to that resource costs the host thread.
    """

    resource: str
    seconds: float
    issue_s: float = 0.0


Life = tuple[int, int, sympy.Expr]
"""First and last place of a value in some order, and its bytes."""


def most_at_once(lives: Iterable[tuple[int, int, int]]) -> int:
    """Largest sum of bytes of (first place, last place, bytes) at one place, both ends included."""
    change: dict[int, int] = {}
    for born, dies, size in lives:
        change[born] = change.get(born, 0) + size
        change[dies + 1] = change.get(dies + 1, 0) - size
    return max(accumulate(change[place] for place in sorted(change)), default=0)


@dataclass(frozen=True)
class MemoryNeed:
    """What a schedule occupies on the accelerator beside mirrors, resident weights and the ring.

    Attributes:
        lives: (first point, last point, bytes) of each value, in points of issue order.
        workspace: for each node that has inner values, their most bytes at once.
    """

    lives: tuple[Life, ...]
    workspace: Mapping[fx.Node, sympy.Expr | int]

    def peak_bytes(self, nbytes: Callable[[sympy.Expr], float]) -> int:
        """Most bytes at one point, ``nbytes`` evaluating the sizes; the largest value counts once more.

        (The host runs ahead of the streams, so a value may be made before the one that it replaces is gone.)
        """
        known = {size: int(nbytes(size)) for size in {size for _, _, size in self.lives}}
        peak = most_at_once((born, dies, known[size]) for born, dies, size in self.lives)
        return peak + max(known.values(), default=0)


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
    """Compiled segments of one captured graph, by key; shared by the plans of all its buckets.

    ``refused`` has the reason for each that the compiler failed on and that runs as plain FX code.
    """

    compile_segment: SegmentCompiler
    compiled: MutableMapping[Hashable, Callable[..., Any]]
    refused: MutableMapping[Hashable, Refusal] = field(default_factory=dict)


class HostOnlyGraphError(Exception):
    """The graph has to run on the host as it is: the two sides would write and read one storage in ways that no
    transfer of values keeps in step. The message says which nodes."""


@dataclass(frozen=True)
class Claim:
    """A weight that a graph would keep on the accelerator.

    Attributes:
        key: the identity of its storage and of its place in it: graphs that share a weight share the key.
        rows, first: rows ``first:rows`` may be resident (those before are the host's by option).
        row_bytes: bytes of a row.
        gain_s_per_byte: seconds of a decode step that a resident byte saves.
        rank: a weight of higher rank gets what those of lower rank leave, whatever it gains.
    """

    key: Hashable
    rows: int
    first: int
    row_bytes: int
    gain_s_per_byte: float
    rank: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that may be resident."""
        return (self.rows - self.first) * self.row_bytes


class ResidentWeights(Protocol):
    """What the residency decision needs to know about the other graphs on the accelerator."""

    def identify(self, weight: Tensor) -> Hashable:
        """The key of a weight's claim."""

    def claims(self) -> Sequence[Sequence[Claim]]:
        """The claims of each other graph, oldest first."""

    def reserved_bytes(self) -> int:
        """The most that a step of another graph needs beside resident weights and the ring."""


class NothingResident:
    """An accelerator that no other graph uses."""

    def identify(self, weight: Tensor) -> Hashable:
        """By storage, and place in it."""
        return weight_key(weight)

    def claims(self) -> Sequence[Sequence[Claim]]:
        """None."""
        return ()

    def reserved_bytes(self) -> int:
        """Nothing."""
        return 0


class WeightKey(NamedTuple):
    """Identity of a weight while its storage lives: that storage, and where in it the weight lies, in elements."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def holds(self, offset: int) -> bool:
        """Whether what begins at ``offset`` of the storage is a part of the weight."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset <= offset <= self.offset + last


def weight_key(weight: Tensor) -> WeightKey:
    """Identity of a weight while its storage lives."""
    storage, offset = int(weight.untyped_storage()._cdata), int(weight.storage_offset())
    return WeightKey(storage, offset, tuple(weight.shape), tuple(weight.stride()))


class HostWeights(Protocol):
    """What the staging decision needs to know about the host memory that weights lie in."""

    def staged(self, names: Collection[str], weights: Mapping[str, Tensor]) -> Mapping[str, str]:
        """Those of ``names`` that can be neither pinned nor adopted, with the reason; ``weights`` are all there are."""


@dataclass(frozen=True)
class Context:
    """Everything a pass may know. Fields from ``effects`` on are filled in as the pipeline runs.

    ``largest`` are the sizes that the budget has room for, ``spare`` says whether beyond what the options state;
    ``sequences`` are those of this call, ``tokens_per_sequence`` those of a graph of fixed sizes (0: unknown).
    ``activation_bytes`` is what a schedule of the same graph is known to need for activations (None: an estimate is
    made); ``lean`` asks for the smallest ring and no resident weights; without ``share_trips`` each Linear has a
    trip of its own. ``ring_bytes`` is the length that other graphs gave the accelerator's staging ring;
    ``overhead_bytes`` what the device's libraries take, item by item; ``device`` where segments will run.
    ``host_memory`` None says that all weights are pinned. ``staged`` are the placeholders of the weights whose rows go
    through the pinned ring, with the reason.
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
    activation_bytes: int | None = None
    lean: bool = False
    share_trips: bool = True
    largest: Mapping[sympy.Symbol, sympy.Integer] = field(default_factory=dict)
    spare: bool = True
    tokens_per_sequence: int = 0
    sequences: int = 0
    ring_bytes: int = 0
    overhead_bytes: Mapping[str, int] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
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
