"""Proof that the issue order is free of races and inside the budget, or an error that names the nodes.

Why: a missing wait or a slot reused too early shows only under the right timing, so nothing about timing
is trusted here. The schedule is replayed on the happens-before relation that its own operations give
(``happens_before``, ``replay``), compared with what the captured program does (``note_effects``) and weighed
(``live_bytes``). None of this shares code with the passes that placed the nodes.

Proved for every graph:

- each transfer is waited for exactly once, before its first use, and each slot released exactly once;
- no slot is overwritten before the release of its last reader, none is read before its prefetch or after its release;
- a value is used only on the side where it is, and only once it is complete there;
- what a download reads is not written before the host has waited, what an upload reads not before the step's end;
- every read sees the in-place writes that come before it in the program and none that come after;
- at return outputs and written inputs are complete, mirrors that count as current are, and inputs and outputs share
  memory exactly as in the captured graph;
- nothing waits for an event that was never recorded;
- every element of a Linear's weight is used exactly once (``check_parts``), with the activations and the bias that the
  program has there, and what is made of it is put together once (``check_linears``);
- what lies on the accelerator at any point fits the budget.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from hetegen_compile.errors import MissingWaitError, ScheduleError, UnforeseenMemoryError
from hetegen_compile.ir import info
from hetegen_compile.options import format_bytes
from hetegen_compile.passes.check_linears import check_linears
from hetegen_compile.passes.check_parts import check_parts
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import Effects
from hetegen_compile.passes.happens_before import OPERATIONS, name_of, nodes_in, short
from hetegen_compile.passes.held_values import held_in
from hetegen_compile.passes.live_bytes import live_bytes
from hetegen_compile.passes.memory import Memory
from hetegen_compile.passes.plans import ACTIVATIONS, MIRRORED, RESIDENT, RING
from hetegen_compile.passes.replay import Replay
from hetegen_compile.passes.schedule import pinned_ring_bytes


def verify(module: fx.GraphModule, context: Context) -> None:
    """Check every rule on every node.

    Raises:
        MissingWaitError: a value is used before the wait that orders it, or on the side where it is not.
        SlotInUseError: a slot is overwritten or read although its reader's release says otherwise.
        ScheduleError: any other rule is broken: waits and releases per transfer, versions, what is due at return.
        BudgetError: the schedule needs more than the budget.
    """
    module.graph.lint()
    effects = require(context.effects, "note_effects")
    residency = context.residency
    staging = 0 if residency is None else residency.ring_bytes
    rings = {"staging": staging, "pinned": pinned_ring_bytes(module.graph)}
    segments = _segments(module)
    _check_starts(module.graph)
    replay = Replay(effects, segments, rings)
    replay.run(module.graph)
    check_parts(module.graph)
    check_linears(module.graph, effects.linears, segments.values())
    _check_return(module.graph, replay, effects)
    _check_budget(module, replay, staging, context)


def _segments(module: fx.GraphModule) -> Mapping[str, fx.Graph]:
    names = {str(call.target) for call in module.graph.find_nodes(op="call_module")}
    inner = {name: module.get_submodule(name) for name in names}
    return {name: one.graph for name, one in inner.items() if isinstance(one, fx.GraphModule)}


def _check_starts(graph: fx.Graph) -> None:
    """Each start is ended exactly once by each operation that has to follow it, and touched by nothing else."""
    for node in graph.nodes:
        operation = OPERATIONS.get(node.target)
        if operation is None or (not operation.ended_by and operation.carried is None):
            continue
        allowed = (*operation.ended_by, *operation.precedes)
        stranger = next((user for user in node.users if user.target not in allowed), None)
        if stranger is not None:
            wait = short(operation.ended_by[0]) if operation.ended_by else "the next step"
            raise MissingWaitError(
                f"verify: {name_of(stranger)} uses {name_of(node)} without a wait in between; "
                f"missing edge: {wait}({node}) -> {stranger}"
            )
        for target in operation.ended_by:
            ends = [info(user).ahead for user in node.users if user.target == target]
            count = len(ends)
            if count != 1 and sorted(ends) != [False, True]:  # the worker may have a wait of its own
                raise ScheduleError(
                    f"verify: {name_of(node)} has {count} {short(target)}, expected one; "
                    f"missing edge: {node} -> {short(target)}"
                )


# ---- what is due at return -----------------------------------------------------------------------------------


def _check_return(graph: fx.Graph, replay: Replay, effects: Effects) -> None:
    _check_inputs(replay, effects)
    _check_twins(replay)
    _check_carried(replay)
    _check_aliasing(graph, replay, effects)


def _check_inputs(replay: Replay, effects: Effects) -> None:
    """Inputs that the program writes are written, and mirrors that are taken for current show the same."""
    for key, memory in replay.held.inputs.items():
        due = effects.writes.get(key, (memory.version,))[-1]
        node = memory.nodes[0]
        if memory.version != due:
            raise ScheduleError(
                f"verify: at return {name_of(node)} misses the write of {effects.writers[due]}; "
                f"missing edge: {effects.writers[due]} -> output"
            )
        mirror = replay.held.mirrors.get(key)
        if mirror is not None and mirror.version != memory.version:
            raise ScheduleError(
                f"verify: at return the mirror of {name_of(node)} misses a write of the host and would count as "
                f"current; missing edge: {effects.writers[due]} -> output"
            )


def _check_twins(replay: Replay) -> None:
    """A returned tensor and the value that is kept as its mirror show the same writes of the same storage."""
    for node in replay.kept:
        host, device = (held_in(replay.held.values.get(operand)) for operand in node.all_input_nodes)
        if host.keys() != device.keys() or any(host[key].version != device[key].version for key in host):
            raise ScheduleError(
                f"verify: {name_of(node)} keeps {node.args[1]} as the mirror of {node.args[0]}, but the two differ; "
                f"missing edge: the same writes -> {node.name}"
            )


def _check_carried(replay: Replay) -> None:
    """What the step leaves in the ring for the next one is what the next one, of the same graph, begins with."""
    begun, left = replay.slots.carried["in"], replay.slots.carried["out"]
    for bytes_of in begun.keys() ^ left.keys():
        node = {**begun, **left}[bytes_of]
        raise ScheduleError(
            f"verify: {name_of(node)} is carried over the end of the step on one side only; missing edge: the same "
            f"bytes at the {'end' if bytes_of in begun else 'start'} of the step -> {node}"
        )


def _check_aliasing(graph: fx.Graph, replay: Replay, effects: Effects) -> None:
    """Outputs and inputs share memory exactly where they do in the captured graph."""
    output = graph.output_node()
    operands = nodes_in(output.args[0])
    if len(operands) != len(effects.outputs):
        raise ScheduleError(f"verify: {len(operands)} values are returned, the program returns {len(effects.outputs)}")
    memory_of: dict[int, Memory] = dict(replay.held.inputs)
    key_of = {id(memory): key for key, memory in replay.held.inputs.items()}
    for operand, expected in zip(operands, effects.outputs, strict=True):
        held = held_in(replay.held.values.get(operand))
        for key in expected:
            memory = held.get(key)
            if memory is None:
                raise ScheduleError(
                    f"verify: the output {name_of(operand)} is not what the program returns there; "
                    "missing edge: the program's value -> output"
                )
            if memory_of.setdefault(key, memory) is not memory or key_of.setdefault(id(memory), key) != key:
                raise ScheduleError(
                    f"verify: the output {name_of(operand)} shares memory with another output or an input as it does "
                    "not in the program, or does not where it should"
                )


# ---- the budget ----------------------------------------------------------------------------------------------


def _check_budget(module: fx.GraphModule, replay: Replay, ring_bytes: int, context: Context) -> None:
    needed = live_bytes(replay, context)
    total = ring_bytes + needed.bytes
    if total > context.budget_bytes:
        where = name_of(needed.node) if needed.node is not None else "the step"
        raise UnforeseenMemoryError(
            f"verify: at {where} {format_bytes(needed.bytes)} are alive on the accelerator beside a ring of "
            f"{format_bytes(ring_bytes)}; gpu_memory is {format_bytes(context.budget_bytes)}: raise it or use a "
            "smaller batch",
            max(total - context.budget_bytes, total - _planned_bytes(context)),
        )


def _planned_bytes(context: Context) -> int:
    """What residency counted of what ``live_bytes`` counts, and the ring."""
    if context.residency is None:
        return context.budget_bytes
    return sum(context.residency.budget.get(item, 0) for item in (MIRRORED, ACTIVATIONS, RESIDENT, RING))


__all__ = ["verify"]
