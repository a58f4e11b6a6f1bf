"""What generating text would take: prefill, each decode step, memory, and the same done otherwise.

Prefill is captured at the prompt's length and decode once, with the length of the cache as a symbol. The plan of
decode is made at the longest context, so that the budget holds it; its step is then evaluated at the first, the
middle and the last context. Weights that decode keeps on the accelerator are there in prefill too: one ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hetegen_compile.dry_run.fakes import Fakes
from hetegen_compile.dry_run.memory import accelerator_items, host_items, pinned_bytes, weight_bytes
from hetegen_compile.dry_run.models import NamedModel, named_model
from hetegen_compile.dry_run.planning import (
    Machine,
    PlannedGraph,
    PlannedWeights,
    StepTimes,
    main_schedule,
    plan_graph,
    sizes_at,
)
from hetegen_compile.dry_run.trace import TracedForward, trace
from hetegen_compile.errors import OptionError, UnsupportedModelError
from hetegen_compile.hardware import profile_for
from hetegen_compile.options import parse_options
from hetegen_compile.schedule import Schedule


@dataclass(frozen=True)
class Generation:
    """Seconds of a whole generation, and what they make of tokens."""

    prefill_s: float
    decode_s: float
    tokens: int

    @property
    def total_s(self) -> float:
        """Seconds from the prompt to the last token."""
        return self.prefill_s + self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences per second of the whole generation."""
        return self.tokens / self.total_s


@dataclass(frozen=True)
class GenerationPlan:
    """A predicted generation. All figures are predictions of the cost model on the named hardware.

    Attributes:
        model, hardware, dtype: what it is of, for people.
        prompt, new_tokens, batch, context: tokens of a prompt, generated tokens of each sequence, sequences, and the
            tokens of cache that the budget holds.
        prefill: the schedule of the prompt's forward.
        decode: the schedule of one token at the last context; None for an encoder.
        decode_step_s: seconds of a decode step by the tokens in the cache: first, middle and last.
        ours: the whole generation with this plan.
        floor_s: a bound for the whole generation that no schedule beats.
        baselines: the whole generation done otherwise; None where it does not fit.
        accelerator_bytes: peak bytes on the accelerator, item by item, of the forward that needs most.
        budget_bytes: the limit that they keep to.
        host_bytes: peak bytes in host memory, item by item; ``pinned_bytes`` of the weights are pinned in place.
        host_memory_bytes: what the hardware has.
        notes: what a reader has to know.
    """

    model: str
    hardware: str
    dtype: str
    prompt: int
    new_tokens: int
    batch: int
    context: int
    prefill: Schedule
    decode: Schedule | None
    decode_step_s: Mapping[int, float]
    ours: Generation
    floor_s: float
    baselines: Mapping[str, Generation | None]
    accelerator_bytes: Mapping[str, int]
    budget_bytes: int
    host_bytes: Mapping[str, int]
    pinned_bytes: int
    host_memory_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def prefill_s(self) -> float:
        """Seconds of the prompt's forward."""
        return self.ours.prefill_s

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second over the whole generation, prefill included."""
        return self.ours.tokens_per_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens per second of the decode steps alone; None without any."""
        steps = self.new_tokens - 1
        return self.batch * steps / self.ours.decode_s if self.decode is not None and steps else None

    @property
    def accelerator_peak_bytes(self) -> int:
        """Most bytes on the accelerator at one time."""
        return sum(self.accelerator_bytes.values())

    @property
    def host_peak_bytes(self) -> int:
        """Most bytes in host memory at one time."""
        return sum(self.host_bytes.values())


@dataclass(frozen=True)
class _Traced:
    """Both forwards of a model; ``hint`` is the length of the cache that decode was captured with."""

    prefill: TracedForward
    decode: TracedForward | None
    hint: int


def plan_generation(
    model: Any,
    *,
    prompt: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    dtype: str = "float16",
    options: Mapping[str, object] | None = None,
) -> GenerationPlan:
    """Plan a generation without weights, without running and without the network.

    Args:
        model: a folder with a config.json, such a file, the id of a model whose config is in the hub's cache, a
            transformers config, or a module. An encoder has one forward and generates nothing.
        prompt, new_tokens, batch: tokens of a prompt, generated tokens of each sequence, sequences.
        dtype: of weights and activations; a module keeps its own.
        options: those of the backend. Without ``context`` the budget holds the prompt and what is generated.

    Raises:
        OptionError: a figure or an option is wrong.
        HardwareProfileError: no such hardware.
        UnsupportedModelError: no such model, or one that cannot be planned; the message says what to do.
        BudgetError: ``gpu_memory`` is too small; the message has the number that works.
    """
    for name, value in (("prompt", prompt), ("new_tokens", new_tokens), ("batch", batch)):
        if value < 1:
            raise OptionError(f"{name}={value!r}: expected a whole number of at least 1")
    machine = _machine(options, prompt + new_tokens, batch)
    named = named_model(model, dtype)
    traced = _trace(named, prompt, batch)
    context = machine.options.context or prompt + new_tokens
    contexts = _contexts(prompt, new_tokens) if traced.decode is not None else []
    prefill, decode = _plan_both(traced, machine, max([context - 1, *contexts]))
    times = {tokens: _total([one.at(sizes_at(one.graph, traced.hint, tokens)) for one in decode]) for tokens in contexts}
    first = _total([_as_planned(one) for one in prefill])
    generated = batch * (new_tokens if traced.decode is not None else prompt)
    return GenerationPlan(
        model=named.name,
        hardware=machine.profile.name,
        dtype=dtype if not isinstance(model, nn.Module) else _dtype_of(model),
        prompt=prompt,
        new_tokens=new_tokens if traced.decode is not None else 0,
        batch=batch,
        context=context,
        prefill=main_schedule(prefill),
        decode=main_schedule(decode) if decode else None,
        decode_step_s={tokens: time.step_s for tokens, time in times.items()},
        ours=Generation(first.step_s, _sum_of_steps({n: t.step_s for n, t in times.items()}), generated),
        floor_s=first.floor_s + _sum_of_steps({n: t.floor_s for n, t in times.items()}),
        baselines=_generations(first, times, generated),
        accelerator_bytes=accelerator_items([prefill, decode]),
        budget_bytes=machine.budget_bytes,
        host_bytes=host_items(named.module, decode or prefill),
        pinned_bytes=pinned_bytes([*prefill, *decode]),
        host_memory_bytes=machine.profile.host.memory_bytes,
        notes=_notes(named, machine, prompt + new_tokens),
    )


def _machine(options: Mapping[str, object] | None, context: int, batch: int) -> Machine:
    parsed = parse_options(options)
    if parsed.context is not None and parsed.context < context:
        raise OptionError(f"context={parsed.context} is less than the {context} tokens of prompt and generation together")
    sequences = -(-parsed.max_batch // batch)  # the graphs hold ``batch`` of them already
    return Machine(replace(parsed, context=parsed.context or context, max_batch=sequences), profile_for(parsed))


# ---- capture -------------------------------------------------------------------------------------------------


def _trace(named: NamedModel, prompt: int, batch: int) -> _Traced:
    fakes = Fakes()
    module = fakes.copy(named.module)
    kwargs: dict[str, Any] = {"input_ids": _tokens(fakes, batch, prompt)}
    if not named.generates:
        return _Traced(trace(module, fakes, (), kwargs), None, prompt)
    kwargs["use_cache"] = True
    if named.takes("logits_to_keep"):
        kwargs["logits_to_keep"] = 1  # generate() asks for the last token's only
    prefill = trace(module, fakes, (), kwargs)
    cache = getattr(prefill.result, "past_key_values", None)
    if cache is None:
        raise UnsupportedModelError(f"{named.name} returns no cache, so its decode steps cannot be planned")
    hint = _make_dynamic(cache, prompt, fakes, named)
    decode = trace(module, fakes, (), {**kwargs, "input_ids": _tokens(fakes, batch, 1), "past_key_values": cache})
    return _Traced(prefill, decode, hint)


def _tokens(fakes: Fakes, batch: int, tokens: int) -> Tensor:
    return fakes.of(torch.empty(batch, tokens, dtype=torch.long, device="meta"))


def _make_dynamic(cache: Any, prompt: int, fakes: Fakes, named: NamedModel) -> int:
    """Let the cache's length be a symbol; returns its value in the capture, at least 2 (Dynamo takes 0 and 1 as they are)."""
    from transformers.cache_utils import DynamicLayer

    hint = max(2, prompt)
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None:
            raise UnsupportedModelError(
                f"{named.name} has a cache of {type(layer).__name__}; decode steps are planned for caches that grow "
                "with each token (DynamicLayer) only: use hetegen_compile.plan(model, input_ids=..., past_key_values=...)"
            )
        with fakes.mode:
            layer.keys, layer.values = (_of_length(past, hint) for past in (layer.keys, layer.values))
        for past in (layer.keys, layer.values):
            torch._dynamo.maybe_mark_dynamic(past, past.dim() - 2)
    return hint


def _of_length(past: Tensor, tokens: int) -> Tensor:
    return past.new_empty(*past.shape[:-2], tokens, past.shape[-1])


# ---- plans ---------------------------------------------------------------------------------------------------


def _plan_both(traced: _Traced, machine: Machine, last: int) -> tuple[list[PlannedGraph], list[PlannedGraph]]:
    """Plans of prefill and of decode with the weights of one ledger: what decode keeps is there in prefill.

    Decode decides, since it runs most. If prefill then has no room, its activations being larger, decode leaves it.
    """
    if traced.decode is None:
        return _plan_forward(traced.prefill, machine, PlannedWeights(), traced.hint, traced.hint), []
    spare = 0
    while True:
        resident = PlannedWeights()
        decode = _plan_forward(traced.decode, replace(machine, reserved_bytes=spare), resident, traced.hint, last)
        held = dict(resident.bytes_of)
        prefill = _plan_forward(traced.prefill, machine, resident, traced.hint, traced.hint)
        if _keeps(prefill, held):
            return prefill, decode
        more = max(1, _fixed_bytes(prefill) - _fixed_bytes(decode))
        if more <= spare or not held:
            return prefill, decode
        spare = more


def _keeps(planned: Sequence[PlannedGraph], held: Mapping[int, int]) -> bool:
    """Whether the plans leave on the accelerator what lies there."""
    used = {id(weight) for one in planned for weight in one.graph.weights.values()}
    kept = {id(one.graph.weights[name]) for one in planned for name in one.residency.weights}
    return (held.keys() & used) <= kept and not any(one.residency.evicts for one in planned)


def _fixed_bytes(planned: Sequence[PlannedGraph]) -> int:
    """Bytes on the accelerator that are not resident weights."""
    return max(
        sum(nbytes for name, nbytes in one.residency.budget.items() if name != "resident weights") for one in planned
    )


def _plan_forward(
    forward: TracedForward, machine: Machine, resident: PlannedWeights, hint: int, size: int
) -> list[PlannedGraph]:
    return [plan_graph(graph, machine, resident, sizes_at(graph, hint, size)) for graph in forward.graphs]


# ---- times ---------------------------------------------------------------------------------------------------


def _contexts(prompt: int, new_tokens: int) -> list[int]:
    """Tokens in the cache at the first, the middle and the last decode step (the first token is prefill's)."""
    first, last = prompt, max(prompt, prompt + new_tokens - 2)
    return sorted({first, (first + last) // 2, last}) if new_tokens > 1 else []


def _as_planned(one: PlannedGraph) -> StepTimes:
    schedule = one.step.schedule
    return StepTimes(schedule.predicted_step_s, schedule.floor_s, schedule.baselines)


def _total(parts: Sequence[StepTimes]) -> StepTimes:
    """A forward of several graphs; a baseline that one of them lacks is lacking."""
    names = [name for name in parts[0].baselines if all(name in part.baselines for part in parts)]
    found = {name: [part.baselines[name] for part in parts] for name in names}
    return StepTimes(
        step_s=sum(part.step_s for part in parts),
        floor_s=sum(part.floor_s for part in parts),
        baselines={name: None if None in times else sum(t for t in times if t is not None) for name, times in found.items()},
    )


def _sum_of_steps(at: Mapping[int, float]) -> float:
    """Seconds of all steps from those at some contexts: straight lines between them.

    Attention's work grows in proportion to the context, so between two contexts a step's time is close to linear.
    """
    contexts = sorted(at)
    total = sum(
        (hi - lo) * (at[lo] + at[hi]) / 2 for lo, hi in zip(contexts, contexts[1:], strict=False)
    )  # steps lo to hi, both ends by half
    return total + (at[contexts[0]] + at[contexts[-1]]) / 2 if contexts else 0.0


def _generations(first: StepTimes, times: Mapping[int, StepTimes], tokens: int) -> dict[str, Generation | None]:
    names = [name for name in first.baselines if all(name in time.baselines for time in times.values())]
    return {name: _generation(name, first, times, tokens) for name in names}


def _generation(name: str, first: StepTimes, times: Mapping[int, StepTimes], tokens: int) -> Generation | None:
    prefill_s = first.baselines[name]
    steps = {n: seconds for n, time in times.items() if (seconds := time.baselines[name]) is not None}
    if prefill_s is None or len(steps) < len(times):
        return None
    return Generation(prefill_s, _sum_of_steps(steps), tokens)


def _dtype_of(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return ", ".join(sorted(dtypes)) or "none"


def _notes(named: NamedModel, machine: Machine, tokens: int) -> tuple[str, ...]:
    notes = []
    if named.positions is not None and tokens > named.positions:
        notes.append(f"{tokens} tokens are more than the {named.positions} positions that the model's config states")
    if named.quantised:
        notes.append("the config states quantised weights; the plan is for unquantised ones of the stated dtype")
    if weight_bytes(named.module) > machine.profile.host.memory_bytes:
        notes.append("the weights are larger than the host's memory; reading them from disk is not in these times")
    return tuple(notes)


__all__ = ["Generation", "GenerationPlan", "plan_generation"]
