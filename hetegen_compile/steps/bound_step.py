"""What binding makes of a schedule: a step that can be called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hetegen_compile.accelerators.base import LaunchChain
from hetegen_compile.passes.context import Refusal
from hetegen_compile.steps.longer_caches import LongerCache


@dataclass(frozen=True, eq=False)
class BoundStep:
    """A step as a callable, and what its caller has to bring up to date before each call.

    Attributes:
        run: ``run(inputs, mirrors, residents, carried, ahead)`` -> (outputs, pairs of a returned tensor and its
            device twin). ``carried`` are the transfers that the step before has started (None: start it now);
            ``ahead(index, op, weight, source, slot, after)`` starts one for the next step.
        mirrors: positions of the inputs whose mirrors the step reads, in the order of ``mirrors``.
        residents: (position of a weight, first row, end row) in the order of ``residents``.
        settled: positions of the inputs that host and accelerator write alike.
        outdated: positions of those that the host alone writes: what the accelerator holds of them, for other graphs or
            for this one's next step, is of before.
        streamed: positions of the weights that are prefetched from where they lie (not through the pinned ring).
        sizes: positions of the inputs that are numbers which what is issued behind gates depends on.
        carried: position of the weight of each carried prefetch, in the order of ``carried``.
        pinned_ring_bytes: length of the pinned ring that the step uses.
        chains: those that the step launches, in order.
        longer: the caches that the accelerator lengthens, for which it has to have room.
        in_turn: nothing in it is the worker's.
        source: the generated code, for people.
        refusals: kernels of the hardware profile that cannot be used here.
    """

    run: Callable[..., tuple[tuple[Any, ...], list[tuple[Tensor, Any]]]]
    mirrors: tuple[int, ...]
    residents: tuple[tuple[int, int, int], ...]
    settled: tuple[int, ...]
    outdated: tuple[int, ...]
    streamed: tuple[int, ...]
    sizes: tuple[int, ...]
    carried: tuple[int, ...]
    pinned_ring_bytes: int
    chains: tuple[LaunchChain, ...]
    longer: tuple[LongerCache, ...]
    in_turn: bool
    source: str
    refusals: tuple[Refusal, ...]


__all__ = ["BoundStep"]
