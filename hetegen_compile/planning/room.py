"""How much of the accelerator one plan's steps may use, for forwards of varying sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import sympy

from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.findings import MemoryNeed
from hetegen_compile.planning.planned import Sizes

_FACTORS = ((2, 1), (3, 2), (5, 4), (9, 8), (1, 1))
"""How far beyond a forward that outgrew its room the next one's is tried, most first."""


@dataclass
class Room:
    """The sizes up to which a plan's memory is known to fit, and what a step makes at those.

    A forward beyond them takes no new plan as long as its ``inputs`` (their mirrors, and what caches take beside) and
    activations fit what weights and ring leave.
    """

    context: Context
    need: MemoryNeed
    inputs: sympy.Expr
    free_bytes: int
    activation_bytes: int
    _most: Sequence[int] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, context: Context, free_bytes: int) -> Room:
        """What a plan has beside weights and ring (``free_bytes``), at the sizes that it was made for."""
        need, residency = require(context.memory, "measure_memory"), require(context.residency, "choose_residency")
        inputs = residency.mirrored + residency.beside
        return cls(context, need, inputs, free_bytes, need.peak_bytes(context.room))

    def covers(self, sizes: Sizes) -> bool:
        """Whether a forward of these sizes fits; looks further if it is larger than those before."""
        if self.has([int(size) for size in sizes.values()]):
            return True
        return any(self._extends_to(sizes, factor) for factor in _FACTORS)

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether a forward of these sizes, in their order in the context, is no larger than those before."""
        if self._most is None:
            known = {**self.context.sizes, **self.context.largest}
            self._most = [int(known[symbol]) for symbol in self.context.sizes]
        return all(number <= most for number, most in zip(numbers, self._most, strict=True))

    def _extends_to(self, sizes: Sizes, factor: tuple[int, int]) -> bool:
        times, parts = factor
        known = self.context.largest
        largest = {symbol: max(size * times // parts, known.get(symbol, size)) for symbol, size in sizes.items()}
        context = replace(self.context, sizes=sizes, largest=largest)
        activations = self.need.peak_bytes(context.room)
        if context.room(self.inputs) + activations > self.free_bytes:
            return False
        self.context, self.activation_bytes, self._most = context, activations, None
        return True


__all__ = ["Room"]
