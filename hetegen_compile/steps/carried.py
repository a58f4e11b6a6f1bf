"""Prefetches that one step has started for the next: what they read, and whether that is still what it was.

A transfer is used by the next step of the same plan if the weight has the storage, address and version that it
had when the copy was issued, and samples of the rows show the same bytes (for changes of a whole tensor that no
version counter shows); otherwise the step starts the copy again. Tensors made in inference mode have no version, so
nothing of them is carried. A plan starts prefetches for its next step only from its second step in
a row on: plans that alternate would fill the ring for each other in vain.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hetegen_compile.accelerators.base import Accelerator, Op, Slot, StepFacts, Token, Transfer
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.mirrors.fingerprints import sampled
from hetegen_compile.steps.bound_step import BoundStep

logger = logging.getLogger("hetegen_compile")


@dataclass(frozen=True)
class _Started:
    """A transfer of ``nbytes`` and the state of the weight that it reads: ``span_bytes`` from the address ``rows``.

    The weak reference keeps the storage's identity.
    """

    transfer: Transfer
    rows: int
    nbytes: int
    span_bytes: int
    samples: tuple[bytes, ...]
    storage: StorageWeakRef
    address: int
    version: int

    def reads(self, weight: Tensor) -> bool:
        """Whether the weight is what it was when the copy was issued."""
        return (
            not weight.is_inference()
            and self.storage.cdata == weight.untyped_storage()._cdata
            and self.address == weight.data_ptr()
            and self.version == weight._version
            and self.samples == sampled(self.rows, self.span_bytes)
        )


class CarriedPrefetches:
    """What the last step on one accelerator has started for the next. Used under the accelerator's step lock.

    ``wasted_bytes`` counts what was copied and then not used.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._plan: weakref.ref[BoundStep] | None = None
        self._started: dict[int, _Started] = {}
        self._repeats = False
        self._ran: weakref.WeakKeyDictionary[BoundStep, tuple[int, ...]] = weakref.WeakKeyDictionary()
        self._sizes: tuple[int, ...] = ()
        self.wasted_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes that have been started for a step that has not begun."""
        return sum(started.nbytes for started in self._started.values())

    def begin_step(self, plan: BoundStep, inputs: Sequence[Any], needs_bytes: int = 0) -> list[Transfer | None]:
        """Begin a step of ``plan`` on the accelerator; for each of its carried prefetches the transfer, if valid.

        ``needs_bytes``: the most that it may allocate.
        """
        self._repeats = self._plan is not None and self._plan() is plan
        if not self._repeats:
            self.drop("another plan runs")
        self._plan = None  # until this step has ended well
        found = [self._take(i, inputs[position]) for i, position in enumerate(plan.carried)]
        self._started.clear()
        self._sizes = tuple(inputs[position] for position in plan.sizes)
        again = self._sizes == self._ran.get(plan)
        started = [transfer for transfer in found if transfer is not None]
        facts = StepFacts(again=again, needs_bytes=needs_bytes, chains=plan.chains, in_turn=plan.in_turn)
        self._accelerator.begin_step(started, facts)
        return found

    def _take(self, index: int, weight: Tensor) -> Transfer | None:
        started = self._started.get(index)
        if started is None:
            return None
        if started.reads(weight) and self._accelerator.holds(started.transfer):
            return started.transfer
        self._discard(started, "its weight has changed since")
        return None

    def start(self, index: int, op: Op, weight: Tensor, source: Tensor, slot: Slot, after: Sequence[Token]) -> None:
        """Start the plan's carried prefetch ``index`` for its next step; ``source`` are rows of ``weight``."""
        if not self._repeats or weight.is_inference():
            return
        storage = StorageWeakRef(weight.untyped_storage())
        state = (storage, weight.data_ptr(), weight._version)
        rows, nbytes, within = source.data_ptr(), source.numel() * source.element_size(), span_bytes(source)
        samples = sampled(rows, within)
        transfer = self._accelerator.prefetch_ahead(op, source, slot, after)
        self._started[index] = _Started(transfer, rows, nbytes, within, samples, *state)

    def end_step(self, plan: BoundStep) -> None:
        """End the step on the accelerator; what it has started is good for the next step of ``plan``."""
        self._accelerator.end_step()
        self._plan = weakref.ref(plan)
        self._ran[plan] = self._sizes

    def drop(self, reason: str) -> None:
        """Give up what has been started; the next step starts it again."""
        for started in self._started.values():
            self._discard(started, reason)
        self._started.clear()

    def _discard(self, started: _Started, reason: str) -> None:
        self.wasted_bytes += started.nbytes
        logger.debug("%s was prefetched for nothing: %s", started.transfer.node, reason)


__all__ = ["CarriedPrefetches"]
