"""What generating text would take: prefill, each decode step, memory, and the same done otherwise.

Prefill is captured at the prompt's length and decode once, with the length of the cache as a symbol. The plan of
decode is made at the longest context, so that the budget holds it; its step is then evaluated at the first, the
middle and the last context. Weights that decode keeps on the accelerator are there in prefill too: one ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from hetegen_compile.dry_run.forwards import TracedGeneration, trace_generation
from hetegen_compile.dry_run.generation_plan import Generation, GenerationPlan
from hetegen_compile.dry_run.memory import accelerator_items, host_items, pinned_bytes
from hetegen_compile.dry_run.models import NamedModel, named_model
from hetegen_compile.dry_run.planning import (
    Machine,
    PlannedGraph,
    PlannedWeights,
    main_schedule,
    plan_graph,
    sizes_at,
    weight_bytes,
)
from hetegen_compile.dry_run.times import as_planned, contexts_of, generations, sum_of_steps, total
from hetegen_compile.dry_run.trace import TracedForward
from hetegen_compile.errors import OptionError
from hetegen_compile.hardware import profile_for
from hetegen_compile.heap import large_heap
from hetegen_compile.options import parse_options, whole_number
from hetegen_compile.passes.plans import RESIDENT

logger = logging.getLogger("hetegen_compile")


def plan_generation(
    model: Any,
    *,
    prompt: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    dtype: str | None = None,
    options: Mapping[str, object] | None = None,
    tell: Callable[[str], None] = logger.info,
) -> GenerationPlan:
    """Plan a generation without weights, without running and without the network.

    Args:
        model: a folder with a config.json, such a file, the id of a model whose config is in the hub's cache, a
            transformers config, or a module. An encoder has one forward and generates nothing.
        prompt, new_tokens, batch: tokens of a prompt, generated tokens of each sequence, sequences.
        dtype: of weights and activations, "float16", "bfloat16", "float32" or "float64"; None: what the config states
            if it is one of these, else "float16". A module keeps its own.
        options: those of the backend. Without ``context`` the budget holds the prompt and what is generated.
            ``print_schedule=True`` prints the tables of prefill and decode; ``pace`` and ``seed`` say nothing here.
        tell: called with what is done next; large models take a minute.

    Raises:
        OptionError: a figure or an option is wrong.
        HardwareProfileError: no such hardware.
        UnsupportedModelError: no such model, or one that cannot be planned; the message says what to do.
        BudgetError: ``gpu_memory`` is too small; the message has the number that works.
    """
    (machine, context), named = _machine(options, prompt, new_tokens, batch), named_model(model, dtype)
    machine = replace(machine, weight_bytes=weight_bytes(named.module))
    tell(f"{named.name}: tracing the forward of {prompt} tokens and that of one")
    with large_heap():
        contexts = contexts_of(prompt, new_tokens) if named.generates else []
        longest = max([context - 1, *contexts])
        traced = trace_generation(named, prompt, batch, longest=longest, steps=new_tokens > 1)
        tell(f"planning for {machine.profile.name}")
        prefill, decode = _plan_both(traced, machine, longest)
        times = {n: total([one.at(sizes_at(one.graph, traced.hint, n)) for one in decode]) for n in contexts}
        first = total([as_planned(one) for one in prefill])
    generated = batch * (new_tokens if named.generates else prompt)
    plan = GenerationPlan(
        model=named.name, hardware=machine.profile.name, dtype=named.dtype,
        prompt=prompt, new_tokens=new_tokens if named.generates else 0, batch=batch, context=context,
        prefill=main_schedule(prefill),
        decode=main_schedule(decode) if decode else None,
        decode_step_s={tokens: time.step_s for tokens, time in times.items()},
        ours=Generation(first.step_s, sum_of_steps({n: t.step_s for n, t in times.items()}), generated),
        floor_s=first.floor_s + sum_of_steps({n: t.floor_s for n, t in times.items()}),
        baselines=generations(first, times, generated),
        accelerator_bytes=accelerator_items([prefill, decode]),
        budget_bytes=machine.budget_bytes,
        host_bytes=host_items(named.module, decode or prefill),
        pinned_bytes=pinned_bytes([*prefill, *decode]),
        host_memory_bytes=machine.profile.host.memory_bytes,
        notes=_notes(named, machine, prompt + new_tokens, traced.windows),
    )  # fmt: skip
    if (options or {}).get("print_schedule"):
        _print_tables(plan, unfold=machine.options.unfold)
    return plan


def _print_tables(plan: GenerationPlan, *, unfold: bool) -> None:
    for schedule in filter(None, (plan.prefill, plan.decode)):
        print(schedule.table(unfold=unfold), flush=True)


def _machine(options: Mapping[str, object] | None, prompt: int, new_tokens: int, batch: int) -> tuple[Machine, int]:
    """What the plan is for, and the context that its options state."""
    for name, value in (("prompt", prompt), ("new_tokens", new_tokens), ("batch", batch)):
        whole_number(name, value, at_least=1)
    parsed = parse_options(options)
    context = parsed.context or prompt + new_tokens
    if context < prompt + new_tokens:
        raise OptionError(f"context={context} is less than the {prompt + new_tokens} tokens of prompt and generation")
    return Machine(replace(parsed, context=context), profile_for(parsed)), context


# ---- plans ---------------------------------------------------------------------------------------------------


def _plan_both(traced: TracedGeneration, machine: Machine, last: int) -> tuple[list[PlannedGraph], list[PlannedGraph]]:
    """Plans of prefill and of decode with the weights of one ledger: what decode keeps is there in prefill.

    Decode decides, since it runs most. If prefill then has no room, its activations being larger, decode leaves it.
    """
    if traced.decode is None:
        return _plan_forward(traced.prefill, machine, PlannedWeights(), traced.hint, traced.hint), []
    spare, prefill, decode = 0, list[PlannedGraph](), list[PlannedGraph]()
    while True:
        resident, less = PlannedWeights(), replace(machine, reserved_bytes=spare)
        decode = _plan_forward(traced.decode, less, resident, traced.hint, last, decode)
        held = dict(resident.first_rows)
        prefill = _plan_forward(traced.prefill, machine, resident, traced.hint, traced.hint, prefill)
        if resident.first_rows == held:
            return prefill, decode
        more = max(1, _fixed_bytes(prefill) - _fixed_bytes(decode))
        if more <= spare or not held:
            return prefill, decode
        spare = more


def _fixed_bytes(planned: Sequence[PlannedGraph]) -> int:
    """Bytes on the accelerator that are not resident weights."""
    return max(sum(nbytes for name, nbytes in one.residency.budget.items() if name != RESIDENT) for one in planned)


def _plan_forward(
    forward: TracedForward,
    machine: Machine,
    resident: PlannedWeights,
    hint: int,
    size: int,
    earlier: Sequence[PlannedGraph] = (),
) -> list[PlannedGraph]:
    planners = [one.planner for one in earlier]
    return [
        plan_graph(graph, machine, resident, sizes_at(graph, hint, size), planner)
        for graph, planner in zip_longest(forward.graphs, planners)
    ]


def _notes(named: NamedModel, machine: Machine, tokens: int, windows: int) -> tuple[str, ...]:
    notes = []
    if windows > 0:
        notes.append(f"windows that slide are planned as they are in the last decode step, {windows} tokens long")
    if named.positions is not None and tokens > named.positions:
        notes.append(f"{tokens} tokens are more than the {named.positions} positions that the model's config states")
    if named.quantised:
        notes.append("the config states quantised weights; the plan is for unquantised ones of the stated dtype")
    if machine.weight_bytes > machine.profile.host.memory_bytes:
        notes.append(
            "the weights are larger than the host's memory: they are read by way of the pinned ring, and what the "
            "disk takes is not in these times"
        )
    return tuple(notes)


__all__ = ["Generation", "GenerationPlan", "plan_generation"]
