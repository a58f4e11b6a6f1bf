"""The state of a life cycle: compiled models with their eager twins, and how the two are compared."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from benchmarks.cycles.compare import compare
from benchmarks.cycles.inputs import Habits, forward_inputs
from benchmarks.cycles.watch import Failure, Watch
from benchmarks.one_architecture import build_model
from hetegen_compile.backend import make_backend
from hetegen_compile.errors import BudgetError
from hetegen_compile.steps.segments import inductor_compiler, plain_compiler

BUDGETS = (0.25, 0.4, 0.6, 0.8, 1.0)
"""Shares of the weights' bytes."""
_RETRIES = 16

_NAMED = re.compile(r"'gpu_memory': (\d+)|smallest budget that works is (\d+)")
"""What an error names: the model's own remedy, or what the model with the smallest budget should have been given."""

Run = Callable[[Any], dict[str, Any]]
"""Uses a model and returns what is compared, by name."""


@dataclass
class Pair:
    """A compiled model and its twin, which stays in eager."""

    name: str
    kind: str
    model: Any
    eager: Any
    budget_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """A weight that several modules share counted once."""
        return sum(p.numel() * p.element_size() for p in self.eager.parameters())

    @property
    def both(self) -> tuple[Any, Any]:
        """For what is done to each of them."""
        return self.eager, self.model


@dataclass
class Cycle:
    """One cycle; ``story`` tells what was done, ``refusals`` how often a budget was too small."""

    seed: int
    inductor: bool
    story: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    graphs: int = 0
    refusals: int = 0
    compared: int = 0

    def __post_init__(self) -> None:
        self.habits = Habits.of(Random(f"{self.seed}/habits"))
        made = make_backend(inductor_compiler if self.inductor else plain_compiler)

        def counting(module: Any, inputs: Any, *, options: Any = None) -> Any:
            self.graphs += 1
            return made(module, inputs, options=options)

        counting.reset = made.reset  # type: ignore[attr-defined]
        self.backend = counting

    def say(self, text: str) -> None:
        """Add a line to the story."""
        self.story.append(text)

    def add(self, name: str, kind: str, rng: Random) -> Pair:
        """Build a pair and compile its model; raises what building raises."""
        eager = _prepared(build_model(name, kind, rng.choice([1, 1, 2])))
        pair = Pair(name, kind, copy.deepcopy(eager), eager)
        self.pairs.append(pair)
        self.compile(pair, rng)
        return pair

    def compile(self, pair: Pair, rng: Random, budget_bytes: int | None = None) -> None:
        """Compile the model, again perhaps; without a stated budget some share of the weights' bytes."""
        share = rng.choice(BUDGETS)
        pair.budget_bytes = budget_bytes or int(pair.weight_bytes * share)
        options = {
            "accelerator": "emulated", "seed": self.seed, "print_schedule": False, "gpu_memory": pair.budget_bytes,
            "split": rng.choice([0.5, 0.5, "auto", "auto", 0.0, 1.0]),
            "issue_ahead": rng.choice(["auto", "auto", True]),
            **rng.choice([{}, {}, {"max_batch": 2}, {"context": 40}, {"max_batch": 3, "context": 40}]),
        }  # fmt: skip
        dynamic = rng.choice([None, None, None, True])
        self.say(f"  compile {pair.name} {options} dynamic={dynamic}")
        pair.model._compiled_call_impl = None
        pair.model.compile(backend=self.backend, options=options, dynamic=dynamic)

    def compare(self, pair: Pair, run: Run, *, unchanged: bool = False, rough: bool = False) -> bool:
        """Run in eager and compiled with the same random numbers; whether eager did it at all.

        ``unchanged``: see ``Watch.action``; ``rough``: see ``compare``.
        """
        torch.manual_seed(self.seed)
        try:
            expected = run(pair.eager)
        except Exception as error:
            self.say(f"  eager raises {type(error).__name__}: {str(error)[:160]}")
            self._raises_too(pair, run, error)
            return False
        with self.watch.action(unchanged=unchanged):
            result = self._within_a_budget(pair, run)
        compare(result, expected, rough=rough)
        self.compared += 1
        return True

    def _raises_too(self, pair: Pair, run: Run, expected: Exception) -> None:
        torch.manual_seed(self.seed)
        try:
            run(pair.model)
        except Exception:
            return
        raise Failure(f"eager raises {type(expected).__name__}: {expected}; compiled it does not")

    def _within_a_budget(self, pair: Pair, run: Run) -> dict[str, Any]:
        """A budget that is too small has to name one that works, for what is known so far; it is tried."""
        for _ in range(_RETRIES):
            torch.manual_seed(self.seed)
            try:
                return run(pair.model)
            except BudgetError as error:
                self._raise_budgets(error)
        raise Failure(f"{_RETRIES} named budgets were not enough")

    def _raise_budgets(self, error: BudgetError) -> None:
        """The smallest budget of the models alive holds for all: each has to have what is named."""
        self.refusals += 1
        found, smallest = _NAMED.search(str(error)), min(pair.budget_bytes for pair in self.pairs)
        if found is None:
            raise Failure(f"no budget is named: {error}")
        named = int(found[1] or found[2])
        self.say(f"  {smallest} bytes are refused, {named} named")
        if named <= smallest:
            raise Failure(f"{smallest} bytes are refused and {named} named: {error}")
        for pair in self.pairs:
            if pair.budget_bytes < named:
                self.compile(pair, Random(named), named * 9 // 8)
                self._call(pair)

    def _call(self, pair: Pair) -> None:
        """Its old graphs, and the budget that they state, give way at its next call only."""
        if len(self.pairs) > 1:
            inputs = forward_inputs(pair.model, pair.kind, batch=1, length=2, padded=False, seed=1)
            try:
                with torch.no_grad():
                    pair.model(**inputs)
            except BudgetError as error:
                self.say(f"  {pair.name} beside it: {str(error)[:100]}")


def _prepared(model: Any) -> Any:
    """A model that generates as many tokens as it is asked for."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.update(eos_token_id=None, pad_token_id=0, forced_eos_token_id=None)
        settings.suppress_tokens = settings.begin_suppress_tokens = settings.forced_decoder_ids = None
        if model.config.is_encoder_decoder:
            settings.decoder_start_token_id = 1
    return model
