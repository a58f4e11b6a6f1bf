"""Schedules of one grouped graph that are made to be simulated, each once.

Why: residency, the balance and the baselines ask for the same ones (nothing on the host, each Linear by itself), a dry
run asks again what they would take at other sizes, and the one that wins becomes the plan. Making a schedule is most of
what planning costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from hetegen_compile.ir import copy_module
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.passes.plans import Splits
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.pipeline import SIMULATED, UNTIL_MEASURED, Stage, run_pipeline

_NOT_MEASURED = tuple(stage for stage in SIMULATED if stage not in UNTIL_MEASURED)


@dataclass(frozen=True)
class Trial:
    """A schedule and the context that it was made in, with its prediction once it has been simulated."""

    module: fx.GraphModule
    context: Context

    @property
    def prediction(self) -> Prediction:
        """The simulated step at the sizes that it was made for."""
        return require(self.context.prediction, "predict_step")


def measured_trial(module: fx.GraphModule, context: Context, splits: Splits) -> Trial:
    """A schedule of ``module`` with these rows and what it occupies; it has not been simulated.

    The weights are those of a model, which a schedule must not keep: it does not need them.
    """
    copy = copy_module(module)
    return Trial(copy, run_pipeline(copy, replace(context, weights={}, splits=splits), UNTIL_MEASURED, lint=False))


class Trials:
    """The schedules made of ``module``, a graph with its segments and its Linears whole.

    What is kept are the fastest and those that will be asked for again. ``measured`` were made of the module before:
    they wait for who asks for them, until the first schedule is finished.
    """

    def __init__(self, module: fx.GraphModule, measured: Iterable[Trial] = ()) -> None:
        self.module = module
        self._measured = list(measured)
        self._kept: list[Trial] = []
        self._best: Trial | None = None

    def step_s(self, context: Context, splits: Splits, *, keep: bool = False) -> float:
        """Seconds of a step with these rows at the context's sizes; ``keep`` if it will be asked for again."""
        return self.prediction(context, splits, keep=keep).step_s

    def prediction(self, context: Context, splits: Splits, *, keep: bool = False) -> Prediction:
        """The simulated step with these rows at the context's sizes; ``keep`` if it will be asked for again."""
        trial = self._trial(context, splits)
        if keep and all(trial is not other for other in self._kept):
            self._kept.append(trial)
        if self._best is None or trial.prediction.step_s < self._best.prediction.step_s:
            self._best = trial
        if trial.context.sizes == context.sizes:
            return trial.prediction
        return predict_step(trial.module, replace(trial.context, sizes=context.sizes))

    def adopt(self, other: Trials) -> None:
        """Take what another one has made of the same module, which nobody will ask any more."""
        self._best, self._kept = other._best, [*other._kept]
        self._measured += other._measured

    def finish(self, context: Context, splits: Splits, stages: Sequence[Stage]) -> tuple[fx.GraphModule, Context]:
        """The schedule with these rows, through those of ``stages`` that a simulation has no need of, too.

        To be called once for the same rows: stages that rewrite change what is kept here.
        """
        trial = self._trial(context, splits)
        self._measured.clear()
        rest = tuple(stage for stage in stages if stage not in SIMULATED)
        return trial.module, run_pipeline(trial.module, trial.context, rest)

    def _trial(self, context: Context, splits: Splits) -> Trial:
        wanted = _what_matters(replace(context, splits=splits))
        for trial in (self._best, *self._kept):
            if trial is not None and _what_matters(trial.context) == wanted:
                return trial
        for place, trial in enumerate(self._measured):
            if _what_matters(trial.context) == wanted:
                del self._measured[place]
                return Trial(trial.module, run_pipeline(trial.module, trial.context, _NOT_MEASURED, lint=False))
        module = copy_module(self.module)
        return Trial(module, run_pipeline(module, replace(context, splits=splits), SIMULATED, lint=False))


def _what_matters(context: Context) -> Context:
    """The context less what a schedule does not depend on once the rows are decided.

    Nothing is decided again for other sizes: a schedule belongs to a range of them.
    """
    options = replace(context.options, split="auto")
    return replace(context, options=options, sizes={}, refused={}, costs=None, memory=None, prediction=None)


__all__ = ["Trial", "Trials", "measured_trial"]
