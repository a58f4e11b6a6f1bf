"""A compiled graph: one captured graph, a plan per token bucket, and the step that Dynamo calls."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from hetegen_compile.bind import BoundStep, bind
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.errors import BudgetError
from hetegen_compile.graph_inputs import aliased_inputs, as_int, is_weight, number, symbol_inputs, token_count
from hetegen_compile.mirrors import NoRoomError, Request
from hetegen_compile.options import Options, format_bytes
from hetegen_compile.passes.capture import source_name
from hetegen_compile.passes.context import Bucket, HostOnlyGraphError, Refusal, SegmentCache, SegmentCompiler, require
from hetegen_compile.planner import BucketPlan, Planner, Sizes, Split, Target, bucket_of
from hetegen_compile.runtime import WEIGHTS, Runtime
from hetegen_compile.schedule import FITS, Schedule, register

logger = logging.getLogger("hetegen_compile")

_split_override: contextvars.ContextVar[Split | None] = contextvars.ContextVar("hetegen_split", default=None)


@contextlib.contextmanager
def override_split(split: Split) -> Iterator[None]:
    """Run compiled graphs with another split, from the capture and the segments that they have already.

    Plans made under it are kept, so comparing 0.0 (all streamed), 1.0 (all on the host) and "auto" costs no
    second compilation. Residency stays as it was decided.
    """
    token = _split_override.set(split)
    try:
        yield
    finally:
        _split_override.reset(token)


@dataclass
class _Plan:
    """One runnable schedule."""

    bound: BoundStep
    schedule: Schedule
    mirror_limit_bytes: int


class CompiledGraph:
    """The callable that the backend returns to Dynamo."""

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Options,
        profile: HardwareProfile,
        runtime: Runtime,
        compile_segment: SegmentCompiler,
    ) -> None:
        self._module = module
        self._options = options
        self._runtime = runtime
        self._segments = SegmentCache(compile_segment, {})
        self._planner = Planner(module, options=options, profile=profile, segments=self._segments)
        placeholders = module.graph.find_nodes(op="placeholder")
        self._names = [source_name(node) or node.name for node in placeholders]
        self._weights = {node.name: i for i, node in enumerate(placeholders) if is_weight(node, inputs[i])}
        self._symbols = symbol_inputs(placeholders)
        self._aliased = aliased_inputs(placeholders)
        self._tokens = token_count(module)
        self._epoch = runtime.epoch
        self._buckets: dict[Bucket, BucketPlan] = {}
        self._plans: dict[Hashable, _Plan] = {}
        self._host_only: Schedule | None = None
        with runtime.lock:
            try:
                with _quiet(runtime.accelerator.device):
                    self._plan(inputs)
            except HostOnlyGraphError as reason:
                self._host_only = self._on_host(str(reason))

    def __call__(self, *inputs: Any) -> Any:
        """One forward: the outputs that eager would give, inputs written as eager would have."""
        with self._runtime.lock:
            if self._host_only is not None:
                return self._module(*inputs)
            try:
                return self._run(self._ready_plan(inputs), inputs)
            except HostOnlyGraphError as reason:
                self._host_only = self._on_host(str(reason))
                return self._module(*inputs)
            except NoRoomError:  # nothing has run yet: a cache has grown, so fewer weights can stay
                self._forget_plans()
            try:
                return self._run(self._ready_plan(inputs), inputs)
            except NoRoomError as error:
                raise BudgetError(
                    f"this forward needs {format_bytes(error.excess_bytes)} more on the accelerator than gpu_memory="
                    f"{format_bytes(budget_bytes(self._options, self._runtime))} leaves beside its activations: use a "
                    "larger budget, a smaller batch or a shorter context"
                ) from error

    @property
    def compiled_segments(self) -> int:
        """How many different segments were compiled."""
        return len(self._segments.compiled)

    # ---- a step ------------------------------------------------------------------------------------------

    def _run(self, plan: _Plan, inputs: Sequence[Any]) -> Any:
        accelerator, mirrors = self._runtime.accelerator, self._runtime.mirrors
        steps = len(plan.schedule.step_times_s)
        tracing = steps == 1 + bool(plan.bound.carried)  # after warming up: with everything carried in the third
        try:
            with _quiet(accelerator.device):
                started = time.perf_counter()
                if tracing:
                    accelerator.trace(True)
                outputs = self._step(plan, inputs)
                seconds = time.perf_counter() - started
        except NoRoomError:
            raise
        except BaseException:
            mirrors.forget()  # the step may have written some of them
            raise
        plan.schedule.note_step(seconds, accelerator.trace(False) if tracing else [])
        plan.schedule.accelerator_peak_bytes = accelerator.counters.peak_bytes
        return outputs

    def _step(self, plan: _Plan, inputs: Sequence[Any]) -> Any:
        mirrors, carried, bound = self._runtime.mirrors, self._runtime.carried, plan.bound
        taken = carried.begin_step(bound, inputs)
        mirrors.begin_step()
        requests = [Request(inputs[i], self._names[i], whole=i in self._aliased) for i in bound.mirrors]
        requests += [Request(inputs[i].detach()[lo:hi], self._names[i], WEIGHTS) for i, lo, hi in bound.residents]
        values = mirrors.fetch(requests, plan.mirror_limit_bytes - self._runtime.ring_bytes)
        count = len(bound.mirrors)
        outputs, twins = bound.run(list(inputs), values[:count], values[count:], taken, carried.start)
        carried.end_step(bound)
        for i in bound.settled:
            mirrors.settle(inputs[i])
        for host, device in twins:
            mirrors.register(host, device)
        return outputs

    def _on_host(self, reason: str) -> Schedule:
        """The report on a graph that runs on the host as it is."""
        refusal = Refusal("the whole graph", f"runs on the host in eager mode: {reason}")
        logger.warning("%s %s", refusal.where, refusal.reason)
        schedule = Schedule(
            title="hetegen: not offloaded, on the host in eager mode", tokens=(1, None), split=self._options.split,
            rows=(), resident_bytes=0, streamed_bytes=0, host_bytes=0, predicted_step_s=0.0, floor_s=0.0, baselines={},
            budget_bytes=0, budget={}, refusals=(refusal,), whole_graph=False,
        )
        register(schedule)
        return schedule

    # ---- plans -------------------------------------------------------------------------------------------

    def _plan(self, inputs: Sequence[Any]) -> _Plan:
        split = _split_override.get()
        split = self._options.split if split is None else split
        sizes = {symbol: sympy.Integer(as_int(inputs[i])) for symbol, i in self._symbols.items()}
        bucket = bucket_of(number(self._tokens, sizes))
        if self._epoch != self._runtime.epoch:  # weights of ours were evicted: decide residency again
            self._forget_plans()
            self._epoch = self._runtime.epoch
        plan = self._plans.get((bucket, split))
        if plan is None:
            with _quiet(self._runtime.accelerator.device):
                plan = self._make_plan(bucket, split, sizes, inputs)
            self._plans[bucket, split] = plan
        return plan

    def _ready_plan(self, inputs: Sequence[Any]) -> _Plan:
        """A plan whose streamed weights are pinned, adopted or staged; what cannot be pinned makes another one."""
        while True:
            plan = self._plan(inputs)
            streamed = [inputs[i] for i in plan.bound.streamed]
            if self._runtime.host_memory.hold(streamed, lambda: [inputs[i] for i in self._weights.values()]):
                if not plan.schedule.host_memory:
                    plan.schedule.note_host_memory(
                        self._runtime.host_memory.holdings(streamed), plan.bound.pinned_ring_bytes
                    )
                return plan
            self._forget_plans()

    def _forget_plans(self) -> None:
        self._buckets.clear()
        self._plans.clear()

    def _make_plan(self, bucket: Bucket, split: Split, sizes: Sizes, inputs: Sequence[Any]) -> _Plan:
        if bucket not in self._buckets:
            weights = {name: inputs[i] for name, i in self._weights.items()}
            self._buckets[bucket] = self._planner.plan_bucket(bucket, sizes, self._target(), weights)
            if require(self._buckets[bucket].context.residency, "choose_residency").evicts:
                self._epoch = self._runtime.evict_weights()
        planned = self._planner.plan_split(self._buckets[bucket], split)
        residency = require(planned.context.residency, "choose_residency")
        self._runtime.reserve_ring(residency.ring_bytes)
        work = require(planned.context.prediction, "predict_step").work
        bound = bind(planned.module, work, self._runtime.accelerator)
        self._tell(planned.schedule)
        return _Plan(bound, planned.schedule, planned.context.budget_bytes - residency.transient_bytes)

    def _tell(self, schedule: Schedule) -> None:
        register(schedule)
        if schedule.whole_graph:
            logger.info("%s: %s", schedule.title, FITS)
        if self._options.print_schedule and _split_override.get() is None:
            print(schedule.table(unfold=self._options.unfold), flush=True)

    def _target(self) -> Target:
        runtime = self._runtime
        return Target(
            kind=runtime.accelerator.kind,
            device=runtime.accelerator.device,
            budget_bytes=budget_bytes(self._options, runtime),
            resident=runtime.resident_weights(),
            ring_bytes=runtime.ring_bytes,
            host_memory=runtime.host_memory,
        )


# ---- helpers ------------------------------------------------------------------------------------------------


def budget_bytes(options: Options, runtime: Runtime) -> int:
    """The hard limit: what the options say, else the accelerator's memory less a sixteenth as a reserve.

    Never more than the accelerator has.
    """
    available = runtime.accelerator.memory_bytes
    if options.gpu_memory is None:
        return available * 15 // 16
    if options.gpu_memory > available:
        logger.warning(
            "gpu_memory=%s is more than the %s that the %s accelerator has: planning with the latter",
            format_bytes(options.gpu_memory), format_bytes(available), runtime.accelerator.kind,
        )
    return min(options.gpu_memory, available)


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """No gradients, tensors with versions, and the caller's CPU autocast on the accelerator's device too."""
    enabled = device.type != "cpu" and torch.is_autocast_enabled("cpu")
    autocast = torch.autocast(device.type, dtype=torch.get_autocast_dtype("cpu"), enabled=enabled)
    with torch.inference_mode(False), torch.no_grad(), autocast if enabled else contextlib.nullcontext():
        yield


__all__ = ["CompiledGraph", "budget_bytes", "override_split"]
