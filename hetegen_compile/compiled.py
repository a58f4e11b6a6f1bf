"""A compiled graph: what Dynamo calls in the place of the graph that it captured."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.errors import BudgetError, drop_frames
from hetegen_compile.memory_remedies import with_remedies
from hetegen_compile.options import Options
from hetegen_compile.passes.context import ON_HOST, HostOnlyGraphError, Refusal, SegmentCache, SegmentCompiler
from hetegen_compile.passes.lift_parts import WeightPart, with_parts
from hetegen_compile.planning.planned import Sizes
from hetegen_compile.reports.schedule import Schedule, register
from hetegen_compile.runtime import Runtime, live_runtimes
from hetegen_compile.steps.captured_graph import CapturedGraph
from hetegen_compile.steps.run_step import run_step
from hetegen_compile.steps.step_plan import StepPlan
from hetegen_compile.steps.step_plans import StepPlans

logger = logging.getLogger("hetegen_compile")


@dataclass(frozen=True)
class _Refused:
    """What there was no plan for when the graph was compiled, and the error that says so."""

    sizes: Sizes
    budget_bytes: int
    error: BudgetError

    @classmethod
    def because(cls, error: BudgetError, sizes: Sizes, budget_bytes: int) -> _Refused:
        """Of the error's frames, which hold tensors, none is kept."""
        logger.error("%s", error)
        drop_frames(error)
        return cls(sizes, budget_bytes, error)


class CompiledGraph:
    """The callable that the backend returns to Dynamo.

    If no plan fits the budget, calls say so until one does: Dynamo calls it for other sizes, too, and after another
    model, whose smaller budget held for both, has gone.

    Args:
        inputs: real ones, those that Dynamo gives; the first plan is made for them.
        parts: of weights, which the module is given behind those.
        open_runtime: opens the accelerator that it runs on; asked again if it is called after ``release``.
    """

    __slots__ = ("__weakref__", "_graph", "_host_only", "_open_runtime", "_opened", "_refused")
    # with a __dict__, Dynamo's wrapper would hold a copy of it, and with that what ``release`` lets go

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Options,
        profile: HardwareProfile,
        open_runtime: Callable[[], Runtime],
        compile_segment: SegmentCompiler,
        parts: Sequence[WeightPart] = (),
    ) -> None:
        segments, inputs = SegmentCache(compile_segment, {}), with_parts(inputs, parts)
        self._graph = CapturedGraph.of(module, inputs, options=options, profile=profile, segments=segments, parts=parts)
        self._open_runtime = open_runtime
        self._host_only: Schedule | None = None
        self._opened: StepPlans | None = None
        self._refused: _Refused | None = None
        weights = list(self._graph.weight_tensors(inputs).values())
        for runtime in live_runtimes():
            runtime.lives.exclusively(functools.partial(runtime.lives.compiled, options, weights))
        steps = self._open()
        try:
            steps.runtime.lives.exclusively(lambda: self._plan_first(steps, inputs))
        except HostOnlyGraphError as reason:
            self._stay_on_host(str(reason))
        except BudgetError as error:
            self._refused = _Refused.because(error, self._graph.sizes(inputs), steps.budget_bytes)
            self.release()

    def __call__(self, *given: Any) -> Any:
        """One forward: the outputs that eager would give, inputs written as eager would have.

        Raises:
            BudgetError: no plan for this forward fits the budget.
            AcceleratorMemoryError: the accelerator ran out of memory twice, or after a write that must not be
                repeated.
        """
        inputs = with_parts(given, self._graph.parts)
        if self._host_only is None:
            steps = self._open()
            try:
                return steps.runtime.lives.exclusively(lambda: self._step(steps, inputs))
            except HostOnlyGraphError as reason:
                self._stay_on_host(str(reason))
            except BudgetError:
                if not steps.serves_models:
                    self.release()
                raise
        return self._graph.module(*inputs)

    def release(self) -> None:
        """Let go of the accelerator and of what lies there for this graph, as if it were gone.

        Dynamo does not let go of all graphs when it is reset or their model is gone. Whoever calls one nevertheless
        (a thread that was about to, another model of the class) finds it working, with new plans.
        """
        self._opened = None

    @property
    def options(self) -> Options:
        """Those that it was compiled with."""
        return self._graph.options

    @property
    def reads_weights(self) -> bool:
        """Whether some of a model's weights are among its inputs."""
        return bool(self._graph.weights)

    @property
    def serves_models(self) -> bool:
        """Whether it has plans for a model that is there."""
        return self._opened is not None and self._opened.serves_models

    def lose(self, storages: Iterable[int]) -> bool:
        """Storages are gone: forget the models that are gone with them; whether there was one."""
        return self._opened is not None and self._opened.lose(storages)

    def storages_moved(self, places: Mapping[int, int]) -> None:
        """Weights lie in other storages from now on (old identity to new)."""
        if self._opened is not None:
            self._opened.storages_moved(places)

    def outdate(self) -> None:
        """Memory is to be shared out anew."""
        if self._opened is not None:
            self._opened.outdate()

    def give_way(self, options: Options, storages: frozenset[int]) -> bool:
        """Release this graph if it serves the model of these weights with other options; whether it did."""
        if self._opened is None or options == self._graph.options or not self._opened.serves(storages):
            return False
        self.release()
        return True

    @property
    def runtime(self) -> Runtime:
        """What it runs on."""
        return self._open().runtime

    @property
    def plans(self) -> tuple[StepPlan, ...]:
        """Those that can run, oldest first."""
        return self._open().all

    @property
    def compiled_segments(self) -> int:
        """How many different segments were compiled."""
        return len(self._graph.segments.compiled)

    def _open(self) -> StepPlans:
        opened = self._opened
        if opened is None:
            opened = self._opened = StepPlans(self._graph, self._open_runtime())
            opened.runtime.lives.use(self)
        return opened

    def _plan_first(self, steps: StepPlans, inputs: Sequence[Any]) -> None:
        steps.runtime.mirrors.check(self._graph.weight_tensors(inputs).values())
        with_remedies(steps, lambda: steps.find(inputs))

    def _step(self, steps: StepPlans, inputs: Sequence[Any]) -> Any:
        if self._refused is not None:
            self._refuse_again(self._refused, steps, inputs)
        outputs = with_remedies(
            steps, lambda: run_step(steps.runtime, steps.find_ready(inputs), inputs, self._graph.writes)
        )
        return self._graph.results.as_eager(outputs)

    def _refuse_again(self, refused: _Refused, steps: StepPlans, inputs: Sequence[Any]) -> None:
        """Plan nothing again for the same sizes and budget; anything else may fit."""
        if (refused.sizes, refused.budget_bytes) == (self._graph.sizes(inputs), steps.budget_bytes):
            raise copy.copy(refused.error) from refused.error.__cause__

    def _stay_on_host(self, reason: str) -> None:
        """Run as it is from now on, and say so."""
        self._host_only = _told_on_host(self._graph.options, reason)
        self.release()


class HostGraph:
    """A graph that nothing can be planned for: it runs on the host as it is, and the accelerator is not opened."""

    def __init__(self, module: fx.GraphModule, options: Options, reason: str) -> None:
        self._module, self._schedule = module, _told_on_host(options, reason)

    def __call__(self, *given: Any) -> Any:
        """One forward, as eager has it."""
        return self._module(*given)

    def release(self) -> None:
        """There is nothing to let go of."""


def _told_on_host(options: Options, reason: str) -> Schedule:
    """The schedule of a graph that runs on the host, registered, with a warning; ``schedules()`` has it while it is
    held."""
    refusal = Refusal("the whole graph", f"{ON_HOST}: {reason}")
    logger.warning("%s %s", refusal.where, refusal.reason)
    schedule = Schedule(
        title="hetegen: not offloaded, on the host in eager mode", tokens=(1, None), split=options.split, rows=(),
        resident_bytes=0, streamed_bytes=0, host_bytes=0, predicted_step_s=0.0, floor_s=0.0, baselines={},
        budget_bytes=0, budget={}, refusals=(refusal,), whole_graph=False,
    )  # fmt: skip
    register(schedule)
    return schedule


__all__ = ["CompiledGraph", "HostGraph"]
