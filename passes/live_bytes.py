"""Bytes on the accelerator at each point of a schedule, counted from its replay and not from the plan.

A piece of memory is alive from the node that makes it to the last node that touches it; what a download reads
lives until the host has waited for it, what becomes a mirror to the end. Mirrors and resident weights are there
all the time. Inside a segment its members' values count as if nothing were fused, with what operations of several
kernels make. On a GPU the largest value of the schedule counts once more (``Context.largest_twice``).

Beside ``measure_memory`` and ``step_memory``, which plans are made with, this is a second count on purpose. What it
finds above theirs is an error of the plan (``UnforeseenMemoryError``). Of an input that is mirrored through its whole
storage it counts the input's own bytes, the plan those of the storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from torch import Tensor, fx

from hetegen_compile.ir import VIEWED_UPLOAD_BYTES, info
from hetegen_compile.passes.append_behind import lengthens
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.memory import END, Memory
from hetegen_compile.passes.pieces import sent_bytes
from hetegen_compile.passes.replay import Replay
from hetegen_compile.passes.tensors import held_sizes, tensors_in, to_expr


@dataclass(frozen=True)
class Live:
    """The most bytes at one point, without the rings, and the node at which that is."""

    bytes: int
    node: fx.Node | None


def live_bytes(replay: Replay, context: Context) -> Live:
    """The peak of mirrors, resident weights and values on the accelerator."""
    sizes = _Sizes(context)
    fixed, change, largest = 0, dict[int, int](), 0
    at: dict[int, fx.Node] = {}
    for memory in replay.held.memories:
        if memory.side != "accelerator" or memory.slot is not None:
            continue
        nbytes = sizes.of(memory)
        if memory.is_input:
            fixed += nbytes
            continue
        largest = max(largest, 0 if memory.inner else nbytes)
        at.setdefault(memory.born, memory.nodes[0])
        change[memory.born] = change.get(memory.born, 0) + nbytes
        if memory.used < END:
            change[memory.used + 1] = change.get(memory.used + 1, 0) - nbytes
    for place, member in replay.held.scratch:
        nbytes = sizes.scratch(member)
        change[place] = change.get(place, 0) + nbytes
        change[place + 1] = change.get(place + 1, 0) - nbytes
    places = sorted(change)
    sums = list(accumulate(change[place] for place in places))
    peak = max(sums, default=0)
    most = places[sums.index(peak)] if sums else 0
    node = next((at[place] for place in range(most, -1, -1) if place in at), None)
    return Live(fixed + peak + (largest if context.largest_twice else 0), node)


class _Sizes:
    """Bytes at the context's sizes; sizes that are numbers already need no algebra."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[object, int] = {}

    def of(self, memory: Memory) -> int:
        """The largest of the values that lie in the memory; of a mirror that several inputs share, see ``_shared``.

        What a small transfer brings lies in host memory.
        """
        if memory.lent_by is not None and self._context.number(sent_bytes(memory.lent_by)) <= VIEWED_UPLOAD_BYTES:
            return 0
        values = [info(node).value for node in memory.nodes]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if any(map(lengthens, memory.nodes)):  # it lies where the mirror of the shorter one does
            return 0
        if memory.is_input and len(tensors) > 1:
            return self._shared(memory, tensors)
        return max((self._bytes(tensor) for tensor in tensors), default=0)

    def scratch(self, node: fx.Node) -> int:
        """What a node makes beside its result."""
        own = sum(map(self._bytes, tensors_in(info(node).value)))
        return max(0, int(self._context.number(info(node).made_bytes)) - own)

    def _shared(self, memory: Memory, tensors: Sequence[Tensor]) -> int:
        """Of inputs in one storage that the program writes all of it, else what they take at most by themselves."""
        whole = int(tensors[0].untyped_storage().nbytes())
        if require(self._context.effects, "note_effects").writes.keys() & info(memory.nodes[0]).storages:
            return whole
        return min(whole, sum(map(self._bytes, tensors)))

    def _bytes(self, tensor: Tensor) -> int:
        sizes = held_sizes(tensor)
        if all(type(size) is int for size in sizes):
            return int(prod(sizes)) * tensor.element_size()
        elements = prod(map(to_expr, sizes))
        if elements not in self._known:
            self._known[elements] = int(self._context.number(elements))
        return self._known[elements] * tensor.element_size()
