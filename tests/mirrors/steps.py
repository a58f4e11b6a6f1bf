"""Steps that return tensors, for tests of what the mirrors make of them."""

from __future__ import annotations

from torch import Tensor

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.accelerators.base import Value
from hetegen_compile.mirrors import Mirrors, Request

LIMIT = 1 << 20


class Steps:
    """Steps that return tensors of which the accelerator has the values, too."""

    def __init__(self, accelerator: EmulatedAccelerator) -> None:
        self.accelerator = accelerator
        self.mirrors = Mirrors(accelerator)

    def returns(self, *tensors: Tensor) -> list[Value]:
        """A step that returns these; the values of the accelerator."""
        self.mirrors.begin_step()
        values = [self.accelerator.upload(Op("made"), tensor) for tensor in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            self.mirrors.register(tensor, value)
        self.count()
        return values

    def asks(self, *tensors: Tensor) -> list[Value | None]:
        """What the next step is given at once."""
        self.mirrors.begin_step()
        return self.mirrors.returned(tensors)

    def fetches(self, *tensors: Tensor, limit_bytes: int = LIMIT) -> list[Tensor]:
        """What the accelerator has of tensors that are asked for one by one."""
        values = self.mirrors.fetch([Request(one, "cache") for one in tensors], limit_bytes)
        self.count()
        return [self.accelerator.download(Op("look"), value) for value in values]

    def count(self) -> None:
        """No more is held than is counted: a budget is kept by that."""
        records = self.mirrors._records
        recorded = sum(record.nbytes for record in records._records.values())
        assert recorded + sum(noted.nbytes for noted in records._noted.values()) <= records.most_bytes

    @property
    def uploaded(self) -> int:
        """Bytes that went up for what was asked for."""
        return self.accelerator.counters.uploaded_bytes.get("mirrors", 0)
