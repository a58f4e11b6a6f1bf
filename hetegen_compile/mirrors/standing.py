"""What a plan asks of the mirrors at every step, answered at once as long as nothing about it has changed.

Weights are the same tensors step after step. Looking each of them up costs microseconds, and a model has hundreds. So
the answer is kept, with the address and the version of every tensor: two lists that are compared with those of the
tensors that a step is given. As soon as the mirrors drop or replace anything that an answer stands on, they take the
answers back, with the device memory that they hold; storages that died they find at the beginning of each step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hetegen_compile.accelerators.base import Value
from hetegen_compile.mirrors.fingerprints import Fingerprint

SAMPLED_TENSORS = 128
"""How many tensors a step compares a sample of: some tens of microseconds."""

STEPS_PER_BLOCK = 8
"""Every so many steps one compares a block: it is as much work as dozens of samples, and a model has very many."""

_Samples = tuple[list[ctypes.Array[ctypes.c_char]], list[bytes]]


class Samples:
    """Rotating samples of several fingerprints: of up to ``SAMPLED_TENSORS`` tensors a turn, now and then a block.

    Turns are its own, whoever else takes steps meanwhile: all tensors have their turn, and all blocks.
    """

    def __init__(self, watched: Sequence[tuple[int, Fingerprint]], turn: int = 0) -> None:
        """``watched``: addresses of storages and fingerprints of what lies in them; ``turn``: where to begin."""
        self._watched = watched
        self._turn = turn
        self._places: dict[int, _Samples] = {}

    def match(self) -> bool:
        """Whether what the next turn looks at is what it was."""
        count = len(self._watched)
        if not count:
            return True
        self._turn += 1
        if self._turn % STEPS_PER_BLOCK == 0 and not self._block_matches(self._turn // STEPS_PER_BLOCK):
            return False
        first = self._turn * SAMPLED_TENSORS % count
        places, expected = self._samples(self._turn // -(-count // SAMPLED_TENSORS))
        if count <= SAMPLED_TENSORS:
            return [place.raw for place in places] == expected
        places, expected = places * 2, expected * 2
        last = first + SAMPLED_TENSORS
        return [place.raw for place in places[first:last]] == expected[first:last]

    def _block_matches(self, turn: int) -> bool:
        """Another tensor's block each turn."""
        address, fingerprint = self._watched[turn % len(self._watched)]
        return fingerprint.block_matches(address, turn // len(self._watched))

    def _samples(self, turn: int) -> _Samples:
        """Places in memory and what they were, another one of each fingerprint each time all have been looked at."""
        turn %= Fingerprint.turns
        if turn not in self._places:
            pairs = [fingerprint.sample(address, turn) for address, fingerprint in self._watched]
            self._places[turn] = [place for place, _ in pairs], [expected for _, expected in pairs]
        return self._places[turn]


class Sampled(Protocol):
    """Something of the tensors' contents that is looked at in each step."""

    def match(self) -> bool:
        """Whether it is what it was."""


class Standing:
    """An answer and what it stands on.

    Attributes:
        values: the device values of the requests.
        used: the last step that was answered with them.
        samples: of the tensors that have fingerprints.
        records: identities of the records that it stands on.
        valid: whether it has not been taken back.
    """

    def __init__(self, tensors: Sequence[Tensor], values: list[Value], samples: Sampled) -> None:
        """``tensors`` are those that the plan is given, none of them made in inference mode."""
        self.values = values
        self.used = -1
        self.samples = samples
        self.records: frozenset[int] = frozenset()
        self.valid = True
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._versions = [tensor._version for tensor in tensors]

    def take_back(self) -> None:
        """Never answer with it again, and let go of what it holds."""
        self.valid = False
        self.values = []

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors lie where the others did and have not been written since."""
        try:
            return (
                self.valid
                and [tensor._version for tensor in tensors] == self._versions
                and [tensor.data_ptr() for tensor in tensors] == self._addresses
            )
        except RuntimeError:  # torch counts no versions of tensors that were made in inference mode
            return False


__all__ = ["SAMPLED_TENSORS", "Sampled", "Samples", "Standing"]
