"""What is let go when a model is gone: its plans and mirrors, and with the last model threads and slots.

Dynamo keeps some compiled graphs for ever: those of functions that it had inlined up to a graph break lie among the
globals of the function's module. What such a graph holds must therefore end with the model and not with the graph: the
weights' storages are watched, and when most of a model has died, every graph forgets it; when no graph serves a model
any more, the accelerator rests. Graphs work again when they are called: by another model of the class, or by the same
one if all its weights were replaced.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor

from hetegen_compile.geometry import storage_id
from hetegen_compile.locks import if_free
from hetegen_compile.mirrors import Mirrors
from hetegen_compile.options import Options
from hetegen_compile.watched_storages import WatchedStorages

_Result = TypeVar("_Result")


class User(Protocol):
    """A compiled graph, as its accelerator sees it."""

    @property
    def options(self) -> Options:
        """Those that it was compiled with."""

    @property
    def reads_weights(self) -> bool:
        """Whether some of a model's weights are among its inputs."""

    @property
    def serves_models(self) -> bool:
        """Whether it has plans for a model that is there."""

    def release(self) -> None:
        """Let go of what it has; it works again when it is called."""

    def lose(self, storages: Iterable[int]) -> bool:
        """Storages are gone: forget the models that are gone with them; whether there was one."""

    def storages_moved(self, places: Mapping[int, int]) -> None:
        """Weights lie in other storages from now on (old identity to new)."""

    def outdate(self) -> None:
        """Memory is to be shared out anew."""

    def give_way(self, options: Options, storages: frozenset[int]) -> bool:
        """Release this graph if it serves the model of these weights with other options; whether it did."""


class ModelWeights:
    """The storages that a graph's weights of one model lie in.

    The model counts as gone with more than half of their bytes: some may be shared with other models that go on, others
    may have been replaced in a model that goes on.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._bytes = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        self._left_bytes = sum(self._bytes.values())
        self._enough_bytes = self._left_bytes / 2

    def lose(self, storages: Iterable[int]) -> bool:
        """Storages are gone; whether the model is."""
        self._left_bytes -= sum(self._bytes.pop(key, 0) for key in storages)
        return not self._bytes or self._left_bytes < self._enough_bytes

    def lie_in(self, storages: frozenset[int]) -> bool:
        """Whether these are the model's: more than half of its bytes lie there."""
        within = self._bytes.keys() & storages
        return bool(within) and sum(self._bytes[key] for key in within) > self._left_bytes / 2

    def move(self, places: Mapping[int, int]) -> None:
        """The contents of storages lie in others from now on (old identity to new)."""
        self._bytes = {places.get(key, key): nbytes for key, nbytes in self._bytes.items()}


class ModelLives:
    """The models on one accelerator and the graphs that serve them, under the lock that steps take, too.

    ``rest`` (a bound method, referred to weakly) is called when no model is left.
    """

    def __init__(self, mirrors: Mirrors, rest: Callable[[], object]) -> None:
        self.lock = threading.RLock()
        self._mirrors = mirrors
        self._rest = weakref.WeakMethod(rest)
        self._users: weakref.WeakSet[User] = weakref.WeakSet()
        self._watched = WatchedStorages(self.settle)
        self._busy = False
        weakref.finalize(self, self._watched.stop)

    def exclusively(self, work: Callable[[], _Result]) -> _Result:
        """``work()`` with the accelerator to itself; what died meanwhile is let go afterwards."""
        try:
            with self.lock:
                self._busy = True
                try:
                    return work()
                finally:
                    self._busy = False
        finally:
            self.settle()

    def use(self, user: User) -> None:
        """A graph has opened the accelerator."""
        with self.lock:
            self._users.add(user)

    def watch(self, weights: Iterable[Tensor]) -> None:
        """Notice when these are gone."""
        self._watched.watch(weights)

    def watches(self, weights: Iterable[Tensor]) -> bool:
        """Whether some of these are watched: a graph was planned with them."""
        return self._watched.has_some(weights)

    def storages_moved(self, places: Mapping[int, int]) -> None:
        """Weights lie in other storages from now on (old identity to new): nothing is gone with the old ones."""
        self._watched.stop(places)
        for user in list(self._users):
            user.storages_moved(places)

    def compiled(self, options: Options, weights: Iterable[Tensor]) -> None:
        """A model is compiled: graphs that it was compiled to before with other options are not called any more.

        Dynamo keeps them until it is reset. What they hold, and a smaller budget that they state, is for the new ones.
        A graph knows the weights of its own part of a model that breaks into several: graphs with the same options go,
        too. If they are another model's, its next call plans them anew.
        """
        storages = frozenset(map(storage_id, weights))
        users = list(self._users)
        left = [user.options for user in users if user.give_way(options, storages)]
        for user in users if left else ():
            if user.options in left:
                user.release()
            user.outdate()

    def settle(self) -> None:
        """Let go of what belonged to storages that have died.

        Called by finalizers as well: while somebody uses the accelerator, this thread perhaps, its end does it.
        """
        while self._watched.some_died and not self._busy and if_free(self.lock, self._settle):
            pass

    def _settle(self) -> None:
        self._busy = True
        try:
            self._bury(self._watched.take_dead())
        finally:
            self._busy = False

    def _bury(self, storages: frozenset[int]) -> None:
        self._mirrors.forget_storages(storages)
        users = list(self._users)
        left = [user.options for user in users if user.lose(storages)]
        if not left:
            return
        kept = [user.options for user in users if user.serves_models]
        for user in users:  # a graph of the model that reads no weights, behind a graph break: nothing of it dies
            if not user.reads_weights and user.options in left and user.options not in kept:
                user.release()
        self._mirrors.purge()
        for user in users:
            user.outdate()  # there is more for those that go on
        rest = self._rest()
        if rest is not None and not any(user.serves_models for user in users):
            rest()


__all__ = ["ModelLives", "ModelWeights", "User"]
