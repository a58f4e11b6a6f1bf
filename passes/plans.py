"""What decisions leave for the rewrites after them: rows of each Linear, residency and its budget, sides of nodes.

Plans are frozen, and change nothing by themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from torch import fx

from hetegen_compile.passes.claims import Claim, Way


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


MIRRORED = "mirrors of inputs, buffers and caches"
"""The budget's item for what the step reads beside weights, at the sizes of this call."""
ACTIVATIONS = "activations"
"""The budget's item for what the step makes, segments' inner values included, at the largest sizes of the plan."""
GROWTH = "room for caches to grow"
"""The budget's item for what caches take beyond this call, up to the stated context."""
BATCHES = "room for larger batches"
"""The budget's item for the sequences up to ``max_batch`` that this call does not have."""
BESIDE = "beside caches that grow"
"""The budget's item for one of them while it moves, and on a GPU for what lies idle between and behind them."""
OTHERS = "steps of other graphs"
"""The budget's item for what other graphs on the accelerator need beyond this one."""
UNFORESEEN = "what earlier plans did not foresee"
"""The budget's item for what a step or its verification needed beyond an earlier plan."""
RESIDENT = "resident weights"
RING = "staging ring"
_STEP = (MIRRORED, ACTIVATIONS, GROWTH, BATCHES, BESIDE, UNFORESEEN)

STAGED_CHUNK_BYTES = 16 << 20
"""Bytes of a chunk of a staged weight: where the link's rate has levelled off, so the pinned ring stays small."""


@dataclass(frozen=True)
class Residency:
    """Weights that stay on the accelerator, and how its memory is shared out, item by item in bytes.

    ``weights`` maps the placeholder's name to the first row that is resident; the rows after it are, too (0: all, as of
    what cannot be split).

    Attributes:
        whole_graph: everything fits: nothing is offloaded and the graph is compiled in one piece.
        claims: what this graph would keep on the accelerator.
        first_rows: first resident row of every claimed weight, those of other graphs included (a weight of no
            resident row is not in it).
        mirrored: bytes of the mirrors that the step reads, an expression over the graph's sizes.
        beside: bytes that caches which grow take beside themselves, the same.
        host_weights: placeholders of weights that cannot be split and stay on the host, with what computes with them.
        streamed_stacks: placeholders of stacks of experts that are streamed, each whole.
        stack_chunk_bytes: most bytes of a part of such a stack; one expert at least.
        unsplit_bytes: of weights that cannot be split and are resident.
        tables: embedding tables that are mirrored, too, because everything fits: nothing is left to the host.
        staged_chunk_bytes: most bytes of a chunk of a weight that goes through the pinned ring.
        ways: other ways of sharing out the memory (``Context.residency_way``), best estimate first.
    """

    weights: Mapping[str, int]
    ring_bytes: int
    chunk_bytes: int
    budget: Mapping[str, int]
    whole_graph: bool = False
    claims: Sequence[Claim] = ()
    first_rows: Mapping[Hashable, int] = field(default_factory=dict)
    mirrored: sympy.Expr = sympy.Integer(0)
    beside: sympy.Expr = sympy.Integer(0)
    host_weights: frozenset[str] = frozenset()
    streamed_stacks: frozenset[str] = frozenset()
    stack_chunk_bytes: int = 0
    unsplit_bytes: int = 0
    tables: frozenset[str] = frozenset()
    staged_chunk_bytes: int = STAGED_CHUNK_BYTES
    ways: tuple[Way, ...] = ()

    @property
    def step_bytes(self) -> int:
        """What this graph's step needs beside resident weights and the ring."""
        return step_bytes(self.budget)


def step_bytes(budget: Mapping[str, int]) -> int:
    """What a step takes of a budget beside resident weights, the ring, and what the device's libraries take."""
    return sum(budget.get(item, 0) for item in _STEP)


@dataclass(frozen=True)
class Placement:
    """Sides of the nodes that are not Linears; a node may be on both.

    ``written_back`` maps a placeholder that the graph writes in a way only the accelerator repeats to the
    reason: it is copied back whole after each step.
    """

    host: frozenset[fx.Node]
    accelerator: frozenset[fx.Node]
    written_back: Mapping[fx.Node, str] = field(default_factory=dict)
