"""The report on one compiled graph and token bucket: what users see of a plan."""

from __future__ import annotations

import itertools
import json
import operator
import statistics
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import fx

from hetegen_compile import ir
from hetegen_compile.files import write_private
from hetegen_compile.ir import info
from hetegen_compile.options import format_bytes
from hetegen_compile.passes.context import Refusal
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.passes.node_work import WORKER
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.reports.table import schedule_table
from hetegen_compile.rows import Holding, Placement, Row, Span, Totals

FITS = "everything fits, nothing is offloaded; the graph is compiled in one piece"


@dataclass
class Schedule:
    """One plan: its rows, its predicted figures and, once it has run, its measured ones.

    Attributes:
        title: what the plan is for (accelerator, hardware profile, tokens).
        tokens: the bucket, (lowest, highest) tokens a forward; highest None is open.
        split: the ``split`` option that the plan was made with.
        rows: one ``Row`` for each Linear, segment and host operation, in issue order.
        resident_bytes, streamed_bytes, host_bytes: weights of one step by where they are consumed; of a mixture's
            experts all that lie there.
        predicted_step_s: the simulated step.
        floor_s: a bound that no schedule of this work beats: the largest of offloaded bytes over link and host
            together, the accelerator's own work, the critical path and the host's thread (``floor``).
        baselines: seconds of a step done otherwise; None where it does not fit.
        accelerator_peak_bytes: most bytes held on the accelerator so far.
        host_pinned_bytes: bytes of host memory pinned for prefetches, the pinned ring included.
        host_memory: what became of the storages that are streamed from, once a step has run.
        beside_bytes: of the device, in use beside the process's allocator when the plan was made; not in the budget.
        pinned_ring_bytes: length of the pinned ring that staged weights go through.
        accelerator: "cuda" or "emulated"; "dry run" where nothing runs; "" where all of it runs on the host.
        trips_ahead: how many trips of host parts are a worker's, ahead of which the rest of a step is issued.
        others: in a dry run, the schedules of the same forward's other graphs.
    """

    title: str
    tokens: tuple[int, int | None]
    split: float | Literal["auto"]
    rows: tuple[Row, ...]
    resident_bytes: int
    streamed_bytes: int
    host_bytes: int
    predicted_step_s: float
    floor_s: float
    baselines: Mapping[str, float | None]
    budget_bytes: int
    budget: Mapping[str, int]
    refusals: tuple[Refusal, ...]
    whole_graph: bool
    accelerator_peak_bytes: int = 0
    host_pinned_bytes: int = 0
    beside_bytes: int = 0
    host_memory: tuple[Holding, ...] = ()
    pinned_ring_bytes: int = 0
    spans: list[Span] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    accelerator: str = ""
    trips_ahead: int = 0
    others: tuple[Schedule, ...] = ()

    @property
    def measured_step_s(self) -> float | None:
        """Median wall-clock seconds of the steps after the first (which warms up); None before two have run."""
        return statistics.median(self.step_times_s[1:]) if len(self.step_times_s) > 1 else None

    def table(self, *, unfold: bool = False) -> str:
        """The annotated schedule as text, repeated layers folded unless ``unfold``."""
        totals = Totals(
            resident_bytes=self.resident_bytes,
            streamed_bytes=self.streamed_bytes,
            host_bytes=self.host_bytes,
            predicted_step_s=self.predicted_step_s,
            floor_s=self.floor_s,
            baselines=dict(self.baselines),
        )
        title = f"{self.title}: {FITS}" if self.whole_graph else self.title
        return schedule_table(self.rows, totals, title=title, unfold=unfold)

    def explain(self) -> str:
        """Why each weight is where it is, how the budget is spent, and what was left alone and why."""
        lines = [self.title, f"gpu_memory {format_bytes(self.budget_bytes)}, of which"]
        lines += [f"  {format_bytes(nbytes):>12}  {name}" for name, nbytes in self.budget.items()]
        if self.beside_bytes:
            used = format_bytes(self.beside_bytes)
            lines.append(f"beside gpu_memory: {used} of the device used by the CUDA context and other processes")
        if self.whole_graph:
            lines.append(FITS)
        linears = [row for row in self.rows if row.op == "linear" and row.host_share is not None]  # not left as it is
        lines += [f"{row.module or row.node}: {_why(row, self.split)}{_shared(row, linears)}" for row in linears]
        lines += [
            f"{row.module or row.node}: {_why_experts(row, self.split)}" for row in self.rows if row.op == EXPERTS
        ]
        if self.trips_ahead:
            lines.append(
                f"a worker thread computes the host's part of {self.trips_ahead} trips; what depends on it is issued "
                "to the accelerator without waiting"
            )
        lines += self._host_memory_lines()
        lines += [f"left as it is: {refusal.where}: {refusal.reason}" for refusal in self.refusals]
        return "\n".join(lines)

    def _host_memory_lines(self) -> list[str]:
        sizes: dict[str, list[int]] = {}
        for holding in self.host_memory:
            sizes.setdefault(holding.how, []).append(holding.nbytes)
        lines = [
            f"host memory: {format_bytes(sum(found))} in {len(found)} storages {how}" for how, found in sizes.items()
        ]
        if self.pinned_ring_bytes:
            lines.append(f"host memory: a pinned ring of {format_bytes(self.pinned_ring_bytes)} for staged weights")
        return lines

    def note_host_memory(self, holdings: tuple[Holding, ...], pinned_ring_bytes: int) -> None:
        """Keep what became of the memory that the plan streams from."""
        self.host_memory = holdings
        self.pinned_ring_bytes = pinned_ring_bytes
        self.host_pinned_bytes = sum(holding.nbytes for holding in holdings) + pinned_ring_bytes

    def save_trace(self, path: str | Path) -> None:
        """Write the predicted step and, after a traced run, the measured one as a Chrome/Perfetto trace."""
        events = [_event("predicted", row.node, _lane(row), row.start_s, row.end_s) for row in self.rows]
        if self.spans:
            origin = min(span.start_s for span in self.spans)
            events += [
                _event("measured", span.name, span.resource, span.start_s - origin, span.end_s - origin)
                for span in self.spans
            ]
        write_private(Path(path), json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def note_refusal(self, refusal: Refusal) -> None:
        """Keep what was found to be impossible while steps ran."""
        if refusal not in self.refusals:
            self.refusals += (refusal,)

    def note_step(self, seconds: float, spans: list[Span]) -> None:
        """Keep one step's time (the last 1000) and, if it was traced, its spans on the rows."""
        self.step_times_s.append(seconds)
        del self.step_times_s[:-1000]
        if spans:
            self.spans = spans
            took: dict[str, float] = {}
            for span in spans:  # of a prefetch for the next step two may end during one step
                took.setdefault(span.name, span.end_s - span.start_s)
            self.rows = tuple(replace(row, measured_s=_measured(row, took)) for row in self.rows)


EXPERTS = "experts"
"""What the table calls a product with streamed experts."""


def _why_experts(row: Row, split: float | Literal["auto"]) -> str:
    shares = f"{row.host_share:.0%} of its experts on the host, {row.streamed_share:.0%} streamed"
    why = "most of them have tokens of a forward like this, too many for the host alone"
    return f"{shares}: {why}" if split == "auto" else f"{shares}, as set by split={split}: {why}"


def _measured(row: Row, took: Mapping[str, float]) -> float | None:
    found = [took[name] for name in row.parts if name in took]
    return sum(found) if found else None


def _lane(row: Row) -> str:
    return {"host": "host", "streamed": "up"}.get(row.placement, "accelerator")


def _event(process: str, name: str, lane: str, start_s: float, end_s: float) -> dict[str, Any]:
    return {
        "name": name, "ph": "X", "pid": process, "tid": lane,
        "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6,
    }  # fmt: skip


def _why_not_both(row: Row) -> str:
    """Why a Linear with resident rows has others on one side only."""
    if row.host_share:
        return "the link would take longer than the host for the rest"
    return "no more of it fits the budget, and a trip to the host would cost more than it saves"


def _why(row: Row, split: float | Literal["auto"]) -> str:
    if row.placement == "resident":
        return "resident: it saves more time per byte than what is not"
    if row.placement == "block":
        shares = f"{row.host_share:.0%} of the block's columns on the host, {row.streamed_share:.0%} streamed"
        return f"{shares}: what lies between its Linears stays where it is, which saves a trip"
    shares = f"{row.host_share:.0%} of its rows on the host, {row.streamed_share:.0%} streamed"
    if split != "auto":
        return f"{shares}, {row.resident_share:.0%} resident: the option split={split} says so"
    if row.placement == "split" and row.host_share and row.streamed_share:
        resident = f", {row.resident_share:.0%} resident" if row.resident_share else ""
        return f"{shares}{resident}: host and link finish together"
    if row.placement == "split":
        return f"{shares}, {row.resident_share:.0%} resident: {_why_not_both(row)}"
    if row.placement == "host":
        return f"{shares}: the link would take longer than the host"
    return f"{shares}: a trip to the host would cost more than it saves"


def _shared(row: Row, linears: Sequence[Row]) -> str:
    """With which others it shares a trip."""
    others = [one.module or one.node for one in linears if row.trip and one.trip == row.trip and one is not row]
    return f"; one trip with {', '.join(others)}" if others else ""


# ---- rows from a scheduled graph ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearSite:
    """A Linear, or a product with streamed experts, as it was before it was split: what the table says about it."""

    node: str
    module: str
    plan: LinearPlan
    flops: float
    weight_bytes: int
    op: str = "linear"


def schedule_rows(
    graph: fx.Graph, prediction: Prediction, sites: Mapping[int, LinearSite], number: Any
) -> tuple[Row, ...]:
    """Rows of a scheduled graph in the order in which their work starts.

    ``sites`` maps the program position of each Linear to what it was; ``number`` evaluates a cost expression.
    """
    groups: dict[int, list[fx.Node]] = {}
    rows: list[Row] = []
    for node in graph.nodes:
        position = info(node).position
        if node not in prediction.work or node.target in (ir.MIRROR, ir.TWIN, operator.getitem):
            continue
        if _belongs_to_linear(node) and position in sites:
            groups.setdefault(position, []).append(node)
        elif prediction.work[node].seconds > 0 and node.target not in _TRANSFERS:
            rows.append(_operation_row(node, prediction, number))
    rows += [_linear_row(sites[position], nodes, prediction) for position, nodes in groups.items()]
    return tuple(sorted(rows, key=lambda row: row.start_s))


_TRANSFERS = (ir.TO_HOST, ir.WAIT_HOST, ir.TO_ACCELERATOR, ir.WAIT_ACCELERATOR, ir.CAUGHT_UP)
_OF_LINEAR = (
    ir.STAGE, ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED, ir.WAIT, ir.RELEASE, ir.RESIDENT, ir.PARTIAL_LINEAR,
    ir.PARTIAL_GROUPED, ir.HOST_GROUPED, ir.HOST_LINEAR, ir.JOIN, ir.PAD,
)  # fmt: skip


def _belongs_to_linear(node: fx.Node) -> bool:
    return node.target in _OF_LINEAR


def _linear_row(site: LinearSite, nodes: list[fx.Node], prediction: Prediction) -> Row:
    plan = site.plan
    busy = dict.fromkeys(("host", "accelerator", "up"), 0.0)
    own = [node for node in nodes if node.target != ir.PREFETCH_AHEAD]  # its copy is the carried one
    for node in own:
        work = prediction.work[node]
        resource = "host" if work.resource == WORKER else work.resource
        busy[resource] = busy.get(resource, 0.0) + work.seconds
    timed = [node for node in own if prediction.work[node].seconds > 0]
    return Row(
        node=site.node, module=site.module, op=site.op, placement=_placement(plan),
        host_share=plan.host / plan.rows, streamed_share=plan.streamed_rows / plan.rows,
        resident_share=plan.resident_rows / plan.rows, flops=site.flops, weight_bytes=site.weight_bytes,
        host_s=busy["host"], accelerator_s=busy["accelerator"], link_s=busy["up"],
        start_s=min((prediction.start_s[node] for node in timed), default=0.0),
        end_s=max((prediction.end_s[node] for node in timed), default=0.0),
        parts=tuple(node.name for node in nodes),
        trip=next((user.name for node in nodes for user in node.users if user.target == ir.TO_ACCELERATOR), ""),
    )  # fmt: skip


def _placement(plan: LinearPlan) -> Placement:
    if plan.block is not None:
        return "block"
    if plan.resident_rows == plan.rows:
        return "resident"
    if plan.host == plan.rows:
        return "host"
    return "split" if plan.host or plan.resident_rows else "streamed"


def _operation_row(node: fx.Node, prediction: Prediction, number: Any) -> Row:
    work = prediction.work[node]
    on_host = work.resource in ("host", WORKER)
    return Row(
        node=node.name, module=info(node).module, op=_operation_name(node),
        placement="host" if on_host else "accelerator",
        host_share=None, streamed_share=None, resident_share=None,
        flops=number(info(node).flops), weight_bytes=0,
        host_s=work.seconds if on_host else 0.0, accelerator_s=0.0 if on_host else work.seconds, link_s=0.0,
        start_s=prediction.start_s[node], end_s=prediction.end_s[node], parts=(node.name,),
    )  # fmt: skip


def _operation_name(node: fx.Node) -> str:
    if node.op == "call_module":
        return "segment"
    return str(getattr(node.target, "__name__", node.target))


# ---- all schedules -------------------------------------------------------------------------------------------

_schedules: dict[int, weakref.ref[Schedule]] = {}
"""Oldest first. Every change is one operation of the dict, so that threads need no lock and a fork inherits none."""

_numbers = itertools.count()


def register(schedule: Schedule) -> None:
    """Add a schedule to those that ``schedules()`` lists."""
    number = next(_numbers)
    _schedules[number] = weakref.ref(schedule, lambda _: _schedules.pop(number, None))


def withdraw(gone: Iterable[Schedule]) -> None:
    """Take schedules off the list that will not run again, though somebody may still hold them."""
    ids = {id(schedule) for schedule in gone}
    for number, reference in list(_schedules.items()):
        if id(reference()) in ids:
            _schedules.pop(number, None)


def schedules() -> tuple[Schedule, ...]:
    """A ``Schedule`` for each compiled graph and token bucket that is still alive, newest last."""
    found = (reference() for reference in list(_schedules.values()))
    return tuple(schedule for schedule in found if schedule is not None)
