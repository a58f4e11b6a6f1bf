"""The rings of the emulated accelerator: NaN wherever nothing valid lies."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from hetegen_compile.accelerators.emulated.values import Occupancy
from hetegen_compile.accelerators.ring import POISON, Ring, poisoned


class PoisonedRing(Ring):
    """A ring in host memory that is poisoned when it is made, and wherever a slot is given up."""

    def __init__(self) -> None:
        super().__init__(partial(poisoned, device=torch.device("cpu")))

    def poison(self, occupancies: Iterable[Occupancy]) -> None:
        """Fill bytes that no longer hold anything."""
        for occupancy in occupancies:
            self.buffer[occupancy.start : occupancy.end].fill_(POISON)
