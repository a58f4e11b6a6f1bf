"""The ledger of an accelerator: which rows of which weights stay there, for all graphs that share it.

A backend sees graphs and not models, and each is compiled and run before the next exists. So every plan enters
here what it claims and what its steps need beside; the next plan is made with that in view, and what it decides
holds for all. Plans that counted on rows that have left are made again when they are next called, and so are those
that clearly more rows would stay for now: they were made while another model had the memory.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.mirrors import Mirrors
from hetegen_compile.passes.claims import Claim, WeightKey, weight_key
from hetegen_compile.passes.plans import Residency
from hetegen_compile.passes.residency_shares import residency_shares

_CLEARLY = 1 / 16
"""Of what a plan has offloaded: less is not worth planning again."""


@dataclass(frozen=True)
class _Entry:
    """One plan: whose it is, what it claims and got, what its step needs beside, and the budget that it was made for.

    ``anchor`` is the storage of one of the weights: the plan is void when that is gone. ``described`` says of which
    model it is.
    """

    owner: weakref.ref[object]
    anchor: StorageWeakRef | None
    claims: Sequence[Claim]
    resident_bytes: int
    step_bytes: int
    ring_bytes: int
    budget_bytes: int
    described: str

    def lives(self) -> bool:
        return self.owner() is not None and (self.anchor is None or not self.anchor.expired())


class ResidencyLedger:
    """Not thread-safe: used under the accelerator's step lock."""

    def __init__(self, mirrors: Mirrors) -> None:
        self._mirrors = mirrors
        self._entries: dict[tuple[int, Hashable], _Entry] = {}
        self._row_bytes: dict[Hashable, tuple[int, int]] = {}
        self.first_rows: Mapping[Hashable, int] = {}
        self.ring_bytes = 0
        self.epoch = 0
        """Counts the changes after which a plan may find less than it counted on, or more."""

    def others(self, owner: object, part: Hashable) -> OtherPlans:
        """What one plan (``part`` of ``owner``) has to know about the others, owner's other plans included."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry.owner() is not None}
        own = (id(owner), part)
        return OtherPlans(tuple(entry for key, entry in self._entries.items() if key != own and entry.lives()))

    def take_dead_parts(self, owner: object) -> list[Any]:
        """Forget the parts of ``owner`` whose weights are gone; returns them."""
        dead = [key for key, entry in self._entries.items() if key[0] == id(owner) and not entry.lives()]
        for key in dead:
            del self._entries[key]
        return [part for _, part in dead]

    def leave(self, owner: object, parts: Iterable[Hashable]) -> None:
        """Forget these parts of ``owner``: their model is gone, or they will not be."""
        for part in parts:
            self._entries.pop((id(owner), part), None)
        self.epoch += 1

    def outdate(self, owner: object, parts: Iterable[Hashable]) -> None:
        """These plans are made again when they are next called; nobody has to have a staging ring as long as theirs."""
        for place in [(id(owner), part) for part in parts]:
            if place in self._entries:
                self._entries[place] = replace(self._entries[place], ring_bytes=0)

    def enter(
        self, owner: object, part: Hashable, residency: Residency, budget_bytes: int, anchor: StorageWeakRef | None,
        described: str = "another model",
    ) -> None:  # fmt: skip
        """Make what a plan decided hold: rows that leave are dropped, those that came are uploaded by need."""
        self._entries[id(owner), part] = _Entry(
            weakref.ref(owner), anchor, residency.claims, _resident_bytes(residency.claims, residency.first_rows),
            residency.step_bytes, residency.ring_bytes, budget_bytes, described,
        )  # fmt: skip
        alive = [entry for entry in self._entries.values() if entry.lives()]
        self._row_bytes = {claim.key: (claim.rows, claim.row_bytes) for entry in alive for claim in entry.claims}
        old, new = self.first_rows, dict(residency.first_rows)
        moved = [key for key, first in old.items() if new.get(key) != first]
        self._mirrors.forget_weights(key for key in moved if isinstance(key, WeightKey))
        self.ring_bytes = residency.ring_bytes
        self.epoch += 1
        self._hold(new)

    def storages_moved(self, places: Mapping[int, int]) -> None:
        """Weights lie in other storages from now on (old identity to new): what was claimed of them stays claimed."""

        def moved(key: Hashable) -> Hashable:
            if isinstance(key, WeightKey):
                return key._replace(storage=places.get(key.storage, key.storage))
            return key

        for place, entry in self._entries.items():
            claims = [replace(claim, key=moved(claim.key)) for claim in entry.claims]
            self._entries[place] = replace(entry, claims=claims)
        self._row_bytes = {moved(key): rows for key, rows in self._row_bytes.items()}
        self._hold({moved(key): first for key, first in self.first_rows.items()})
        self.epoch += 1

    def _hold(self, first_rows: Mapping[Hashable, int]) -> None:
        """What is resident from now on; the mirrors keep it when they make room."""
        self.first_rows = first_rows
        self._mirrors.keep = frozenset(key.storage for key in first_rows if isinstance(key, WeightKey))

    def has(self, residents: Sequence[tuple[Hashable, int]], ring_bytes: int) -> bool:
        """Whether all rows from (weight, first row) on are still meant to be resident, and the ring as long."""
        kept = all(self.first_rows.get(key, math.inf) <= first for key, first in residents)
        return kept and self.ring_bytes >= ring_bytes

    def has_more(self, owner: object, part: Hashable, limit_bytes: int) -> bool:
        """Whether clearly less of a plan's weights would be offloaded if it were decided now.

        It is shared out as ``choose_residency`` does, with what the plan's own step was found to need: of what was
        just decided it is never true, so nothing is decided again and again. ``limit_bytes`` is what its steps may
        hold.
        """
        entry, others = self._entries.get((id(owner), part)), self.others(owner, part)
        if entry is None:
            return False
        free = limit_bytes - self.ring_bytes - max(entry.step_bytes, others.reserved_bytes())
        now = _resident_bytes(entry.claims, residency_shares([*others.claims(), entry.claims], free))
        offloaded = sum(claim.nbytes for claim in entry.claims) - entry.resident_bytes
        return now - entry.resident_bytes > _CLEARLY * offloaded

    @property
    def smallest_budget_bytes(self) -> int | None:
        """The smallest ``gpu_memory`` of the graphs that are alive, which holds for all of them; None without any."""
        return min((entry.budget_bytes for entry in self._entries.values() if entry.lives()), default=None)

    @property
    def whose_budget_is_smallest(self) -> str:
        """The model whose ``gpu_memory`` that is, in words; "" without any."""
        alive = [entry for entry in self._entries.values() if entry.lives()]
        return min(alive, key=lambda entry: entry.budget_bytes).described if alive else ""

    @property
    def resident_bytes(self) -> int:
        """Bytes of all rows that are meant to be resident."""
        known = ((self._row_bytes[key], first) for key, first in self.first_rows.items() if key in self._row_bytes)
        return sum((rows - first) * row_bytes for (rows, row_bytes), first in known)


def _resident_bytes(claims: Sequence[Claim], first_rows: Mapping[Hashable, int]) -> int:
    return sum((claim.rows - first_rows.get(claim.key, claim.rows)) * claim.row_bytes for claim in claims)


@dataclass(frozen=True)
class OtherPlans:
    """Read-only view of the plans of an accelerator but one."""

    entries: tuple[_Entry, ...]

    def identify(self, weight: Tensor) -> Hashable:
        """By storage, and place in it."""
        return weight_key(weight)

    def claims(self) -> Sequence[Sequence[Claim]]:
        """What each plan claims, oldest first."""
        return [entry.claims for entry in self.entries]

    def reserved_bytes(self) -> int:
        """The most that a step needs beside resident weights and the ring."""
        return max((entry.step_bytes for entry in self.entries), default=0)

    def ring_within(self, nbytes: int) -> int:
        """The longest staging ring that takes at most ``nbytes``: plans that each take another one end each other."""
        return max((entry.ring_bytes for entry in self.entries if entry.ring_bytes <= nbytes), default=0)


__all__ = ["OtherPlans", "ResidencyLedger"]
