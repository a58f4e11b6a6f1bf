"""Chains of launches as CUDA graphs: recorded once, then issued by a single call.

Behind a host Linear, which leaves nothing of Python in the processor's caches, a launch took the issuing thread of an
H200's virtual machine 45 us, and 100 us beside the worker's threads; a step of a model of 32 layers has more than 400.

A graph keeps the addresses that it was recorded with. A chain is recorded when it was given the same ones twice in a
row, and replayed only while it is given them. What lies elsewhere from time to time is copied to a place of its own if
it is small. Nothing that a chain is given is kept alive here; results are, in a pool of memory that all graphs share.

What lies in that pool and is no result is used again by graphs that are recorded later. So graphs are replayed in the
order in which they were recorded, and no result outlives its step: one that was recorded behind those that come after
it in a step makes these be recorded anew.

Nothing is recorded while gates are closed: instantiating a graph may wait for the device.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetegen_compile.accelerators.base import Chain, Counters, Value
from hetegen_compile.accelerators.cuda.activations import copy_by_kernel
from hetegen_compile.accelerators.cuda.allocator import GRAPH_BYTES, RECORDED_BYTES, reserved_now_bytes
from hetegen_compile.accelerators.geometry import empty_twin, span, span_bytes
from hetegen_compile.errors import AcceleratorError
from hetegen_compile.passes.tensors import tensors_in

logger = logging.getLogger("hetegen_compile")

COPIED_BYTES = 64 << 10
"""What is copied to a place of its own at most; larger things that lie elsewhere each time are launched one by one."""

_PATIENCE = 2
"""How often something may lie elsewhere before it is copied: a new cache is no reason."""

_OPEN_STEPS = 16
"""How many steps are kept open for a chain that could be recorded: others' steps may come before its own."""

_PAYS, _LONGEST = 8, 64
"""After a recording that was replayed less often, what a chain is given has to lie still for twice as many steps."""

Remake = Callable[[Sequence[Value]], Any]


class _Recording(NamedTuple):
    """A graph, the addresses that it reads (0 for what is ``copied``), how its results are found and where they lie.

    ``number`` says in which order graphs were recorded.
    """

    number: int
    graph: torch.cuda.CUDAGraph
    addresses: list[int]
    copied: dict[int, Tensor]
    results: list[Remake]
    places: frozenset[int]


class _Seen:
    """What is known of one chain: how often each thing it is given has moved, how long all have been steady."""

    def __init__(self, count: int) -> None:
        self.recording: _Recording | None = None
        self.replays = 0
        self.addresses: list[int] = []
        self.steady = 0
        self.needed = 1
        self.moves = [0] * count
        self.moving: tuple[int, ...] = ()
        self.refused = False


class Replays:
    """The graphs of one device. Used by the issuing thread alone, whose current stream is not the default one.

    ``wants_open_gates``: a chain could be recorded if the next step closed no gate.
    """

    def __init__(self, device: torch.device, counters: Counters) -> None:
        self._device = device
        self._counters = counters
        self._pool: Any = None
        self._pool_bytes = 0
        self._graphs = 0
        self._number = 0
        self._replayed = 0
        self._records = False
        self._gated = False
        self._places: set[int] = set()
        self._open_steps = 0
        self._impossible = False
        self.wants_open_gates = False
        self.refusal = ""

    def begin_step(self, *, again: bool, gated: bool) -> None:
        """Whether all code of this step has been loaded (``again``), and whether gates are closed in it."""
        self._records = again and not self._impossible
        self._gated = gated
        self._places.clear()
        self._replayed = 0
        if self.wants_open_gates:
            self._open_steps += 1
            self.wants_open_gates = self._open_steps <= _OPEN_STEPS
        if not self.wants_open_gates:
            self._open_steps = 0

    def launch(self, chain: Chain, given: list[Value]) -> tuple[Any, ...]:
        """``Accelerator.launch_chain``."""
        seen: _Seen = chain.recorded
        if seen is None:
            seen = chain.recorded = _Seen(len(given))
        addresses = [value.data_ptr() for value in given]
        for i in seen.moving:
            addresses[i] = 0
        recording = seen.recording
        if recording is not None and recording.addresses == addresses and recording.number > self._replayed:
            return self._replay(seen, recording, given)
        if seen.refused or self._moved(seen, chain, given, addresses) or not self._records:
            return chain.function(given)
        if self._gated:
            self.wants_open_gates = True
            return chain.function(given)
        return self._record(seen, chain, given)

    def _replay(self, seen: _Seen, recording: _Recording, given: list[Value]) -> tuple[Any, ...]:
        for i, place in recording.copied.items():
            copy_by_kernel(place, span(given[i]))
        recording.graph.replay()
        self._replayed = recording.number
        seen.replays += 1
        self._counters.chains_replayed += 1
        if not self._gated:
            self._places |= recording.places
        results = tuple([remake(given) for remake in recording.results])
        given.clear()
        return results

    def _moved(self, seen: _Seen, chain: Chain, given: Sequence[Value], addresses: list[int]) -> bool:
        """Whether something has not lain where it does for long enough. What chains that have been recorded since the
        last launch give will stay where it is."""
        before, seen.addresses = seen.addresses, addresses
        moved = [i for i, old in enumerate(before) if addresses[i] != old and addresses[i] not in self._places]
        if before and not moved:
            seen.steady += 1
            return seen.steady < seen.needed
        seen.steady = 0
        for i in moved:
            seen.moves[i] += 1
        small = {i for i, value in enumerate(given) if span_bytes(value) <= COPIED_BYTES} - set(chain.written)
        seen.moving = tuple(i for i, count in enumerate(seen.moves) if count > _PATIENCE and i in small)
        for i in seen.moving:
            addresses[i] = 0
        return True

    def _record(self, seen: _Seen, chain: Chain, given: list[Value]) -> tuple[Any, ...]:
        """Record and replay; where that is impossible the chain is launched one by one, now and later."""
        earlier = seen.recording
        if earlier is not None and earlier.addresses != seen.addresses and seen.replays < _PAYS:
            seen.needed = min(2 * seen.needed, _LONGEST)
        if not self._has_room():
            seen.refused = True
            return chain.function(given)
        kept, before = list(given), reserved_now_bytes(self._device)
        given.clear()
        try:
            copied = {i: empty_twin(kept[i], self._device) for i in seen.moving}
            for i, place in copied.items():
                copy_by_kernel(place, span(kept[i]))
            graph, results = self._recorded(chain, [copied.get(i, value) for i, value in enumerate(kept)])
            remakers = [_remaker(result, kept, seen.moving) for result in results]
        except (RuntimeError, AcceleratorError) as error:
            self._refuse(chain, seen, error)
            return chain.function(kept)
        finally:
            self._pool_bytes += max(0, reserved_now_bytes(self._device) - before)
        places = frozenset(tensor.data_ptr() for tensor in tensors_in(results))
        self._number += 1
        seen.recording = _Recording(self._number, graph, list(seen.addresses), copied, remakers, places)
        seen.replays = 0
        self._counters.chains_recorded += 1
        self.wants_open_gates = False
        return self._replay(seen, seen.recording, kept)

    def _has_room(self) -> bool:
        """Whether one more graph is within the share of all; torch ends a pool of memory with its last graph."""
        if self._graphs == 0:
            self._pool, self._pool_bytes = torch.cuda.graph_pool_handle(), 0
        return self._pool_bytes + (self._graphs + 1) * GRAPH_BYTES <= RECORDED_BYTES

    def _recorded(self, chain: Chain, given: list[Value]) -> tuple[torch.cuda.CUDAGraph, tuple[Any, ...]]:
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            results = chain.function(given)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it says that the recording was broken off, which is why it ends
                graph.capture_end()
            raise
        graph.capture_end()
        self._graphs += 1
        weakref.finalize(graph, _forget, weakref.ref(self)).atexit = False
        return graph, results

    def _refuse(self, chain: Chain, seen: _Seen, error: Exception) -> None:
        """What one of its launches cannot, or memory, is the chain's own; what CUDA says is tried for no other one."""
        seen.refused = True
        self._impossible = not isinstance(error, AcceleratorError | torch.OutOfMemoryError)
        self._records = not self._impossible
        if not self.refusal:
            self.refusal = f"issued one by one, recording {chain.name} as a CUDA graph failed: {error}"
            logger.warning("launches are %s", self.refusal)


def _forget(replays: weakref.ref[Replays]) -> None:
    found = replays()
    if found is not None:
        found._graphs -= 1


def _remaker(result: Any, given: Sequence[Value], copied: Sequence[int]) -> Remake:
    """How a result is found after a replay: it is itself, or lies in what the chain was given, which is not kept.

    Raises:
        AcceleratorError: a view of another type of what was given.
    """
    if isinstance(result, list | tuple):
        parts = [_remaker(part, given, copied) for part in result]
        return lambda now: [part(now) for part in parts]
    if not isinstance(result, Tensor):
        return lambda now: result
    storage = result.untyped_storage().data_ptr()
    for i, value in enumerate(given):
        if i not in copied and value.untyped_storage().data_ptr() == storage:
            return _view_of(i, value, result)
    return lambda now: result


def _view_of(i: int, value: Tensor, result: Tensor) -> Remake:
    if value.dtype != result.dtype:
        raise AcceleratorError(f"a view of {value.dtype} as {result.dtype}")
    size, stride, offset = result.size(), result.stride(), result.storage_offset() - value.storage_offset()
    if (size, stride, offset) == (value.size(), value.stride(), 0):
        return lambda now: now[i]
    return lambda now: now[i].as_strided(size, stride, now[i].storage_offset() + offset)


__all__ = ["COPIED_BYTES", "Replays"]
