"""Bytes held on an accelerator and host bytes pinned for it, kept per storage and given back when it dies."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from hetegen_compile.accelerators.counters import Counters
from hetegen_compile.errors import AcceleratorMemoryError
from hetegen_compile.locks import if_free

_Result = TypeVar("_Result")


class MemoryLedger:
    """Counts every storage once, however many views of it exist, until the last of them is gone.

    ``memory_bytes`` is what the device has, ``limit_bytes`` what may be held of it: what would exceed the
    smaller of the two is refused.

    Called by any thread. A finalizer may run inside any of these methods (garbage collection), where it
    cannot take the lock: it only queues the storage's key, and whoever has or gets the lock removes it.
    """

    def __init__(self, counters: Counters, memory_bytes: int) -> None:
        self.counters = counters
        self.memory_bytes = memory_bytes
        self.limit_bytes = memory_bytes
        self._storages: dict[int, tuple[str, int]] = {}
        self._dead: deque[int] = deque()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Sum over all categories."""
        return self._on_books(lambda: sum(self.counters.held_bytes.values()))

    def begin_step(self) -> None:
        """Start a step's peak with what is held."""
        self.counters.step_peak_bytes = self.held_bytes

    def require(self, name: str, nbytes: int) -> None:
        """Raise AcceleratorMemoryError unless ``nbytes`` more fit."""
        held, most = self.held_bytes, min(self.memory_bytes, self.limit_bytes)
        if held + nbytes > most:
            raise AcceleratorMemoryError(
                f"{name} needs {nbytes} bytes, {held} of {most} bytes of accelerator memory "
                f"are in use; raise gpu_memory or keep less resident"
            )

    def hold(self, tensor: torch.Tensor, category: str, nbytes: int | None = None) -> None:
        """Count the tensor's storage under ``category`` unless it is counted (``nbytes``: as so many)."""
        storage = tensor.untyped_storage()
        size = storage.nbytes() if nbytes is None else nbytes
        self._on_books(lambda: self._enter(storage, category, size))

    def _enter(self, storage: torch.UntypedStorage, category: str, nbytes: int) -> None:
        key, held = storage._cdata, self.counters.held_bytes
        if key in self._storages:
            return
        finalizer = weakref.finalize(storage, self._drop, key)
        finalizer.atexit = False
        held.setdefault(category, 0)
        held[category] += nbytes  # no call until both books have it: an interrupt comes behind calls only
        self._storages[key] = (category, nbytes)
        self._note_peak(0)

    def note_workspace(self, name: str, nbytes: int) -> None:
        """Count ``nbytes`` that an operation occupied until now; AcceleratorMemoryError if they did not fit."""
        self._on_books(lambda: self._note_peak(nbytes))
        self.require(name, nbytes)

    def _note_peak(self, workspace_bytes: int) -> None:
        counters = self.counters
        held = sum(counters.held_bytes.values()) + workspace_bytes
        counters.peak_bytes = max(counters.peak_bytes, held)
        counters.step_peak_bytes = max(counters.step_peak_bytes, held)

    def uploaded(self, category: str, nbytes: int) -> None:
        """Count bytes that went up."""
        self._count(self.counters.uploaded_bytes, category, nbytes)

    def staged(self, category: str, nbytes: int) -> None:
        """Count bytes that were copied into the pinned ring."""
        self._count(self.counters.staged_bytes, category, nbytes)

    def downloaded(self, category: str, nbytes: int) -> None:
        """Count bytes that came down."""
        self._count(self.counters.downloaded_bytes, category, nbytes)

    def _count(self, moved: dict[str, int], category: str, nbytes: int) -> None:
        self._on_books(lambda: moved.update({category: moved.get(category, 0) + nbytes}))

    def _on_books(self, work: Callable[[], _Result]) -> _Result:
        """``work()`` with the books to itself, and no dead storage on them before and afterwards."""
        with self._lock:
            self._bury()
            result = work()
        self._settle()
        return result

    def _drop(self, key: int) -> None:
        self._dead.append(key)
        self._settle()

    def _settle(self) -> None:
        """Take dead storages off the books, unless a holder of the lock is about to."""
        while self._dead and if_free(self._lock, self._bury):
            pass

    def _bury(self) -> None:
        while self._dead:
            if (key := self._dead[0]) in self._storages:
                category, nbytes = self._storages[key]
                self.counters.held_bytes[category] -= nbytes  # no call until both books have it
                del self._storages[key]
            self._dead.popleft()


class PinTable:
    """Address ranges of host memory pinned in place; ``is_pinned()`` of torch looks at the first address only.

    ``register(address, nbytes)`` pins a range and returns 0 or an error code; ``unregister(address)`` ends that
    when the memory's owner dies (it has to synchronise first). Whoever is the owner has to outlive the memory's
    use and die before the memory does: a storage, an arena.
    """

    def __init__(self, register: Callable[[int, int], int], unregister: Callable[[int], None]) -> None:
        self._register = register
        self._unregister = unregister
        self._ranges: dict[int, int] = {}
        self._finalizers: list[weakref.finalize[[int], Any]] = []

    @property
    def pinned_bytes(self) -> int:
        """Bytes pinned now."""
        return sum(end - start for start, end in list(self._ranges.items()))

    def covers(self, address: int, nbytes: int) -> bool:
        """Whether ``nbytes`` from ``address`` lie in one pinned range."""
        ranges = list(self._ranges.items())  # a finalizer may change them meanwhile
        return any(start <= address and address + nbytes <= end for start, end in ranges)

    def pin(self, owner: object, address: int, nbytes: int) -> int:
        """Pin a range until ``owner`` dies; 0 if it is pinned now (so is an empty one), else the error code."""
        if nbytes == 0 or self.covers(address, nbytes):
            return 0
        code = self._register(address, nbytes)
        if code == 0:
            self._ranges[address] = address + nbytes
            finalizer = weakref.finalize(owner, self._unpin, address)
            finalizer.atexit = False
            self._finalizers = [other for other in self._finalizers if other.alive] + [finalizer]
        return code

    def _unpin(self, address: int) -> None:
        if self._ranges.pop(address, None) is not None:
            self._unregister(address)

    def close(self) -> None:
        """Unpin everything now."""
        for finalizer in self._finalizers:
            finalizer()
        self._finalizers.clear()
