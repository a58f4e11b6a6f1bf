"""Host storages whose deaths are noted, wherever and whenever they die."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.geometry import storage_id
from hetegen_compile.mirrors.identity import weak_storage


class WatchedStorages:
    """Deaths are queued by key until they are taken.

    A finalizer runs in any thread and at any moment: where the last reference goes, or garbage is collected. So it only
    queues, and calls ``told``, a bound method that is referred to weakly.
    """

    def __init__(self, told: Callable[[], object]) -> None:
        self._told = weakref.WeakMethod(told)
        self._dead: deque[int] = deque()
        self._watched: dict[int, tuple[StorageWeakRef, weakref.finalize[..., Any]]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Note the deaths of these tensors' storages; a key is no other storage's until the death is taken."""
        for tensor in tensors:
            key = storage_id(tensor)
            if key not in self._watched:
                finalizer = weakref.finalize(tensor.untyped_storage(), _note, key, self._dead, self._told)
                finalizer.atexit = False
                self._watched[key] = weak_storage(tensor), finalizer

    def has_some(self, tensors: Iterable[Tensor]) -> bool:
        """Whether some of these tensors' storages are watched."""
        return any(storage_id(tensor) in self._watched for tensor in tensors)

    def stop(self, keys: Iterable[int] | None = None) -> None:
        """Note these deaths no longer (by default none at all)."""
        for key in list(self._watched) if keys is None else keys:
            _, finalizer = self._watched.pop(key, (None, None))
            if finalizer is not None:
                finalizer.detach()

    @property
    def some_died(self) -> bool:
        """Whether there are deaths that have not been taken."""
        return bool(self._dead)

    def take_dead(self) -> frozenset[int]:
        """Keys of the storages that have died since this was last asked."""
        found = frozenset(self._dead.popleft() for _ in range(len(self._dead)))
        for key in found:
            self._watched.pop(key, None)
        return found


def _note(key: int, dead: deque[int], told: weakref.WeakMethod[Callable[[], object]]) -> None:
    dead.append(key)
    tell = told()
    if tell is not None:
        tell()


__all__ = ["WatchedStorages"]
