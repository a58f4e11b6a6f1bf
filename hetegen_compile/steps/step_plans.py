"""The plans of one captured graph on one accelerator: one for each bucket of tokens, model and split.

A plan is made when a forward first needs it, and made again when what it decided about memory no longer holds.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.errors import BudgetError, UnforeseenMemoryError
from hetegen_compile.graph_inputs import as_int
from hetegen_compile.heap import large_heap
from hetegen_compile.model_lives import ModelWeights
from hetegen_compile.options import format_bytes
from hetegen_compile.overrides import overridden_issue_ahead, overridden_split
from hetegen_compile.passes.claims import weight_key
from hetegen_compile.passes.context import Refusal, require
from hetegen_compile.passes.plans import UNFORESEEN
from hetegen_compile.planning.planned import BucketPlan, Sizes, Target, Variant
from hetegen_compile.planning.planner import Planner, budget_bytes
from hetegen_compile.quiet import quiet
from hetegen_compile.reports.schedule import FITS, Schedule, register, withdraw
from hetegen_compile.runtime import Runtime
from hetegen_compile.steps.captured_graph import CapturedGraph, Part
from hetegen_compile.steps.step_plan import StepPlan

logger = logging.getLogger("hetegen_compile")


class StepPlans:
    """Used under the runtime's lock.

    Attributes:
        unforeseen_bytes: what steps need beyond their plans, found when they were tried; plans made later count it in.
        notes: what the report of each plan made from now on says beside its own refusals.
    """

    def __init__(self, graph: CapturedGraph, runtime: Runtime) -> None:
        self.graph = graph
        self.runtime = runtime
        self.unforeseen_bytes = 0
        accelerator = runtime.accelerator
        available_bytes = min(accelerator.memory_bytes, graph.profile.accelerator.memory_bytes)
        self._own_bytes = budget_bytes(graph.options.gpu_memory, available_bytes, accelerator.kind)
        self.notes: tuple[Refusal, ...] = ()
        self._planner = Planner(graph.module, options=graph.options, profile=graph.profile, segments=graph.segments)
        self._counted = {symbol: i for symbol, i in graph.symbols.items() if symbol in self._planner.counted}
        self._buckets: dict[Part, BucketPlan] = {}
        self._outdated: dict[Part, BucketPlan] = {}
        self._plans: dict[tuple[Part, Variant], StepPlan] = {}
        self._recent: tuple[tuple[Part, Variant], StepPlan] | None = None
        self._models: dict[int, ModelWeights] = {}

    @property
    def all(self) -> tuple[StepPlan, ...]:
        """Those that hold."""
        return tuple(self._plans.values())

    @property
    def budget_bytes(self) -> int:
        """The hard limit: of this graph's options, of those of the others on the accelerator, of what is left."""
        runtime = self.runtime
        others = runtime.ledger.smallest_budget_bytes
        return min(self._own_bytes, runtime.limit_bytes, *(() if others is None else (others,)))

    # ---- the plan of a forward -----------------------------------------------------------------------------

    def find(self, inputs: Sequence[Any]) -> StepPlan:
        """The plan for a forward with these inputs.

        Raises:
            BudgetError: there is none within the budget.
            UnforeseenMemoryError: verification counts more than was planned for.
            HostOnlyGraphError: the graph cannot be offloaded.
        """
        numbers = self.graph.size_numbers(inputs)
        tokens = {symbol: as_int(inputs[i]) for symbol, i in self._counted.items()}
        key = (self._planner.bucket(tokens), self.graph.model_of(inputs)), self._variant()
        if self._recent is not None and self._recent[0] == key:
            plan = self._recent[1]
            if plan.epoch == self.runtime.ledger.epoch and plan.room.has(numbers):
                return plan
        self._recent = key, self._find(inputs, *key)
        return self._recent[1]

    def _variant(self) -> Variant:
        """What the options ask for, or the caller instead."""
        options, split, ahead = self.graph.options, overridden_split(), overridden_issue_ahead()
        return Variant(options.split if split is None else split, options.issue_ahead if ahead is None else ahead)

    def find_ready(self, inputs: Sequence[Any]) -> StepPlan:
        """A plan whose streamed weights are pinned, adopted or staged; what cannot be pinned makes another one.

        So do weights that were adopted: they lie in other storages then.
        """
        graph, host_memory = self.graph, self.runtime.host_memory
        while True:
            plan, model = self.find(inputs), graph.model_of(inputs)
            streamed = [inputs[i] for i in plan.bound.streamed]
            if host_memory.hold(streamed, lambda: list(graph.weight_tensors(inputs).values())):
                if not plan.schedule.host_memory:
                    if streamed:  # what was adopted lies in other storages
                        self._watch(inputs)
                    plan.schedule.note_host_memory(host_memory.holdings(streamed), plan.bound.pinned_ring_bytes)
                if model == graph.model_of(inputs):
                    return plan
            self.outdate()

    def outdate(self, parts: Iterable[Part] | None = None) -> None:
        """What these plans (by default all) decided about memory no longer holds: it is decided again when needed."""
        self._recent = None
        found = set(self._buckets if parts is None else parts) & self._buckets.keys()
        self._outdated |= {part: self._buckets.pop(part) for part in found}
        self.runtime.ledger.outdate(self, found)
        withdraw(plan.schedule for key, plan in self._plans.items() if key[0] not in self._buckets)
        self._plans = {key: plan for key, plan in self._plans.items() if key[0] in self._buckets}

    @property
    def serves_models(self) -> bool:
        """Whether there are plans for a model that is there."""
        return bool(self._models)

    def serves(self, storages: frozenset[int]) -> bool:
        """Whether there are plans for the model whose weights lie in these."""
        return any(weights.lie_in(storages) for weights in self._models.values())

    def lose(self, storages: Iterable[int]) -> bool:
        """Storages are gone: forget the models that are gone with them; whether there was one."""
        gone = {model for model, weights in self._models.items() if weights.lose(storages)}
        if not gone:
            return False
        self._models = {model: weights for model, weights in self._models.items() if model not in gone}
        parts = [part for part in (*self._buckets, *self._outdated) if part[1] in gone]
        self.runtime.ledger.leave(self, parts)
        self._forget(parts)
        return True

    def storages_moved(self, places: Mapping[int, int]) -> None:
        """Weights lie in other storages from now on (old identity to new)."""
        for weights in self._models.values():
            weights.move(places)

    def _find(self, inputs: Sequence[Any], part: Part, variant: Variant) -> StepPlan:
        sizes = self.graph.sizes(inputs)
        plan = self._plans.get((part, variant))
        if plan is not None and not (self._has_its_share(plan, part) and self._is_good(plan, inputs, sizes)):
            self.outdate([part])
            plan = None
        if plan is None:
            with quiet(self.runtime.accelerator.device), large_heap(), self._told_whose_budget():
                plan = self._make(part, variant, sizes, inputs)
        return plan

    @contextlib.contextmanager
    def _told_whose_budget(self) -> Iterator[None]:
        """An error on too small a budget says so if it is another model's that is too small."""
        try:
            yield
        except UnforeseenMemoryError:
            raise
        except BudgetError as error:
            ledger, own = self.runtime.ledger, format_bytes(self._own_bytes)
            others, whose = ledger.smallest_budget_bytes, ledger.whose_budget_is_smallest
            if others is None or others >= self._own_bytes:
                raise
            raise BudgetError(
                f"{error.without_remedy}. The smallest gpu_memory of the models on one accelerator holds for all. This "
                f"one's is {own}; {format_bytes(others)} is that of {whose}",
                "compile that one with more, or delete it",
            ) from error

    def _has_its_share(self, plan: StepPlan, part: Part) -> bool:
        """Whether no memory has come free for a plan since it was made; looked up only where something changed."""
        ledger = self.runtime.ledger
        return plan.epoch == ledger.epoch or not ledger.has_more(self, part, plan.limit_bytes)

    def _is_good(self, plan: StepPlan, inputs: Sequence[Any], sizes: Sizes) -> bool:
        return plan.is_good(self.runtime, inputs, lambda: self.budget_bytes, sizes)

    def _stands(self, part: Part, inputs: Sequence[Any], variant: Variant) -> bool:
        """Whether a decision about memory is known that the accelerator still keeps, for steps of another variant.

        Steps that are issued ahead need room that others do not.
        """
        if part not in self._buckets or self._planner.needs_more_room(self._buckets[part], variant):
            return False
        ledger, context = self.runtime.ledger, self._buckets[part].context
        residency = require(context.residency, "choose_residency")
        kept = [(weight_key(inputs[self.graph.weights[name]]), first) for name, first in residency.weights.items()]
        stands = self.budget_bytes >= context.budget_bytes and ledger.has(kept, residency.ring_bytes)
        return stands and not ledger.has_more(self, part, context.limit_bytes)

    # ---- making one ------------------------------------------------------------------------------------------

    def _make(self, part: Part, variant: Variant, sizes: Sizes, inputs: Sequence[Any]) -> StepPlan:
        """A plan with what has been decided about memory for another split, if that still holds and does for it."""
        plan = self._scheduled(part, variant, inputs) if self._stands(part, inputs, variant) else None
        if plan is None or not self._is_good(plan, inputs, sizes):
            self.outdate([part])
            base = self._decide(part, sizes, inputs, variant)
            try:
                self._enter(part, base, inputs)
                plan = self._scheduled(part, variant, inputs)
            except BaseException:  # whoever keeps an interrupt's traceback keeps these plans, and what they claim
                self.outdate([part])
                self.runtime.ledger.leave(self, [part])
                raise
        return plan

    def _scheduled(self, part: Part, variant: Variant, inputs: Sequence[Any]) -> StepPlan:
        planned = self._planner.plan_split(self._buckets[part], variant.split, issue_ahead=variant.issue_ahead)
        plan = StepPlan.of(self.graph, planned, self.runtime, inputs)
        plan.schedule.refusals += (*self.notes, *plan.bound.refusals)
        plan.schedule.beside_bytes = self.runtime.accelerator.beside_bytes
        self._tell(plan.schedule)
        self._plans[part, variant] = plan
        return plan

    def _forget_dead(self) -> None:
        """Forget the plans of models that are gone."""
        self._forget(self.runtime.ledger.take_dead_parts(self))

    def _forget(self, parts: Sequence[Part]) -> None:
        self.outdate(parts)
        for part in parts:
            self._outdated.pop(part, None)

    def _decide(self, part: Part, sizes: Sizes, inputs: Sequence[Any], variant: Variant) -> BucketPlan:
        """Share out the accelerator's memory."""
        self._forget_dead()
        weights, known = self.graph.weight_tensors(inputs), self._outdated.get(part)
        if known is None:
            return self._planner.plan_bucket(sizes, self._target(part, variant), weights)
        logger.info("%s: memory is shared out anew, and the step scheduled again", part[0])
        return self._planner.decide_again(known, sizes, self._target(part, variant), weights)

    def _target(self, part: Part, variant: Variant) -> Target:
        runtime = self.runtime
        overhead = dict(runtime.accelerator.overhead_bytes())
        if self.unforeseen_bytes:
            overhead[UNFORESEEN] = self.unforeseen_bytes
        return Target(
            kind=runtime.accelerator.kind,
            device=runtime.accelerator.device,
            budget_bytes=self.budget_bytes,
            resident=runtime.ledger.others(self, part),
            overhead_bytes=overhead,
            host_memory=runtime.host_memory,
            cannot_issue_ahead=runtime.accelerator.cannot_issue_ahead,
            issue_ahead=variant.issue_ahead,
        )

    def _enter(self, part: Part, base: BucketPlan, inputs: Sequence[Any]) -> None:
        """Make what the residency decision says hold on the accelerator, as long as the weights exist."""
        self._buckets[part] = base
        self._outdated.pop(part, None)
        anchor = self.graph.anchor(inputs)
        reference = None if anchor is None else StorageWeakRef(anchor.untyped_storage())
        runtime, context = self.runtime, base.context
        residency = require(context.residency, "choose_residency")
        runtime.accelerator.limit_memory(context.limit_bytes)
        runtime.ledger.enter(self, part, residency, self._own_bytes, reference, self.graph.described)
        runtime.reserve(runtime.ledger.ring_bytes, context.usable_bytes)
        if part[1] not in self._models:
            self._watch(inputs)

    def _watch(self, inputs: Sequence[Any]) -> None:
        """Notice when the model that these weights belong to is gone."""
        weights = list(self.graph.weight_tensors(inputs).values())
        if weights:
            self._models[self.graph.model_of(inputs)] = ModelWeights(weights)
            self.runtime.lives.watch(weights)

    def _tell(self, schedule: Schedule) -> None:
        register(schedule)
        if schedule.whole_graph:
            logger.info("%s: %s", schedule.title, FITS)
        options = self.graph.options
        if options.print_schedule and overridden_split() is overridden_issue_ahead() is None:
            print(schedule.table(unfold=options.unfold), flush=True)


__all__ = ["StepPlans"]
