"""An effort that measures next to nothing, and a clock that advances as it is told."""

from __future__ import annotations

from hetegen_compile.calibration import Effort, Machine

TINY = Effort(
    tokens=(1, 2, 32),
    sized_tokens=2,
    weight_bytes=(64, 512),
    arithmetic_bytes=64,
    columns=(16, 32),
    kernel_tokens=(1,),
    rotate_bytes=2048,
    square=8,
    linear_budget_s=0.0,
    budget_s=0.0,
)

MACHINE = Machine("a processor", None, "2.13.0", 4)


class Clock:
    """Seconds that pass only when something says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
