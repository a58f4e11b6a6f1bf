"""Schedules with one node removed, moved or rewired, and steps of them on the emulated accelerator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from hetegen_compile import ir
from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.ir import info
from hetegen_compile.mirrors import WEIGHTS, Mirrors, Request
from hetegen_compile.passes.lower import lower
from hetegen_compile.steps.bind import bind
from hetegen_compile.steps.bound_step import BoundStep
from tests.passes.graphs import Case

STEPS = 2
"""Of each run: the second one finds what the first left in mirrors, twins and the ring."""


@dataclass(frozen=True)
class Mutant:
    """One change of a schedule: what was done (kind and node), and the changed case."""

    kind: str
    node: str
    case: Case


def mutants(base: Case) -> Iterator[Mutant]:
    """Every single change of every node that still is a graph whose operands precede their readers."""
    for place, original in enumerate(base.module.graph.nodes):
        for kind, change in CHANGES.items():
            if original.target not in _TARGETS.get(kind, (original.target,)):
                continue
            for variant in range(_VARIANTS.get(kind, 1)):
                found = replace(base, module=ir.copy_module(base.module))
                node = next(islice(found.module.graph.nodes, place, None))
                if change(node, variant):
                    yield Mutant(kind, original.name, found)


# ---- changes: each returns whether it applied ------------------------------------------------------------------


def remove_wait(node: fx.Node, variant: int) -> bool:
    """Readers read what is still on its way."""
    del variant
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)
    return True


def bypass_wait(node: fx.Node, variant: int) -> bool:
    """One reader goes round the wait, which stays."""
    if variant >= len(node.users):
        return False
    list(node.users)[variant].replace_input_with(node, node.all_input_nodes[0])
    return True


def read_the_source(node: fx.Node, variant: int) -> bool:
    """One reader reads what a transfer reads instead of what it brings."""
    source = _source_of(node)
    if source is None or variant >= len(node.users):
        return False
    user = list(node.users)[variant]
    if user.target == ir.RELEASE or user.op == "output" or user.target is operator.getitem:
        return False
    user.replace_input_with(node, source)
    return True


def _source_of(node: fx.Node) -> fx.Node | None:
    arguments = _arguments(node)
    found: fx.Node | None = None
    if node.target is operator.getitem and arguments[0].target in (ir.WAIT_HOST, ir.WAIT_ACCELERATOR):
        (transfer,) = _arguments(arguments[0])
        found = _arguments(transfer)[0][arguments[1]]
    return found


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def wait_twice(node: fx.Node, variant: int) -> bool:
    """A second wait or release of the same transfer."""
    del variant
    with node.graph.inserting_after(node):
        node.graph.node_copy(node)
    return True


def remove_release(node: fx.Node, variant: int) -> bool:
    """The slot is never given up."""
    del variant
    for user in list(node.users):
        user.update_arg(4, [token for token in _arguments(user)[4] if token is not node])
    node.graph.erase_node(node)
    return True


def drop_token(node: fx.Node, variant: int) -> bool:
    """A prefetch does not wait for one of the releases that it should wait for."""
    if variant >= len(_arguments(node)[4]):
        return False
    tokens = list(_arguments(node)[4])
    del tokens[variant]
    node.update_arg(4, tokens)
    return True


def shift_slot(node: fx.Node, variant: int) -> bool:
    """A prefetch fills other bytes: beside its own, the ring's first, or not aligned."""
    offset = _arguments(node)[3]
    shifted = (offset + 256, offset - 256, 0, offset + 4)[variant]
    node.update_arg(3, shifted)
    return bool(shifted != offset)


def swap_prefetches(node: fx.Node, variant: int) -> bool:
    """Two prefetches in a row change places in the order, or only their bytes, or only their tokens."""
    nodes = list(node.graph.find_nodes(op="call_function", target=ir.PREFETCH))
    later = nodes[nodes.index(node) + 1 :]
    if not later:
        return False
    other = later[0]
    if variant == 0:
        return _move_before(other, node)
    place = 3 if variant == 1 else 4
    mine, theirs = _arguments(node)[place], _arguments(other)[place]
    if mine == theirs or (variant == 2 and not _precede(theirs, node)):
        return False
    node.update_arg(place, theirs)
    other.update_arg(place, mine)
    return True


def _precede(tokens: Any, node: fx.Node) -> bool:
    order = {n: place for place, n in enumerate(node.graph.nodes)}
    return all(order[token] < order[node] for token in tokens)


def _move_before(node: fx.Node, place: fx.Node) -> bool:
    order = {n: position for position, n in enumerate(node.graph.nodes)}
    if any(order[operand] >= order[place] for operand in node.all_input_nodes):
        return False
    place.prepend(node)
    return True


_INPUTS = ("placeholder", "get_attr", "output")


def move_up(node: fx.Node, variant: int) -> bool:
    """A node is issued right before the one before it, or as soon as its operands are."""
    if node.op in _INPUTS:
        return False
    before = node.prev
    if before.op in _INPUTS or before in node.all_input_nodes:
        return False
    while variant and before.prev.op not in _INPUTS and before.prev not in node.all_input_nodes:
        before = before.prev
    before.prepend(node)
    return True


def move_down(node: fx.Node, variant: int) -> bool:
    """A node is issued right after the one after it, or just before the first that reads it."""
    if node.op in _INPUTS:
        return False
    after = node.next
    if after.op == "output" or after in node.users:
        return False
    while variant and after.next.op != "output" and after.next not in node.users:
        after = after.next
    after.append(node)
    return True


def drop_effect(node: fx.Node, variant: int) -> bool:
    """A node that is there for what it writes or registers is gone."""
    del variant
    if node.users or node.op in _INPUTS or node.target == ir.RELEASE:
        return False
    node.graph.erase_node(node)
    return True


def return_an_input(node: fx.Node, variant: int) -> bool:
    """The graph returns an input where the program returns something else of the same shape."""
    inputs = [n for n in node.graph.find_nodes(op="placeholder") if isinstance(info(n).value, Tensor)]
    returned = list(_arguments(node)[0])
    pairs = [
        (place, one)
        for place, old in enumerate(returned)
        for one in inputs
        if isinstance(old, fx.Node) and old is not one and _alike(info(old).value, info(one).value)
    ]
    if variant >= len(pairs):
        return False
    place, one = pairs[variant]
    returned[place] = one
    node.args = (tuple(returned),)
    return True


def _alike(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype


CHANGES: dict[str, Callable[[fx.Node, int], bool]] = {
    "remove wait": remove_wait,
    "bypass wait": bypass_wait,
    "read the source": read_the_source,
    "wait twice": wait_twice,
    "remove release": remove_release,
    "drop token": drop_token,
    "shift slot": shift_slot,
    "swap prefetches": swap_prefetches,
    "move up": move_up,
    "move down": move_down,
    "drop effect": drop_effect,
    "return an input": return_an_input,
}
_WAITS = (ir.WAIT, ir.WAIT_HOST, ir.WAIT_ACCELERATOR)
_TARGETS = {
    "remove wait": _WAITS,
    "bypass wait": _WAITS,
    "read the source": (operator.getitem,),
    "wait twice": (*_WAITS, ir.RELEASE),
    "remove release": (ir.RELEASE,),
    "drop token": (ir.PREFETCH,),
    "shift slot": (ir.PREFETCH,),
    "swap prefetches": (ir.PREFETCH,),
    "return an input": ("output",),
}
"""Targets of the nodes that a change is about; without an entry: all nodes."""
_VARIANTS = {
    "bypass wait": 4, "read the source": 4, "drop token": 3, "shift slot": 4, "swap prefetches": 3,
    "move up": 2, "move down": 2, "return an input": 4,
}  # fmt: skip


# ---- steps on the emulated accelerator ---------------------------------------------------------------------------


def run_emulated(found: Case, inputs: list[Any], accelerator: EmulatedAccelerator) -> list[Any]:
    """``STEPS`` steps of a schedule with the same inputs; outputs of all of them, in order.

    Lowers a copy, so the case can be run again.
    """
    copy = replace(found, module=ir.copy_module(found.module))
    lower(copy.module, copy.context)
    residency = copy.context.residency
    assert residency is not None
    accelerator.reserve_ring(residency.ring_bytes)
    bound = bind(copy.module, {}, accelerator)
    mirrors = Mirrors(accelerator)
    with torch.no_grad(), torch.inference_mode(False):
        return [output for _ in range(STEPS) for output in _step(bound, inputs, accelerator, mirrors)]


def _step(bound: BoundStep, inputs: list[Any], accelerator: EmulatedAccelerator, mirrors: Mirrors) -> list[Any]:
    accelerator.begin_step()
    mirrors.begin_step()
    requests = [Request(inputs[i], f"input_{i}") for i in bound.mirrors]
    requests += [Request(inputs[i].detach()[lo:hi], f"weight_{i}", WEIGHTS) for i, lo, hi in bound.residents]
    values = mirrors.fetch(requests, accelerator.memory_bytes)
    outputs, twins = bound.run(list(inputs), values[: len(bound.mirrors)], values[len(bound.mirrors) :])
    accelerator.end_step()
    mirrors.settle([inputs[i] for i in bound.settled])
    mirrors.forget(inputs[i] for i in bound.outdated)
    for host, device in twins:
        mirrors.register(host, device)
    return [output.clone() if isinstance(output, Tensor) else output for output in outputs]
