"""An accelerator whose operations return at once: what is left of a step is what it costs to issue.

Copies do not happen, waits wait for nothing, values are host tensors. ``launch`` runs its function where it is
called, so that torch's dispatch and the calls of segments cost what they cost; with tiny tensors nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetegen_compile.accelerators import Accelerator, Counters, Op
from hetegen_compile.accelerators.base import NOTHING_KNOWN, Slot, StepFacts, Token, Transfer, Value
from hetegen_compile.accelerators.growing import Grown, empty_cache, lengthened, lengthening, note
from hetegen_compile.geometry import storage_id
from hetegen_compile.rows import Span


class NullAccelerator(Accelerator):
    """Computes on the host, moves nothing; a step's results are only right where nothing is streamed."""

    kind = "emulated"
    device = torch.device("cpu")

    def __init__(self, memory_bytes: int = 8 << 30) -> None:
        self.memory_bytes = memory_bytes
        self.counters = Counters()
        self._slots: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def upload(self, op: Op, source: torch.Tensor, *, into: Value | None = None) -> Value:
        """A copy, made once a mirror."""
        return source.clone() if into is None else into.copy_(source)

    def download(self, op: Op, value: Value) -> torch.Tensor:
        """The value."""
        result: torch.Tensor = value
        return result

    def share_memory(self, one: Value, other: Value) -> bool:
        """As host tensors do."""
        return storage_id(one) == storage_id(other)

    def limit_memory(self, nbytes: int) -> None:
        """Nothing is counted."""

    def available_bytes(self) -> int:
        """All of it."""
        return self.memory_bytes

    def abandon_step(self) -> None:
        """Nothing is under way."""

    def reserve_ring(self, nbytes: int) -> None:
        """Nothing."""

    def slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """A tensor of zeros, one for each shape."""
        if (shape, dtype) not in self._slots:
            self._slots[shape, dtype] = torch.zeros(shape, dtype=dtype)
        return self._slots[shape, dtype]

    def pin(self, owner: object, address: int, nbytes: int) -> int:
        """Says that it is."""
        return 0

    def reserve_pinned(self, nbytes: int) -> None:
        """Nothing."""

    def pinned_slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """As a slot of the staging ring."""
        return self.slot(offset, shape, dtype)

    @property
    def pinned_bytes(self) -> int:
        """None."""
        return 0

    def begin_step(self, carried: Sequence[Transfer] = (), facts: StepFacts = NOTHING_KNOWN) -> None:
        """Nothing."""

    def end_step(self) -> None:
        """Nothing."""

    def stage(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Transfer]) -> Transfer:
        """The slot as it is."""
        return (slot,)

    def prefetch(self, op: Op, source: torch.Tensor | Transfer, slot: Slot, after: Sequence[Token]) -> Transfer:
        """The slot as it is."""
        return (slot,)

    def prefetch_ahead(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Token]) -> Transfer:
        """The slot as it is."""
        return (slot,)

    def holds(self, transfer: Transfer) -> bool:
        """Always."""
        return True

    def wait(self, op: Op, transfer: Transfer) -> Value:
        """What is there."""
        return transfer[0]

    def release(self, op: Op, transfer: Transfer) -> Token:
        """Nothing to release."""
        return None

    def to_host(self, op: Op, value: Value | Sequence[Value]) -> Transfer:
        """The value or values as they are."""
        return (value,)

    def wait_host(self, op: Op, transfer: Transfer) -> Any:
        """What is there."""
        return transfer[0]

    def to_accelerator(self, op: Op, tensors: Sequence[torch.Tensor]) -> Transfer:
        """The tensors as they are."""
        return (tensors,)

    def new_cache(self, op: Op, like: torch.Tensor, tokens: int) -> Value:
        """Memory with room."""
        where = Grown.of(like, tokens)
        result = empty_cache(like, where.block.tokens, self.device)
        note(result, where)
        return result

    def lengthen(self, op: Op, value: Value, tokens: int) -> Value:
        """A view."""
        where = lengthening(op.name, value, tokens)
        result = lengthened(value, where.tokens)
        note(result, where)
        return result

    def launch(
        self,
        op: Op,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        outputs: int | None = None,
        mutates: tuple[int, ...] = (),
    ) -> Any:
        """Run the function now."""
        return function(*args)

    def host(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function now."""
        return function(*args, **kwargs)

    @property
    def cannot_issue_ahead(self) -> str:
        """Everything is done where it is issued."""
        return "a null accelerator has nothing to be ahead of"

    def receive(self, op: Op, transfer: Transfer) -> Any:
        """Never asked for."""
        raise AssertionError(self.cannot_issue_ahead)

    def host_ahead(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Never asked for."""
        raise AssertionError(self.cannot_issue_ahead)

    def deliver(self, op: Op, promises: Sequence[Any], like: Sequence[torch.Tensor]) -> Transfer:
        """Never asked for."""
        raise AssertionError(self.cannot_issue_ahead)

    def caught_up(self, op: Op, transfer: Transfer) -> None:
        """Never asked for."""
        raise AssertionError(self.cannot_issue_ahead)

    def synchronize(self) -> None:
        """Nothing is under way."""

    def trace(self, enabled: bool) -> list[Span]:
        """Nothing is recorded."""
        return []

    def rest(self) -> None:
        """Nothing to stop."""

    def close(self) -> None:
        """Nothing to close."""
