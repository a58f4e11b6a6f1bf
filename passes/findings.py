"""What analyses leave for the passes after them: costs, blocks, effects, memory, the simulated step.

Nodes are named by their places in program order (``NodeInfo.position``) where the graph is still to be rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import sympy
from torch import fx


@dataclass(frozen=True)
class NodeCost:
    """One node's work at the context's sizes and what each resource needs for all of it.

    ``flops`` and bytes are plain numbers; ``link_s`` is the time to stream a Linear's whole weight (0 for
    other nodes), ``link_lost_s`` what the link loses while the host reads that weight. ``host_s`` is beside a working
    link, ``host_alone_s`` without. ``tokens`` is the number of rows of a Linear's activations.
    """

    flops: float
    traffic_bytes: float
    weight_bytes: int
    tokens: int
    host_s: float
    accelerator_s: float
    link_s: float
    host_alone_s: float | None = None
    link_lost_s: float = 0.0

    @property
    def contention(self) -> float:
        """Share of the host's rate that remains while the link works."""
        return 1.0 if not self.host_alone_s or not self.host_s else min(1.0, self.host_alone_s / self.host_s)


Costs = Mapping[int, NodeCost]
"""Costs of the nodes by their place in program order (``NodeInfo.position``)."""


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


class LinearOperands(NamedTuple):
    """Positions in the program of what a Linear multiplies and adds, and how its weight is stored."""

    x: int
    weight: int
    bias: int | None
    dim: int


@dataclass(frozen=True)
class Effects:
    """What the captured program does to memory and multiplies; storages are those of ``NodeInfo``.

    Attributes:
        writes: for each storage that is written in place, the program positions of the writes, ascending.
        writers: the nodes at these positions, as errors name them.
        outputs: the storages of each returned value, in order.
        linears: the operands of each Linear, by its position.
    """

    writes: Mapping[int, tuple[int, ...]]
    writers: Mapping[int, str]
    outputs: tuple[frozenset[int], ...]
    linears: Mapping[int, LinearOperands]


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
        largest_twice: whether the largest value counts once more (``Context.largest_twice``).
        uploads: on a GPU the lives of what the link's queue brings up, which count by themselves: torch's allocator
            keeps memory by the stream that it was made on, so the one's peak is not let to the other.
    """

    lives: tuple[Life, ...]
    workspace: Mapping[fx.Node, sympy.Expr | int]
    largest_twice: bool = False
    uploads: tuple[Life, ...] = ()

    def peak_bytes(self, nbytes: Callable[[sympy.Expr], float]) -> int:
        """Most bytes at one point, ``nbytes`` evaluating the sizes."""
        known = {size: int(nbytes(size)) for size in {size for _, _, size in (*self.lives, *self.uploads)}}
        peaks = [
            most_at_once((born, dies, known[size]) for born, dies, size in lives)
            for lives in (self.lives, self.uploads)
        ]
        return sum(peaks) + (max(known.values(), default=0) if self.largest_twice else 0)


class Work(NamedTuple):
    """What one node occupies: a resource (``host``, ``accelerator``, ``up``, ``down``, ``pin``) for some seconds.

    ``issue_s`` is what issuing it to that resource costs the host thread.
    """

    resource: str
    seconds: float
    issue_s: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """The simulated step: per node its work and its interval, in seconds from the start of the step.

    ``beside_link_s``: where the link is at work all the time, what the step would take if every streamed row arrived
    at once; else ``step_s``.
    """

    work: Mapping[fx.Node, Work]
    start_s: Mapping[fx.Node, float]
    end_s: Mapping[fx.Node, float]
    step_s: float
    busy_s: Mapping[str, float]
    beside_link_s: float
