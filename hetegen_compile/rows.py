"""What reports show, of a plan and of steps that ran. A leaf: types without logic.

Bytes are bytes, seconds seconds, shares fractions of a Linear's rows in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Placement = Literal["host", "accelerator", "split", "both", "resident", "streamed", "block"]


@dataclass(frozen=True)
class Row:
    """One line of the schedule table: one Linear, accelerator segment or host operation.

    Attributes:
        node: the node's name in the scheduled graph.
        module: dotted path of the module it comes from ("" when it has none).
        op: what it does: "linear", "segment", "embedding", ...
        placement: where it runs; for a Linear where its weight is consumed ("block": cut with others as one block).
        host_share, streamed_share, resident_share: shares of the Linear's rows, None for other nodes.
        flops: floating-point operations of one forward at the bucket's size.
        weight_bytes: bytes of the weight (0 without one).
        host_s, accelerator_s, link_s: predicted busy seconds on each resource.
        start_s, end_s: predicted interval within the step.
        measured_s: measured seconds, None before a step has been traced.
        parts: names of the scheduled graph's nodes that the row stands for.
        trip: of a Linear with a host part, the transfer that brings its result up; Linears that share it have one name.
    """

    node: str
    module: str
    op: str
    placement: Placement
    host_share: float | None
    streamed_share: float | None
    resident_share: float | None
    flops: float
    weight_bytes: int
    host_s: float
    accelerator_s: float
    link_s: float
    start_s: float
    end_s: float
    measured_s: float | None = None
    parts: tuple[str, ...] = ()
    trip: str = ""


@dataclass(frozen=True)
class Totals:
    """The bottom of the table: bytes of one step by where weights are consumed, and predicted seconds."""

    resident_bytes: int
    streamed_bytes: int
    host_bytes: int
    predicted_step_s: float
    floor_s: float
    baselines: dict[str, float | None]


@dataclass(frozen=True)
class Span:
    """One operation as it really ran: resource (``host``, ``worker``, ``accelerator``, ``up``, ``down``, ``pin``) and
    seconds."""

    name: str
    resource: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Holding:
    """What became of one storage that is streamed from; ``reason`` says why it was refused."""

    how: Literal["pinned in place", "adopted", "refused"]
    nbytes: int
    reason: str = ""
