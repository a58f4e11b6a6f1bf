"""Accelerators that delay their streams at random, poison what is released, or refuse to pin."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from hetegen_compile import runtime
from hetegen_compile.accelerators import Accelerator, CudaAccelerator, EmulatedAccelerator, Op
from hetegen_compile.accelerators.base import LaunchChain
from hetegen_compile.accelerators.cuda.streams import CudaStreams
from hetegen_compile.accelerators.cuda.transfers import CudaToken, CudaTransfer
from hetegen_compile.accelerators.promises import Promise
from hetegen_compile.accelerators.ring import POISON
from hetegen_compile.host_kernels.program import HostProgram

OUT_OF_MEMORY = 2
"""What the driver returns where no more host memory can be pinned."""

LONGEST_S = 1e-3
_CYCLES_PER_S = 1_500_000_000
_SPEEDS = (0.0, 0.1, 1.0)
"""Shares of the longest delay, one drawn for each lane: lanes that run far ahead of each other show more."""


class LaneDelays:
    """Random delays by lane; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        lanes = ("up", "down", "compute", "host", "worker")
        self._random = {lane: random.Random(f"{seed} {lane}") for lane in lanes}
        self._longest_s = {lane: LONGEST_S * self._random[lane].choice(_SPEEDS) for lane in lanes}

    def draw_s(self, lane: str) -> float:
        """The next delay of a lane."""
        return self._random[lane].uniform(0.0, self._longest_s[lane])


class HostileStreams(CudaStreams):
    """Streams with spinning kernels in front of what is issued to them."""

    delays: LaneDelays | None = None

    @contextmanager
    def on(self, stream: torch.cuda.Stream, resource: str, op: Op) -> Iterator[None]:
        """Copies behind a delay."""
        self.spin(resource, stream)
        with super().on(stream, resource, op):
            yield

    def spin(self, lane: str, stream: torch.cuda.Stream) -> None:
        """Delay what is issued to a stream from here on."""
        if self.delays is not None:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(int(self.delays.draw_s(lane) * _CYCLES_PER_S) + 1)


class HostileCuda(CudaAccelerator):
    """CUDA with spinning kernels before copies and launches, and NaN (all bits set) in every released slot."""

    streams_of = HostileStreams
    _streams: HostileStreams

    def reseed(self, seed: int | None) -> None:
        """Other delays from now on; None: none."""
        self.synchronize()
        self._streams.delays = None if seed is None else LaneDelays(seed)

    def launch(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> Any:
        """A launch behind a delay."""
        self._streams.spin("compute", self._streams.compute)
        return super().launch(op, function, args, **options)

    def launch_chain(self, chain: LaunchChain, given: list[Any]) -> tuple[Any, ...]:
        """A chain behind a delay: those of its launches are what they were when it was recorded."""
        self._streams.spin("compute", self._streams.compute)
        return super().launch_chain(chain, given)

    def host(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Host work after a pause of the issuing thread."""
        if self._streams.delays is not None:
            time.sleep(self._streams.delays.draw_s("host"))
        return super().host(op, function, args, kwargs)

    def host_ahead(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Promise:
        """The worker's after a pause of the worker."""
        delays = self._streams.delays
        if delays is None:
            return super().host_ahead(op, function, args, kwargs)
        pause_s = delays.draw_s("worker")
        if isinstance(function, HostProgram):  # a function around it would be no native trip any more
            self._ahead.pause(pause_s)
            return super().host_ahead(op, function, args, kwargs)

        def late(*arguments: Any, **options: Any) -> Any:
            time.sleep(pause_s)
            return function(*arguments, **options)

        return super().host_ahead(op, late, args, kwargs)

    def release(self, op: Op, transfer: CudaTransfer) -> CudaToken:
        """Poison behind the readers, before the event that lets the next copy overwrite it."""
        if isinstance(transfer, CudaTransfer) and transfer.kind == "prefetch" and transfer.released_by is None:
            transfer.value.view(torch.uint8).fill_(POISON)
        return super().release(op, transfer)


class RefusingCuda(HostileCuda):
    """Pins nothing in place: every streamed weight goes through the pinned ring."""

    def pin(self, owner: object, address: int, nbytes: int) -> int:
        """Refuse."""
        return OUT_OF_MEMORY


class RefusingEmulated(EmulatedAccelerator):
    """The same, emulated."""

    def pin(self, owner: object, address: int, nbytes: int) -> int:
        """Refuse."""
        return OUT_OF_MEMORY


Hostile = HostileCuda | EmulatedAccelerator
_KINDS: dict[tuple[str, bool], type[Any]] = {
    ("cuda", False): HostileCuda, ("cuda", True): RefusingCuda,
    ("emulated", False): EmulatedAccelerator, ("emulated", True): RefusingEmulated,
}  # fmt: skip


@contextmanager
def hostile(*, refuse_pins: bool = False) -> Iterator[list[Hostile]]:
    """What hetegen opens inside the block can be given random delays (``reseed``); yields what it has opened."""
    opened: list[Hostile] = []

    def open_accelerator(kind: str, *, memory_bytes: int | None, pace: float | None, seed: int | None) -> Accelerator:
        del pace, seed
        accelerator: Any = _KINDS[kind, refuse_pins](memory_bytes)
        opened.append(accelerator)
        found: Accelerator = accelerator
        return found

    with mock.patch.object(runtime, "open_accelerator", open_accelerator):
        yield opened
