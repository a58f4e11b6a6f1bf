"""What each step on CUDA spent its time on: the worker's trips, what lies between them, and its ends.

A trace cannot say: it launches one by one and gives each operation of a trip a span. This takes some microseconds a
trip, and a trip ends here when its thread has the interpreter again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

from hetegen_compile.accelerators import CudaAccelerator
from hetegen_compile.accelerators.cuda.native_trips import NativeTrip


@dataclass(frozen=True)
class Step:
    """One step, in seconds.

    Attributes:
        gated: whether gates were closed in it.
        between_s: since the step before it had ended.
        first_s: until the first of the worker's native trips computes.
        computed_s: what these trips computed.
        gaps_s: from the end of each of them to where the next computes.
        tail_s: behind the last one.
        trips: how many there were; none in a step that is traced.
        read_bytes: of weights that they read ahead.
        recorded, replayed: chains of launches.
    """

    gated: bool
    between_s: float
    first_s: float
    computed_s: float
    gaps_s: float
    tail_s: float
    trips: int
    read_bytes: int
    recorded: int
    replayed: int


@dataclass
class _Begun:
    """A step under way; ``trips`` are (when it began to compute, when it had ended)."""

    gated: bool
    began_s: float
    recorded: int
    replayed: int
    trips: list[tuple[float, float]]
    read_bytes: int = 0


class Recorder:
    """The steps since it was made or last taken from; of one accelerator at a time."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._begun: _Begun | None = None
        self._ended_s = 0.0

    def take(self, count: int) -> tuple[Step, ...]:
        """The last of them, so many; none is kept."""
        steps, self._steps = self._steps, []
        return tuple(steps[-count:])

    def begin(self, accelerator: CudaAccelerator, began_s: float) -> None:
        """A step has begun."""
        counters = accelerator.counters
        gated = accelerator.gated
        self._begun = _Begun(gated, began_s, counters.chains_recorded, counters.chains_replayed, [])

    def trip(self, computed_s: float, read_bytes: int) -> None:
        """A native trip is over."""
        now_s = time.perf_counter()
        if self._begun is not None:
            self._begun.trips.append((now_s - computed_s, now_s))
            self._begun.read_bytes += read_bytes

    def end(self, accelerator: CudaAccelerator) -> None:
        """A step has ended."""
        begun, self._begun, now_s = self._begun, None, time.perf_counter()
        if begun is None:
            return
        trips, counters = begun.trips or [(now_s, now_s)], accelerator.counters
        self._steps.append(
            Step(
                gated=begun.gated,
                between_s=begun.began_s - self._ended_s if self._ended_s else 0.0,
                first_s=trips[0][0] - begun.began_s,
                computed_s=sum(end - start for start, end in trips),
                gaps_s=sum(later[0] - earlier[1] for earlier, later in pairwise(trips)),
                tail_s=now_s - trips[-1][1],
                trips=len(begun.trips),
                read_bytes=begun.read_bytes,
                recorded=counters.chains_recorded - begun.recorded,
                replayed=counters.chains_replayed - begun.replayed,
            )
        )
        self._ended_s = now_s


@contextmanager
def recording() -> Iterator[Recorder]:
    """A recorder of all steps on CUDA inside the block."""
    recorder = Recorder()

    def begin_step(begin: Callable[..., None], self: CudaAccelerator, *args: Any, **kwargs: Any) -> None:
        began_s = time.perf_counter()
        begin(self, *args, **kwargs)
        recorder.begin(self, began_s)

    def run(travel: Callable[..., None], self: NativeTrip) -> None:
        travel(self)
        recorder.trip(self.computed_s, self.read_bytes)

    def end_step(end: Callable[..., None], self: CudaAccelerator) -> None:
        end(self)
        recorder.end(self)

    with (
        _around(CudaAccelerator, "begin_step", begin_step),
        _around(CudaAccelerator, "end_step", end_step),
        _around(NativeTrip, "run", run),
    ):
        yield recorder


def _around(owner: type, name: str, wrapper: Callable[..., None]) -> Any:
    """``wrapper`` of the method and its arguments in its place."""
    method = getattr(owner, name)
    return mock.patch.object(owner, name, lambda self, *args, **kwargs: wrapper(method, self, *args, **kwargs))
