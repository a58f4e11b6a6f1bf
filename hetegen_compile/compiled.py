"""A compiled graph: one captured graph, a plan per token bucket, and the step that Dynamo calls."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sympy
import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile import planner
from hetegen_compile.bind import BoundStep, bind
from hetegen_compile.buckets import bucket_of
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.errors import AcceleratorMemoryError, BudgetError, UnforeseenMemoryError
from hetegen_compile.graph_inputs import aliased_inputs, as_int, is_weight, number, symbol_inputs, token_count
from hetegen_compile.mirrors import NoRoomError
from hetegen_compile.options import Options, format_bytes
from hetegen_compile.passes.capture import source_name
from hetegen_compile.passes.claims import weight_key
from hetegen_compile.passes.context import Bucket, HostOnlyGraphError, Refusal, SegmentCache, SegmentCompiler, require
from hetegen_compile.passes.plans import UNFORESEEN
from hetegen_compile.planned import BucketPlan, PlannedStep, Sizes, Split, Target
from hetegen_compile.planner import Planner
from hetegen_compile.room import Room
from hetegen_compile.runtime import Runtime
from hetegen_compile.schedule import FITS, Schedule, register, withdraw
from hetegen_compile.step_values import InputFacts, StepValues
from hetegen_compile.undo import Undo, host_writes

logger = logging.getLogger("hetegen_compile")

_NEW_PLANS = 2
"""Plans that are made for a forward that outgrew its plan; the second counts in what the first did not foresee."""

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


_Result = TypeVar("_Result")

Part = tuple[Bucket, int]
"""A bucket of tokens of one model: Dynamo lets models of one class and shape share a compiled graph."""


@dataclass
class _Plan:
    """One runnable schedule.

    Attributes:
        weights: for each resident weight its position among the inputs, its key in the ledger and its first row.
        values: fetches the device values that a step takes.
        budget_bytes: the limit that it was made for, what the device's libraries take not counted.
        epoch: of the ledger when all of this was last looked at.
    """

    bound: BoundStep
    schedule: Schedule
    room: Room
    weights: dict[int, tuple[Hashable, int]]
    values: StepValues
    ring_bytes: int
    budget_bytes: int
    epoch: int


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
        names = [source_name(node) or node.name for node in placeholders]
        self._weights = {node.name: i for i, node in enumerate(placeholders) if is_weight(node, inputs[i])}
        self._facts = InputFacts.of(
            placeholders, names, aliased_inputs(module.graph), frozenset(self._weights.values())
        )
        self._symbols = symbol_inputs(placeholders)
        self._tokens = token_count(module)
        self._writes = host_writes(module.graph)
        self._anchor = min(self._weights.values(), default=None)
        self._buckets: dict[Part, BucketPlan] = {}
        self._outdated: dict[Part, BucketPlan] = {}
        self._plans: dict[tuple[Part, Split], _Plan] = {}
        self._recent: tuple[tuple[Any, ...], _Plan] | None = None
        self._unforeseen_bytes = 0
        self._notes: tuple[Refusal, ...] = ()
        self._host_only: Schedule | None = None
        with runtime.lock:
            runtime.mirrors.check()
            try:
                self._with_remedies(lambda: self._plan(inputs))
            except HostOnlyGraphError as reason:
                self._host_only = self._on_host(str(reason))

    def __call__(self, *inputs: Any) -> Any:
        """One forward: the outputs that eager would give, inputs written as eager would have.

        Raises:
            BudgetError: no plan for this forward fits the budget.
            AcceleratorMemoryError: the accelerator ran out of memory twice, or after a write that must not be
                repeated.
        """
        with self._runtime.lock:
            if self._host_only is not None:
                return self._module(*inputs)
            try:
                return self._with_remedies(lambda: self._forward(inputs))
            except HostOnlyGraphError as reason:
                self._host_only = self._on_host(str(reason))
                return self._module(*inputs)

    @property
    def compiled_segments(self) -> int:
        """How many different segments were compiled."""
        return len(self._segments.compiled)

    # ---- what does not fit -----------------------------------------------------------------------------------

    def _with_remedies(self, work: Callable[[], _Result]) -> _Result:
        """Do ``work`` again after it met a lack of memory: with a new plan, with less resident.

        The exceptions are let go before: their tracebacks hold the values of the step.
        """
        outgrown, pressed = 0, ""
        while True:
            try:
                return work()
            except NoRoomError as error:  # nothing has run: a cache has grown beyond the plan
                if outgrown == _NEW_PLANS:
                    raise self._too_large(error.excess_bytes) from error
                outgrown += 1
                self._unforeseen_bytes += error.excess_bytes if outgrown == _NEW_PLANS else 0
            except UnforeseenMemoryError as error:  # nothing has run: verification counts more than the plan
                if outgrown == _NEW_PLANS:
                    raise
                outgrown += 1
                self._unforeseen_bytes += error.excess_bytes
            except AcceleratorMemoryError as error:
                if pressed or isinstance(error, _UnrepeatableError):
                    raise
                pressed = str(error)
                self._relieve(pressed)
            except BudgetError as error:
                if not pressed:
                    raise
                raise AcceleratorMemoryError(f"{pressed}; with less resident it does not go either: {error}") from error
            self._outdate(list(self._buckets))

    def _too_large(self, excess_bytes: int) -> BudgetError:
        return BudgetError(
            f"this forward needs {format_bytes(excess_bytes)} more on the accelerator than gpu_memory="
            f"{format_bytes(self._budget_bytes())} leaves beside its activations: set options={{'gpu_memory': "
            f"{self._budget_bytes() + excess_bytes}}} or more, or use a smaller batch or a shorter context"
        )

    def _relieve(self, reason: str) -> None:
        """Count on less memory from now on, and say so."""
        limit = self._runtime.lower_limit(self._budget_bytes())
        text = f"lowered to {format_bytes(limit)} and the step run again: {reason}"
        logger.warning("gpu_memory %s", text)
        self._notes += (Refusal("gpu_memory", text),)

    # ---- a step ------------------------------------------------------------------------------------------

    def _forward(self, inputs: Sequence[Any]) -> Any:
        plan = self._ready_plan(inputs)
        undo = Undo(self._writes, inputs)
        try:
            return self._run(plan, inputs)
        except AcceleratorMemoryError as error:
            if undo.restore():
                raise
            raise _UnrepeatableError(
                f"{error}; the step had written inputs in place already and cannot be run again with less resident"
            ) from error

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
        except BaseException as error:
            _let_go(error)
            accelerator.abandon_step()
            if not isinstance(error, NoRoomError):  # the step may have written some of them
                mirrors.forget_all_but_weights()
                mirrors.forget(inputs[i] for i in plan.bound.settled)
            raise
        plan.schedule.note_step(seconds, accelerator.trace(False) if tracing else [])
        peak = max(plan.schedule.accelerator_peak_bytes, accelerator.counters.step_peak_bytes)
        plan.schedule.accelerator_peak_bytes = peak
        return outputs

    def _step(self, plan: _Plan, inputs: Sequence[Any]) -> Any:
        accelerator, mirrors, bound = self._runtime.accelerator, self._runtime.mirrors, plan.bound
        carried = self._runtime.carried
        accelerator.limit_memory(plan.budget_bytes)
        started = carried.begin_step(bound, inputs)
        mirrors.begin_step()
        taken = self._runtime.ledger.ring_bytes + plan.room.activation_bytes
        values = plan.values.fetch(mirrors, inputs, plan.budget_bytes - taken)
        count = len(bound.mirrors)
        outputs, twins = bound.run(list(inputs), values[:count], values[count:], started, carried.start)
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
        key = split, self._model_of(inputs), *(as_int(inputs[i]) for i in self._symbols.values())
        if self._recent is not None and self._recent[0] == key and self._recent[1].epoch == self._runtime.ledger.epoch:
            return self._recent[1]
        self._recent = key, self._find_plan(inputs, split)
        return self._recent[1]

    def _find_plan(self, inputs: Sequence[Any], split: Split) -> _Plan:
        sizes = {symbol: sympy.Integer(as_int(inputs[i])) for symbol, i in self._symbols.items()}
        part = bucket_of(number(self._tokens, sizes)), self._model_of(inputs)
        plan = self._plans.get((part, split))
        if plan is not None and not self._is_good(plan, sizes):
            self._outdate([part])
            plan = None
        if plan is None:
            with _quiet(self._runtime.accelerator.device):
                plan = self._make_plan(part, split, sizes, inputs)
            self._plans[part, split] = plan
        return plan

    def _model_of(self, inputs: Sequence[Any]) -> int:
        """Whose weights these are: the storage of one of them tells."""
        return 0 if self._anchor is None else int(inputs[self._anchor].untyped_storage()._cdata)

    def _is_good(self, plan: _Plan, sizes: Sizes) -> bool:
        """Whether the plan still finds what it counts on, and the forward fits it."""
        ledger = self._runtime.ledger
        if plan.epoch != ledger.epoch:
            shorter = ledger.ring_bytes < plan.ring_bytes or self._budget_bytes() < plan.schedule.budget_bytes
            if shorter or not ledger.has(list(plan.weights.values())):
                return False
            self._look_up(plan)
        return plan.room.covers(sizes)

    def _look_up(self, plan: _Plan) -> None:
        """What the ledger keeps of the plan's weights now."""
        ledger = self._runtime.ledger
        first_rows = {i: ledger.first_rows[key] for i, (key, _) in plan.weights.items()}
        plan.values = StepValues(plan.bound, self._facts, first_rows)
        plan.room.free_bytes = plan.budget_bytes - ledger.ring_bytes - ledger.resident_bytes
        plan.epoch = ledger.epoch

    def _ready_plan(self, inputs: Sequence[Any]) -> _Plan:
        """A plan whose streamed weights are pinned, adopted or staged; what cannot be pinned makes another one.

        So do weights that were adopted: they lie in other storages then.
        """
        while True:
            plan, model = self._plan(inputs), self._model_of(inputs)
            streamed = [inputs[i] for i in plan.bound.streamed]
            if self._runtime.host_memory.hold(streamed, lambda: [inputs[i] for i in self._weights.values()]):
                if not plan.schedule.host_memory:
                    plan.schedule.note_host_memory(
                        self._runtime.host_memory.holdings(streamed), plan.bound.pinned_ring_bytes
                    )
                if model == self._model_of(inputs):
                    return plan
            self._outdate(list(self._buckets))

    def _outdate(self, parts: Iterable[Part]) -> None:
        """What these plans decided about memory no longer holds: it is decided again when they are next called."""
        self._recent = None
        for part in set(parts) & self._buckets.keys():
            self._outdated[part] = self._buckets.pop(part)
        withdraw(plan.schedule for key, plan in self._plans.items() if key[0] not in self._buckets)
        self._plans = {key: plan for key, plan in self._plans.items() if key[0] in self._buckets}

    def _forget_dead(self) -> None:
        """Forget the plans of models that are gone."""
        dead = self._runtime.ledger.dead_parts(self)
        self._outdate(dead)
        for part in dead:
            self._outdated.pop(part, None)

    def _make_plan(self, part: Part, split: Split, sizes: Sizes, inputs: Sequence[Any]) -> _Plan:
        self._forget_dead()
        if part not in self._buckets:
            base = self._decide(part, sizes, inputs)
            self._enter(part, base, inputs)
            self._buckets[part] = base
            self._outdated.pop(part, None)
        planned = self._planner.plan_split(self._buckets[part], split)
        bound = self._bound(planned)
        planned.schedule.refusals += (*self._notes, *bound.refusals)
        planned.schedule.beside_bytes = self._runtime.accelerator.beside_bytes
        self._tell(planned.schedule)
        return self._runnable(planned, bound, inputs)

    def _decide(self, part: Part, sizes: Sizes, inputs: Sequence[Any]) -> BucketPlan:
        weights = {name: inputs[i] for name, i in self._weights.items()}
        known = self._outdated.get(part)
        if known is None:
            return self._planner.plan_bucket(part[0], sizes, self._target(part), weights)
        logger.info("%s: memory is shared out anew, and the step scheduled again", part[0])
        return self._planner.decide_again(known, sizes, self._target(part), weights)

    def _bound(self, planned: PlannedStep) -> BoundStep:
        context = planned.context
        work = require(context.prediction, "predict_step").work
        need = require(context.memory, "measure_memory")
        workspace = {node: context.room(sympy.sympify(size, strict=True)) for node, size in need.workspace.items()}
        kernels = context.profile.host.linear_kernels
        return bind(planned.module, work, self._runtime.accelerator, kernels, workspace)

    def _enter(self, part: Part, base: BucketPlan, inputs: Sequence[Any]) -> None:
        """Make what the residency decision says hold on the accelerator, as long as the weights exist."""
        anchor = None if self._anchor is None else StorageWeakRef(inputs[self._anchor].untyped_storage())
        runtime, context = self._runtime, base.context
        residency = require(context.residency, "choose_residency")
        runtime.accelerator.limit_memory(context.budget_bytes - sum(context.overhead_bytes.values()))
        runtime.ledger.enter(self, part, residency, budget_bytes(self._options, runtime), anchor)
        runtime.reserve(runtime.ledger.ring_bytes)

    def _runnable(self, planned: PlannedStep, bound: BoundStep, inputs: Sequence[Any]) -> _Plan:
        context, ledger = planned.context, self._runtime.ledger
        residency = require(context.residency, "choose_residency")
        budget = context.budget_bytes - sum(context.overhead_bytes.values())
        resident = {self._weights[name]: first for name, first in residency.weights.items()}
        keys = {i: weight_key(inputs[i]) for i in resident}
        read = {i: lo for i, lo, _ in bound.residents}
        plan = _Plan(
            bound=bound,
            schedule=planned.schedule,
            room=Room.of(context, residency.mirrored, 0),
            weights={i: (keys[i], read.get(i, first)) for i, first in resident.items()},
            values=StepValues(bound, self._facts, {}),
            ring_bytes=residency.ring_bytes,
            budget_bytes=budget,
            epoch=ledger.epoch,
        )
        self._look_up(plan)
        return plan

    def _tell(self, schedule: Schedule) -> None:
        register(schedule)
        if schedule.whole_graph:
            logger.info("%s: %s", schedule.title, FITS)
        if self._options.print_schedule and _split_override.get() is None:
            print(schedule.table(unfold=self._options.unfold), flush=True)

    def _target(self, part: Part) -> Target:
        runtime = self._runtime
        others = runtime.ledger.others(self, part)
        overhead = dict(runtime.accelerator.overhead_bytes())
        if self._unforeseen_bytes:
            overhead[UNFORESEEN] = self._unforeseen_bytes
        return Target(
            kind=runtime.accelerator.kind,
            device=runtime.accelerator.device,
            budget_bytes=self._budget_bytes(),
            resident=others,
            ring_bytes=others.ring_bytes,
            overhead_bytes=overhead,
            host_memory=runtime.host_memory,
        )

    def _budget_bytes(self) -> int:
        """The hard limit: of this graph's options, of those of the others on the accelerator, of what is left."""
        runtime = self._runtime
        others = runtime.ledger.smallest_budget_bytes
        return min(budget_bytes(self._options, runtime), runtime.limit_bytes, *(() if others is None else (others,)))


class _UnrepeatableError(AcceleratorMemoryError):
    """The accelerator ran out of memory after the step wrote what must not be written twice."""


# ---- helpers ------------------------------------------------------------------------------------------------


def budget_bytes(options: Options, runtime: Runtime) -> int:
    """The hard limit of a runtime's accelerator."""
    return planner.budget_bytes(options.gpu_memory, runtime.accelerator.memory_bytes, runtime.accelerator.kind)


def _let_go(error: BaseException | None) -> None:
    """Drop what the step's frames hold: whoever keeps the exception (a debugger, a shell) would keep device memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """No gradients, tensors with versions, and the caller's CPU autocast on the accelerator's device too."""
    with contextlib.ExitStack() as modes, torch.set_grad_enabled(False):
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        if device.type != "cpu" and torch.is_autocast_enabled("cpu"):
            modes.enter_context(torch.autocast(device.type, dtype=torch.get_autocast_dtype("cpu")))
        yield


__all__ = ["CompiledGraph", "budget_bytes", "override_split"]
