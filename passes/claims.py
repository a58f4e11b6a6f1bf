"""Memory that several graphs share: what each claims of the accelerator's, and what a decision may ask about the rest.

The protocols are all that the passes know about other graphs and about the host memory that weights lie in.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from hetegen_compile.geometry import storage_id


@dataclass(frozen=True)
class Claim:
    """A weight that a graph would keep on the accelerator.

    Attributes:
        key: the identity of its storage and of its place in it: graphs that share a weight share the key.
        rows, first: rows ``first:rows`` may be resident (those before are the host's by option).
        row_bytes: bytes of a row.
        gain_s_per_byte: seconds of a decode step that a resident byte saves.
        rank: a weight of higher rank gets what those of lower rank leave, whatever it gains.
        kept_rows: the last rows, which come before any other weight's beyond its own ``kept_rows``.
        weighed: whether a simulated step was shorter with these ``kept_rows``; then they count before those of graphs
            that have only estimated theirs.
    """

    key: Hashable
    rows: int
    first: int
    row_bytes: int
    gain_s_per_byte: float
    rank: int = 0
    kept_rows: int = 0
    weighed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that may be resident."""
        return (self.rows - self.first) * self.row_bytes


Way = tuple[tuple[tuple[int, int], int], ...]
"""A way of sharing out the memory: (rows, bytes of a row) of each kind of weight, and its ``kept_rows``."""


def way_of(claims: Sequence[Claim]) -> Way:
    """The way that the claims of Linears have."""
    return tuple(sorted({(one.rows, one.row_bytes): one.kept_rows for one in claims if one.rank == 0}.items()))


def keeping(claims: Sequence[Claim], way: Way) -> list[Claim]:
    """The claims with the rows that a way keeps, which a simulated step was shorter with."""
    kept = dict(way)
    return [replace(one, kept_rows=0 if one.rank else kept.get((one.rows, one.row_bytes), 0), weighed=True)
            for one in claims]  # fmt: skip


class WeightKey(NamedTuple):
    """Identity of a weight while its storage lives: that storage, and where in it the weight lies, in elements."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def holds(self, offset: int) -> bool:
        """Whether what begins at ``offset`` of the storage is a part of the weight."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset <= offset <= self.offset + last


def weight_key(weight: Tensor) -> WeightKey:
    """Identity of a weight while its storage lives."""
    storage, offset = storage_id(weight), int(weight.storage_offset())
    return WeightKey(storage, offset, tuple(weight.shape), tuple(weight.stride()))


class ResidentWeights(Protocol):
    """What the residency decision needs to know about the other graphs on the accelerator."""

    def identify(self, weight: Tensor) -> Hashable:
        """The key of a weight's claim."""

    def claims(self) -> Sequence[Sequence[Claim]]:
        """The claims of each other graph, oldest first."""

    def reserved_bytes(self) -> int:
        """The most that a step of another graph needs beside resident weights and the ring."""

    def ring_within(self, nbytes: int) -> int:
        """The longest staging ring of one of them that takes at most ``nbytes``; 0: none does."""


class NothingResident:
    """An accelerator that no other graph uses, with a staging ring or without."""

    def __init__(self, ring_bytes: int = 0) -> None:
        self._ring_bytes = ring_bytes

    def ring_within(self, nbytes: int) -> int:
        """That ring, if it takes no more."""
        return self._ring_bytes if self._ring_bytes <= nbytes else 0

    def identify(self, weight: Tensor) -> Hashable:
        """By storage, and place in it."""
        return weight_key(weight)

    def claims(self) -> Sequence[Sequence[Claim]]:
        """None."""
        return ()

    def reserved_bytes(self) -> int:
        """Nothing."""
        return 0


class HostWeights(Protocol):
    """What the staging decision needs to know about the host memory that weights lie in."""

    def staged(self, names: Collection[str], weights: Mapping[str, Tensor]) -> Mapping[str, str]:
        """Those of ``names`` that can be neither pinned nor adopted, with the reason; ``weights`` are all there are."""
