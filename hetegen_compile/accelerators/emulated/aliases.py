"""Races between downloads and writes that reach the same memory through different values.

Which values alias is known only when a launch has run. So these two kinds of access are entered when they
run, with the clocks they were issued with: whichever comes second finds the race, in either order. Whatever they access
is alive meanwhile: memory that has died may be anybody's, and its accesses are over.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.accelerators.emulated.clocks import Access, Clock, covers
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.errors import MissingWaitError


@dataclass(frozen=True)
class _Span:
    access: Access
    clock: Clock
    start: int
    end: int
    storage: StorageWeakRef

    @classmethod
    def of(cls, tensor: torch.Tensor, access: Access, clock: Clock) -> _Span:
        start = tensor.data_ptr()
        return cls(access, clock, start, start + span_bytes(tensor), StorageWeakRef(tensor.untyped_storage()))


class AliasChecks:
    """Downloads' reads and compute's in-place writes that are not known to be ordered yet.

    Both streams run in issue order, so an entry is dropped once the other stream's clock covers it, or with its memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads: list[_Span] = []
        self._writes: list[_Span] = []

    def clear(self) -> None:
        """Everything so far is over."""
        with self._lock:
            self._reads, self._writes = [], []

    def read(self, tensor: torch.Tensor, access: Access, clock: Clock) -> None:
        """A download reads ``tensor``; MissingWaitError if compute may be writing it."""
        span = _Span.of(tensor, access, clock)
        with self._lock:
            self._writes = _unordered(self._writes, clock)
            self._reads.append(span)
            for write in self._writes:
                _check(span, write)

    def write(self, tensor: torch.Tensor, access: Access, clock: Clock) -> None:
        """Compute writes ``tensor``; MissingWaitError if a download may be reading it."""
        span = _Span.of(tensor, access, clock)
        with self._lock:
            self._reads = _unordered(self._reads, clock)
            self._writes.append(span)
            for read in self._reads:
                _check(read, span)


def _unordered(spans: list[_Span], clock: Clock) -> list[_Span]:
    return [span for span in spans if not covers(clock, span.access) and not span.storage.expired()]


def _check(read: _Span, write: _Span) -> None:
    overlap = read.start < write.end and write.start < read.end
    if overlap and not covers(write.clock, read.access) and not covers(read.clock, write.access):
        raise MissingWaitError(
            f"{write.access.node} overwrites, through an alias, what {read.access.node} is still copying "
            f"to the host; wait for {read.access.node} first"
        )
