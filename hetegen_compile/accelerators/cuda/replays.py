"""Chains of launches as CUDA graphs: recorded once, then issued by a single call.

Behind a host Linear, which leaves nothing of Python in the processor's caches, a launch took the issuing thread of an
H200's virtual machine 45 us, and 100 us beside the worker's threads; a step of a model of 32 layers has more than 400.

A graph keeps the addresses that it was recorded with. A chain is recorded when it was given the same ones twice in a
row, those behind it in the same step, and replayed only while it is given them. What moves is copied to a place of its
own if it is small and no other chain gives it. Behind a chain that is not replayed none is recorded. Nothing that a
chain is given is kept alive here; results are.

All graphs share a pool of memory. What lies in there and is no result is used again by graphs that are recorded later,
for their results, too. So a graph is not replayed in a step behind results that were born after it was recorded. That
is kept by recording the chains of a step in their order; one that is recorded anew because what it is given lies
elsewhere (a new cache) leaves its results where they were born, by copies, so that those behind it stay as they are.

Nothing is recorded while gates are closed: instantiating a graph may wait for the device. Which of the next step's
chains wish for open gates is asked before it begins; other plans' wishes are none of its business.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetegen_compile.accelerators.base import LaunchChain, Value
from hetegen_compile.accelerators.counters import Counters
from hetegen_compile.accelerators.cuda.activations import copy_by_kernel
from hetegen_compile.accelerators.cuda.allocator import GRAPH_BYTES, RECORDED_BYTES, reserved_now_bytes
from hetegen_compile.accelerators.geometry import empty_twin, same_geometry, span, span_bytes
from hetegen_compile.errors import AcceleratorError, AcceleratorMemoryError
from hetegen_compile.passes.tensors import tensors_in

logger = logging.getLogger("hetegen_compile")

COPIED_BYTES = 256 << 10
"""What is copied to a place of its own at most; larger things that lie elsewhere each time are launched one by one."""

_PAYS, _LONGEST = 4, 64
"""After a recording that was replayed less often, what a chain is given has to lie still for twice as many steps. While
a chain is not replayed, no chain behind it is."""

_STALE_STEPS = 16
"""Where there is no room, what was not replayed for so many steps makes it. Who found none waits longer each time."""

_TRIED = 3
"""Chains that fail one after the other with what CUDA says before it is taken to be so of all."""

_OVERLAPS = 1
"""``torch._debug_has_internal_overlap``: several elements lie at one address."""

Remake = Callable[[Sequence[Value]], Any]


class _Recording(NamedTuple):
    """A graph, the addresses that it reads (0 for what is ``copied``), and how its results are found.

    ``number`` says when it was recorded, ``born`` when memory was found for its ``results`` (None for those that lie in
    what the chain is given); ``places`` are where they lie. ``views``: which results lie in what is given, in part.
    """

    number: int
    born: int
    graph: torch.cuda.CUDAGraph
    addresses: list[int]
    copied: dict[int, Tensor]
    results: Any
    remakers: list[Remake]
    places: frozenset[int]
    views: tuple[int, ...]


class _Seen:
    """What is known of one chain: what it was given last, and what of that moves.

    ``needed``: for how many steps all else has to lie still, and ``ready_at``: the step from which on it has.
    ``wants``: it could be recorded if the next step closed no gate. ``used``: the last step in which it was replayed.
    """

    def __init__(self) -> None:
        self.recording: _Recording | None = None
        self.replays = 0
        self.used = 0
        self.addresses: list[int] = []
        self.needed = 1
        self.ready_at = 0
        self.moving: tuple[int, ...] = ()
        self.wants = False
        self.refused = False


class Replays:
    """The graphs of one device. Used by the issuing thread alone, whose current stream is not the default one."""

    def __init__(self, device: torch.device, counters: Counters) -> None:
        self._device = device
        self._counters = counters
        self._pool: Any = None
        self._pool_bytes = 0
        self._lost_bytes = 0
        self._graphs = 0
        self._number = 0
        self._step = 0
        self._born = 0
        self._records = False
        self._gated = False
        self._places: set[int] = set()
        self._known: weakref.WeakSet[_Seen] = weakref.WeakSet()
        self._impossible = False
        self._failed = 0
        self.refusal = ""

    def wants_open_gates(self, chains: Sequence[LaunchChain]) -> bool:
        """Whether one of the chains of a step that is about to begin could be recorded if it closes no gate."""
        return any(chain.recorded is not None and chain.recorded.wants for chain in chains)

    def begin_step(self, *, again: bool, gated: bool) -> None:
        """Whether all code of this step has been loaded (``again``), and whether gates are closed in it."""
        self._records = again and not self._impossible
        self._gated = gated
        self._places.clear()
        self._step += 1
        self._born = 0

    def launch(self, chain: LaunchChain, given: list[Value]) -> tuple[Any, ...]:
        """``Accelerator.launch_chain``."""
        seen: _Seen = chain.recorded
        if seen is None:
            seen = chain.recorded = _Seen()
            self._known.add(seen)
        addresses = [value.data_ptr() for value in given]
        for i in seen.moving:
            addresses[i] = 0
        recording = seen.recording
        if recording is not None and recording.addresses == addresses and recording.number > self._born:
            return self._replay(seen, recording, given)
        if self._is_ready(seen, chain, given, addresses):
            return self._record(seen, chain, given)
        return chain.function(given)

    def _is_ready(self, seen: _Seen, chain: LaunchChain, given: Sequence[Value], addresses: list[int]) -> bool:
        """Whether to record now; if only gates are in the way, the next step is to close none."""
        moved, wanted, seen.wants = self._moved(seen, chain, given, addresses), seen.wants, False
        if seen.refused or self._impossible:
            return False
        if moved:
            if wanted:  # gates were open for nothing
                seen.needed = min(2 * seen.needed, _LONGEST)
            seen.ready_at = self._step + seen.needed
            seen.wants = seen.needed == 1
            return False
        if not all(addresses[i] in self._places for i in chain.made):
            return False
        if self._gated or not self._records:
            seen.wants = self._step + 1 >= seen.ready_at
            return False
        return self._step >= seen.ready_at

    def _replay(self, seen: _Seen, recording: _Recording, given: list[Value]) -> tuple[Any, ...]:
        for i, place in recording.copied.items():
            copy_by_kernel(place, span(given[i]))
        recording.graph.replay()
        self._born = max(self._born, recording.born)
        seen.wants, seen.used = False, self._step
        seen.replays += 1
        self._counters.chains_replayed += 1
        results = tuple([remake(given) for remake in recording.remakers])
        self._places |= recording.places
        self._places.update([one.data_ptr() for i in recording.views for one in tensors_in(results[i])])
        given.clear()
        return results

    def _moved(self, seen: _Seen, chain: LaunchChain, given: Sequence[Value], addresses: list[int]) -> bool:
        """Whether something that no other chain gives lies elsewhere than before."""
        before, seen.addresses = seen.addresses, addresses
        moved = [i for i, old in enumerate(before) if addresses[i] != old and i not in chain.made]
        small = [i for i in moved if i not in chain.written and span_bytes(given[i]) <= COPIED_BYTES]
        if small:
            seen.moving = tuple(sorted({*seen.moving, *small}))
            for i in small:
                addresses[i] = 0
        return bool(moved) or not before

    def _record(self, seen: _Seen, chain: LaunchChain, given: list[Value]) -> tuple[Any, ...]:
        """Record and replay; where that is impossible the chain is launched one by one, now and later."""
        earlier = seen.recording
        moved = earlier is not None and earlier.addresses != seen.addresses
        if moved:
            seen.needed = 1 if seen.replays >= _PAYS else min(2 * seen.needed, _LONGEST)
        if not self._has_room():
            seen.needed = min(2 * seen.needed, _LONGEST)
            seen.ready_at = self._step + _STALE_STEPS * seen.needed
            return chain.function(given)
        kept, before = list(given), reserved_now_bytes(self._device)
        given.clear()
        try:
            copied = {i: empty_twin(kept[i], self._device) for i in seen.moving}
            for i, place in copied.items():
                copy_by_kernel(place, span(kept[i]))
            read = [copied.get(i, value) for i, value in enumerate(kept)]
            graph, results = self._recorded(chain, read, earlier.results if earlier is not None and moved else None)
            remakers = [_remaker(result, kept, seen.moving) for result in results.all]
        except (RuntimeError, AcceleratorError) as error:
            self._refuse(chain, seen, error)
            return chain.function(kept)
        finally:
            self._pool_bytes += max(0, reserved_now_bytes(self._device) - before)
            if self._pool is None:  # a recording was broken off
                self._lost_bytes = self._pool_bytes
        self._number += 1
        born = earlier.born if earlier is not None and results.stayed else self._number
        own = [_own(result, kept, seen.moving) for result in results.all]
        places = frozenset(tensor.data_ptr() for tensor in tensors_in(own))
        views = tuple(i for i, one in enumerate(own) if len(tensors_in(one)) < len(tensors_in(results.all[i])))
        addresses = list(seen.addresses)
        seen.recording = _Recording(self._number, born, graph, addresses, copied, own, remakers, places, views)
        seen.replays, self._failed = 0, 0
        self._counters.chains_recorded += 1
        return self._replay(seen, seen.recording, kept)

    def _has_room(self) -> bool:
        """Whether one more graph is within the share of all; torch ends a pool of memory with its last graph."""
        if not self._fits():
            for seen in self._known:
                if seen.recording is not None and seen.used < self._step - _STALE_STEPS:
                    seen.recording = None
        if self._graphs == 0:
            self._pool, self._pool_bytes = None, self._lost_bytes
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._fits()

    def _fits(self) -> bool:
        return self._pool_bytes + (self._graphs + 1) * GRAPH_BYTES <= RECORDED_BYTES

    def _recorded(self, chain: LaunchChain, given: list[Value], stay: Any) -> tuple[torch.cuda.CUDAGraph, _Results]:
        """The graph, and its results: where those of before lie (``stay``), if they are alike."""
        graph, own = torch.cuda.CUDAGraph(), list(given)
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            made = chain.function(given)
            results = _staying(made, stay, own)
            graph.capture_end()
        except BaseException:
            self._break_off(graph)
            raise
        self._graphs += 1
        weakref.finalize(graph, _forget, weakref.ref(self)).atexit = False
        return graph, results

    def _break_off(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that has failed for all that torch has told of it, which its own end does not reach then.

        The device's allocator would free nothing more that another stream has read, and drawing random numbers would
        be an error. What the pool has is taken to be lost, and graphs that follow have another one.
        """
        try:
            graph.capture_end()
        except RuntimeError:  # it says that the recording was broken off, which is why it ends
            pool, self._pool = self._pool, None
            with contextlib.suppress(RuntimeError, AttributeError):  # a version may have told the allocator
                torch._C._cuda_endAllocateToPool(self._device.index, pool)
            for generator in torch.cuda.default_generators[self._device.index or 0 :][:1]:
                generator.graphsafe_set_state(generator.clone_state())  # the same numbers follow

    def _refuse(self, chain: LaunchChain, seen: _Seen, error: Exception) -> None:
        """What one of its launches cannot, or memory, is the chain's own. What CUDA says may be of all of them: no more
        are recorded in this step, and none behind the third in a row that failed."""
        seen.refused = True
        no_memory = isinstance(error, AcceleratorMemoryError | torch.OutOfMemoryError)
        if not no_memory and (self._pool is None or not isinstance(error, AcceleratorError)):
            self._failed += 1
            self._impossible = self._failed >= _TRIED
            self._records = False
        if not self.refusal:
            self.refusal = f"issued one by one, recording {chain.name} as a CUDA graph failed: {error}"
            logger.warning("launches are %s", self.refusal)


def _forget(replays: weakref.ref[Replays]) -> None:
    found = replays()
    if found is not None:
        found._graphs -= 1


class _Results(NamedTuple):
    """Of a recorded chain; ``stayed``: they lie where those of its earlier recording did."""

    all: tuple[Any, ...]
    stayed: bool


def _staying(made: tuple[Any, ...], stay: Any, given: Sequence[Value]) -> _Results:
    """Copy what was made to where those of before lie, as part of the graph, if they are alike: else as it is."""
    if stay is None:
        return _Results(made, stayed=False)
    pairs: list[tuple[Tensor, Tensor]] = []
    try:
        found = tuple([_paired(new, old, given, pairs) for new, old in zip(made, stay, strict=True)])
    except ValueError:
        return _Results(made, stayed=False)
    if pairs:
        copy_results(*zip(*pairs, strict=True))
    return _Results(found, stayed=True)


def _paired(new: Any, old: Any, given: Sequence[Value], pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """The old one, which is to be filled from the new one. Raises ValueError if they are not alike."""
    if isinstance(new, list | tuple):
        return [_paired(one, other, given, pairs) for one, other in zip(new, old or (), strict=True)]
    if not isinstance(new, Tensor) or _lies_in(new, given, ()) is not None:
        if old is not None and isinstance(new, Tensor):
            raise ValueError
        return new
    if not isinstance(old, Tensor) or not same_geometry(new, old):
        raise ValueError
    if torch._debug_has_internal_overlap(old) == _OVERLAPS:  # expanded: nothing may be copied to it
        raise ValueError
    pairs.append((old, new))
    return old


def copy_results(places: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Copy each result to its place, which may have been made in inference mode."""
    with torch.inference_mode():
        torch._foreach_copy_(list(places), list(results))


def _own(result: Any, given: Sequence[Value], copied: Sequence[int]) -> Any:
    """A result without what lies in something that was given, which is not kept."""
    if isinstance(result, list | tuple):
        return [_own(part, given, copied) for part in result]
    return None if isinstance(result, Tensor) and _lies_in(result, given, copied) is not None else result


def _lies_in(result: Tensor, given: Sequence[Value], copied: Sequence[int]) -> int | None:
    """Which of the values that were given and not copied a result lies in."""
    storage = result.untyped_storage().data_ptr()
    lies_in = (i for i, one in enumerate(given) if i not in copied and one.untyped_storage().data_ptr() == storage)
    return next(lies_in, None)


def _remaker(result: Any, given: Sequence[Value], copied: Sequence[int]) -> Remake:
    """How a result is found after a replay: it is itself, or lies in what the chain was given, which is not kept.

    Raises:
        AcceleratorError: a view of another type of what was given.
    """
    if isinstance(result, list | tuple):
        parts = [_remaker(part, given, copied) for part in result]
        return lambda now: [part(now) for part in parts]
    place = _lies_in(result, given, copied) if isinstance(result, Tensor) else None
    return (lambda now: result) if place is None else _view_of(place, given[place], result)


def _view_of(i: int, value: Tensor, result: Tensor) -> Remake:
    if value.dtype != result.dtype:
        raise AcceleratorError(f"a view of {value.dtype} as {result.dtype}")
    size, stride, offset = result.size(), result.stride(), result.storage_offset() - value.storage_offset()
    if (size, stride, offset) == (value.size(), value.stride(), 0):
        return lambda now: now[i]
    return lambda now: now[i].as_strided(size, stride, now[i].storage_offset() + offset)


__all__ = ["COPIED_BYTES", "Replays"]
