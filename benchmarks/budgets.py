"""The smallest budget that an error names against the smallest that works, and what is used of either.

    python -m benchmarks.budgets [--case NAME ...] [--planned-only] [--json OUT]

For tiny models with random weights, caches, lengths and numbers of sequences: the budget that the first error names
for the stated ``context`` and ``max_batch`` (for a forward, where nothing is stated), whether the whole use (every
prefill and decode step, tokens as in eager) works with it, and the smallest that works, found by halving the
interval. The latter is looked for with nothing stated, so that each step is planned as it comes. ``used`` is the
peak that the accelerator counted at the named budget, over that budget.

It runs on the emulated accelerator; bytes are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from benchmarks.arguments import output_file
from benchmarks.tiny_configs import VOCABULARY, tiny_config
from hetegen_compile.backend import make_backend
from hetegen_compile.errors import BudgetError, HetegenError
from hetegen_compile.passes.claims import NothingResident
from hetegen_compile.planning.planned import Sizes, Target
from hetegen_compile.planning.planner import Planner
from hetegen_compile.steps.captured_graph import CapturedGraph
from hetegen_compile.steps.segments import plain_compiler
from hetegen_compile.steps.step_plans import StepPlans

PROMPT = 7
WEIGHT_SCALE = 6
"""Matrices are scaled up by this: with small random weights every token would be the same."""

_AUTO = {"t5": AutoModelForSeq2SeqLM, "whisper": AutoModelForSpeechSeq2Seq}
_NAMED = re.compile(r"'gpu_memory': (\d+)")


@dataclass(frozen=True)
class Case:
    """A use of a model: prompts of several numbers of sequences, one after the other, and the tokens that follow each.

    ``tokens`` 0 is a forward without a cache. ``stated`` says whether context and number of sequences are.
    ``mode`` is how it is called: ``generate``, the same compiled with ``dynamic=True``, or steps by hand whose prompt
    is marked as of varying length.
    """

    model: str
    tokens: int = 5
    cache: str | None = None
    batches: tuple[int, ...] = (1,)
    stated: bool = True
    mode: str = "generate"

    @property
    def name(self) -> str:
        """Everything that differs, for people and for ``--case``."""
        parts = [self.model, self.cache or "dynamic", f"+{self.tokens}", "x".join(map(str, self.batches))]
        parts += [] if self.stated else ["unstated"]
        return "-".join([*parts, *([] if self.mode == "generate" else [self.mode])])

    @property
    def options(self) -> dict[str, Any]:
        """What is stated of it."""
        if not self.stated or not self.tokens:
            return {}
        prompt = 1 if self.model in _AUTO else PROMPT  # a decoder begins with a token of its own
        return {"context": prompt + self.tokens - 1, "max_batch": max(self.batches)}  # nothing follows the last token


def _cases() -> Iterator[Case]:
    for model in ("opt", "llama", "gemma3_text", "mistral", "mixtral", "t5", "whisper"):
        yield Case(model)
        yield Case(model, tokens=24)
    for model in ("opt", "llama", "gemma3_text", "mixtral"):
        yield Case(model, cache="static", tokens=24)
        yield Case(model, batches=(1, 4))
        yield Case(model, tokens=24, batches=(4,))
    for model in ("opt", "llama", "mistral"):
        yield Case(model, stated=False)
        yield Case(model, mode="dynamic", tokens=24)
        if model != "mistral":  # torch refuses the mark: its window fixes the length
            yield Case(model, mode="marked", tokens=24)
        yield Case(model, mode="dynamic", batches=(1, 4))
    yield from (Case(model, tokens=0, batches=(batch,)) for model in ("mlp", "llama") for batch in (1, 4))


CASES = {case.name: case for case in _cases()}


@dataclass
class Result:
    """Bytes; ``works`` is whether the named budget does for the whole use: "yes", or what is said instead."""

    case: str
    named: int
    smallest: int
    peak: int
    works: str
    message: str

    @property
    def row(self) -> list[Any]:
        """A line of the table."""
        return [self.case, self.named, self.works, self.smallest, self.named / self.smallest, self.peak / self.named]


@dataclass(frozen=True)
class Step:
    """A forward of a graph that was captured, to be planned for any budget."""

    graph: CapturedGraph
    sizes: Sizes
    weights: Mapping[str, Tensor]

    def needs(self, **options: Any) -> str:
        """The error for a budget of a byte."""
        given = replace(self.graph.options, context=None, max_batch=1)
        planner = Planner(
            self.graph.module, options=replace(given, **options), profile=self.graph.profile,
            segments=self.graph.segments,
        )  # fmt: skip
        try:
            planner.plan_bucket(self.sizes, Target("emulated", torch.device("cpu"), 1, NothingResident()), self.weights)
        except BudgetError as error:
            return str(error)
        raise AssertionError("a byte is enough")


class Use:
    """A case with its model, what eager makes of it, and its steps: those of a run with all that it may want."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, make_model(case.model)
        self._expected = self._run()
        self.steps: list[Step] = []
        find = StepPlans.find

        def noted(plans: StepPlans, inputs: Sequence[Any]) -> Any:
            graph = plans.graph
            self.steps.append(Step(graph, graph.sizes(inputs), graph.weight_tensors(inputs)))
            return find(plans, inputs)

        with mock.patch.object(StepPlans, "find", noted):
            self._compiled_run(1 << 30, {})

    def smallest(self) -> int:
        """The most that any step asks for by itself: the first and the last one of each graph are looked at."""
        ends: dict[int, list[Step]] = {}
        for step in self.steps:
            ends.setdefault(id(step.graph), []).append(step)
        looked_at = [{id(step): step for step in (steps[0], steps[-1])}.values() for steps in ends.values()]
        return max(_named_in(step.needs()) for steps in looked_at for step in steps)

    def tried(self, budget: int, **options: Any) -> tuple[str, int]:
        """("yes" or what is wrong with it, peak bytes) of the whole use with a budget."""
        try:
            found, peak = self._compiled_run(budget, options)
        except HetegenError as error:
            return f"no: {_named_in(error)}", 0
        return "yes" if all(map(_same, found, self._expected)) else "wrong tokens", peak

    def _compiled_run(self, budget: int, options: dict[str, Any]) -> tuple[list[Tensor], int]:
        torch._dynamo.reset()
        backend = _Backend()
        given = {"accelerator": "emulated", "print_schedule": False, "gpu_memory": budget, **options}
        dynamic = True if self.case.mode == "dynamic" else None
        self.model.compile(backend=backend, options=given, dynamic=dynamic)
        try:
            found = self._run()
            return found, max(graph.runtime.accelerator.counters.peak_bytes for graph in backend.graphs)
        finally:
            self.model._compiled_call_impl = None
            torch._dynamo.reset()

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        return [self._forward(batch) for batch in self.case.batches]

    def _forward(self, batch: int) -> Tensor:
        case, inputs = self.case, make_inputs(self.case.model, batch)
        if case.mode == "marked":
            return by_hand(self.model, inputs, case.tokens)
        if case.tokens == 0:
            found = self.model(**inputs)
            return found if isinstance(found, Tensor) else found.logits
        return self.model.generate(  # type: ignore[no-any-return, operator]
            **inputs, cache_implementation=case.cache, max_new_tokens=case.tokens, min_new_tokens=case.tokens,
            do_sample=False,
        )  # fmt: skip


class _Backend:
    """The backend with segments as plain FX code, and its graphs."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self._backend = make_backend(plain_compiler)
        self.reset = self._backend.reset

    def __call__(self, module: Any, inputs: Any, *, options: Any = None) -> Any:
        self.graphs.append(self._backend(module, inputs, options=options))
        return self.graphs[-1]


def _named_in(error: object) -> int:
    found = _NAMED.search(str(error))
    return int(found[1]) if found else 0


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype.is_floating_point:
        return torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    return torch.equal(one, other)


def by_hand(model: nn.Module, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """Greedy steps with a dynamic cache; the prompt's number of tokens is marked as one that varies."""
    ids, cache, found = inputs["input_ids"].clone(), None, []
    torch._dynamo.mark_dynamic(ids, 1)
    for _ in range(tokens):
        step = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = step.logits[:, -1:].argmax(-1), step.past_key_values
        found.append(ids)
    return torch.cat(found, 1)


def make_model(name: str) -> nn.Module:
    """A tiny model in evaluation mode, the same weights at each call."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4))).eval()
    config = tiny_config(name, is_decoder=name not in _AUTO)
    model = _AUTO.get(name, AutoModelForCausalLM).from_config(config).eval()
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(WEIGHT_SCALE if parameter.dim() > 1 and name not in _AUTO else 1)
    return model  # type: ignore[no-any-return]


def make_inputs(name: str, batch: int) -> dict[str, Tensor]:
    """Random prompts [batch, 7]; each but the first is shorter by a token than the one before, padded left."""
    generator = torch.Generator().manual_seed(1)
    if name == "mlp":
        return {"input": torch.randn(batch * 8, 64, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(batch, 80, 128, generator=generator)}
    tokens = torch.randint(2, VOCABULARY, (batch, PROMPT), generator=generator)
    mask = (torch.arange(PROMPT)[None, :] >= torch.arange(batch)[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def measured(case: Case, *, planned_only: bool) -> Result:
    """One line of the table."""
    use = Use(case)
    message = use.steps[0].needs(**case.options)
    named = _named_in(message)
    works, peak = ("", 0) if planned_only else use.tried(named, **case.options)
    return Result(case.name, named, use.smallest(), peak, works, message)


HEADERS = ("case", "named", "works", "smallest", "named/smallest", "used")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a named budget does not do."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets", description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", metavar="NAME", help="a case, or the beginning of its name")
    parser.add_argument("--planned-only", action="store_true", help="run nothing with the budget that is named")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    given = parser.parse_args(arguments)
    wanted = [case for name, case in CASES.items() if not given.case or name.startswith(tuple(given.case))]
    torch.set_num_threads(1)
    logging.getLogger("hetegen_compile").setLevel(logging.CRITICAL)  # errors are what is looked for
    results = []
    for case in wanted:
        results.append(measured(case, planned_only=given.planned_only))
        print(*results[-1].row, flush=True)
        if given.json:
            given.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(tabulate([result.row for result in results], HEADERS, floatfmt=".3f"))
    return int(any(result.works not in ("yes", "") for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
