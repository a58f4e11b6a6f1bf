"""The host storages that an accelerator streams from: deciding about them, doing it, and telling.

A plan first asks what has to be staged (``staged``); before a step, what it streams directly is pinned or adopted
(``hold``). The driver's return code has the last word: what it refuses is staged by the next plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.geometry import storage_id
from hetegen_compile.host_memory.arena import Arena, drop_pages, move
from hetegen_compile.host_memory.decide import Decision, Facts, decide, immovable
from hetegen_compile.host_memory.huge_pages import HugePages
from hetegen_compile.host_memory.limits import HostLimits, read_limits
from hetegen_compile.host_memory.mappings import Kind, kind_of, read_mappings
from hetegen_compile.options import format_bytes
from hetegen_compile.rows import Holding

logger = logging.getLogger("hetegen_compile")

Pin = Callable[[object, int, int], int]
"""``pin(owner, address, nbytes)``: 0, or the driver's error code; the pin ends with its owner."""

Moved = Callable[[Mapping[int, int]], object]
"""Told which storage took whose place when storages were adopted, by their identities."""


class HostMemory:
    """What is known of host storages. Used under the accelerator's step lock.

    Args:
        pin: pins a range of memory in place.
        limits: reads the limits on host memory.
        moved: is told what was adopted.
        huge_pages: makes them where weights will be pinned in place; None: nobody does.
    """

    def __init__(
        self,
        pin: Pin,
        limits: Callable[[], HostLimits] | None = None,
        moved: Moved | None = None,
        huge_pages: HugePages | None = None,
    ) -> None:
        self._pin = pin
        self._huge_pages = huge_pages
        self._begun: dict[int, StorageWeakRef] = {}
        self._moved = moved
        self._limits = limits or read_limits
        self._held: dict[int, tuple[StorageWeakRef, Holding]] = {}
        self._told: set[int] = set()

    def holding(self, tensor: Tensor) -> Holding | None:
        """What became of the tensor's storage; None if nothing has been done about it."""
        found = self._held.get(storage_id(tensor))
        return None if found is None else found[1]

    def staged(self, names: Collection[str], weights: Mapping[str, Tensor]) -> dict[str, str]:
        """Those of ``names`` whose rows have to go through the pinned ring, with the reason.

        ``weights`` are all tensors that are known of, by name: a storage is adopted with everything that views it.
        """
        self._forget_dead()
        asked = {name: weights[name] for name in names if _in_host_memory(weights[name])}
        holdings = {name: self.holding(tensor) for name, tensor in asked.items()}
        undecided = [asked[name] for name, holding in holdings.items() if holding is None]
        decisions = self._decide(undecided, weights.values())
        reasons = {key: decision.reason for key, decision in decisions.items()}
        self._make_huge([tensor for tensor in undecided if decisions[storage_id(tensor)].action == "pin"])
        told = {
            name: reasons[storage_id(asked[name])] if holding is None else holding.reason
            for name, holding in holdings.items()
        }
        staged = {name: reason for name, reason in told.items() if reason}
        self._tell({name: asked[name] for name in staged}, staged)
        return staged

    def holdings(self, tensors: Iterable[Tensor]) -> tuple[Holding, ...]:
        """What became of the storages of ``tensors``, each once."""
        found = (self._held.get(key) for key in {storage_id(tensor): None for tensor in tensors})
        return tuple(one[1] for one in found if one is not None)

    def hold(self, wanted: Sequence[Tensor], visible: Callable[[], Sequence[Tensor]]) -> bool:
        """Pin or adopt the storages of ``wanted``; False if that failed for one, which ``staged`` then tells.

        ``visible`` gives all tensors that are known of.
        """
        if self._huge_pages is not None and self._huge_pages.under_way:
            self._huge_pages.end()
        held = [self._held.get(tensor.untyped_storage()._cdata) for tensor in wanted]  # every step comes here
        if None not in held:
            return not any(one[1].reason for one in held if one is not None)
        new = {
            storage_id(tensor): tensor for tensor in wanted if self.holding(tensor) is None and _in_host_memory(tensor)
        }
        if new:
            self._forget_dead()
            self._hold(new, visible())
        return not any(holding.reason for holding in self.holdings(wanted))

    def _hold(self, new: Mapping[int, Tensor], visible: Sequence[Tensor]) -> None:
        decisions = self._decide(list(new.values()), visible)
        for key, tensor in new.items():
            if decisions[key].action == "pin":
                self._pin_in_place(tensor)
            elif decisions[key].action == "stage":
                self._note(tensor, Holding("refused", _nbytes(tensor), decisions[key].reason))
        viewers = _viewers(visible)
        adopted = [viewers[key] for key in new if decisions[key].action == "adopt"]
        if adopted:
            self._adopt(adopted)

    # ---- deciding ----------------------------------------------------------------------------------------

    def _decide(self, tensors: Sequence[Tensor], visible: Iterable[Tensor]) -> dict[int, Decision]:
        """Decisions by storage."""
        if not tensors:
            return {}
        mappings, viewers = read_mappings(), _viewers([*visible, *tensors])
        facts = {
            key: Facts(_nbytes(tensor), kind_of(mappings, *_range(tensor)), immovable(viewers[key]))
            for key, tensor in {storage_id(tensor): tensor for tensor in tensors}.items()
        }
        return dict(zip(facts, decide(list(facts.values()), self._limits().room()), strict=True))

    def _tell(self, tensors: Mapping[str, Tensor], reasons: Mapping[str, str]) -> None:
        """Log each storage once, those with the same reason together."""
        new = {name: tensor for name, tensor in tensors.items() if storage_id(tensor) not in self._told}
        self._told |= {storage_id(tensor) for tensor in new.values()}
        for reason in dict.fromkeys(reasons[name] for name in new):
            sizes = [_nbytes(tensor) for name, tensor in new.items() if reasons[name] == reason]
            logger.warning(
                "streaming %d weights (%s) through the pinned ring: each %s",
                len(sizes),
                format_bytes(sum(sizes)),
                reason,
            )

    # ---- doing -------------------------------------------------------------------------------------------

    def _make_huge(self, tensors: Sequence[Tensor]) -> None:
        """Begin with those that are new; what a later plan asks about once more is left to whoever pins it."""
        new = {storage_id(tensor): tensor for tensor in tensors if storage_id(tensor) not in self._begun}
        if self._huge_pages is None or not new:
            return
        self._begun |= {key: StorageWeakRef(tensor.untyped_storage()) for key, tensor in new.items()}
        mappings, ranges = read_mappings(), [_range(tensor) for tensor in new.values()]
        self._huge_pages.begin([one for one in ranges if kind_of(mappings, *one) is Kind.ANONYMOUS])

    def _pin_in_place(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        code = self._pin(storage, storage.data_ptr(), storage.nbytes())
        done = Holding("pinned in place", storage.nbytes())
        self._note(tensor, done if code == 0 else self._refused_by_driver(tensor, code))

    def _adopt(self, groups: Sequence[list[Tensor]]) -> None:
        """Move storages, each with all tensors that view it, into one arena that is pinned before it is filled."""
        first = [tensors[0] for tensors in groups]
        try:
            arena = Arena([_nbytes(tensor) for tensor in first])
        except OSError as error:
            for tensor in first:
                self._note(tensor, Holding("refused", _nbytes(tensor), f"cannot be adopted: {error}"))
            return
        mappings = read_mappings(details=True)
        for tensor in first:  # pinning makes the arena's pages resident
            drop_pages(mappings, *_range(tensor))
        code = self._pin(arena, arena.address, arena.nbytes)
        if code != 0:
            for tensor in first:
                self._note(tensor, self._refused_by_driver(tensor, code))
            return
        with torch.inference_mode(False), torch.no_grad():
            self._fill(arena, groups)

    def _fill(self, arena: Arena, groups: Sequence[list[Tensor]]) -> None:
        mappings, places = read_mappings(details=True), {}
        olds = [tensors[0].untyped_storage() for tensors in groups]  # alive, so that no new one gets an old identity
        try:
            for index, (tensors, old) in enumerate(zip(groups, olds, strict=True)):
                move(tensors, arena.storage(index))
                places[int(old._cdata)] = storage_id(tensors[0])
                drop_pages(mappings, old.data_ptr(), old.nbytes())
                self._note(tensors[0], Holding("adopted", old.nbytes()))
        finally:
            if self._moved is not None:
                self._moved(places)
        logger.info("moved %d weights (%s) from file mappings to an arena", len(groups), format_bytes(arena.nbytes))

    def _refused_by_driver(self, tensor: Tensor, code: int) -> Holding:
        locked = self._limits().locked
        limit = "" if locked is None else f"; RLIMIT_MEMLOCK leaves {format_bytes(locked.nbytes)}"
        reason = f"cannot be pinned: the driver refused with error {code}{limit}"
        return Holding("refused", _nbytes(tensor), reason)

    def _note(self, tensor: Tensor, holding: Holding) -> None:
        storage = tensor.untyped_storage()
        self._held[storage_id(tensor)] = (StorageWeakRef(storage), holding)

    def _forget_dead(self) -> None:
        dead = [key for key, (storage, _) in self._held.items() if storage.expired()]
        for key in dead:
            del self._held[key]
        self._told.difference_update(dead)
        self._begun = {key: storage for key, storage in self._begun.items() if not storage.expired()}


def _in_host_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and _nbytes(tensor) > 0


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _range(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _viewers(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """The different tensors that view each storage."""
    found: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            found.setdefault(storage_id(tensor), {})[id(tensor)] = tensor
    return {key: list(same.values()) for key, same in found.items()}


__all__ = ["Holding", "HostMemory"]
