"""Chains of two launches each, alone and in a row, whose results say whether they are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetegen_compile.accelerators import CudaAccelerator, Op, StepFacts
from hetegen_compile.accelerators.base import LaunchChain


class Layer:
    """A chain of two launches: y = 2x, z = y + w; gives z, and w's first element as a view."""

    def __init__(self, accelerator: CudaAccelerator, made: tuple[int, ...] = ()) -> None:
        self.accelerator = accelerator
        self.chain = LaunchChain("double", self.run, made=made)
        self.runs = 0

    def run(self, given: list[Any]) -> tuple[Any, ...]:
        self.runs += 1
        x, w = given
        given.clear()
        y = self.accelerator.launch(Op("double"), lambda x: x * 2, (x,))
        z = self.accelerator.launch(Op("add"), torch.add, (y, w))
        return z, w[:1]

    def step(self, x: Tensor, w: Tensor, *, again: bool = True) -> tuple[Tensor, Tensor]:
        self.accelerator.begin_step(facts=StepFacts(again=again, chains=[self.chain]))
        given = [x, w]
        z, first = self.accelerator.launch_chain(self.chain, given)
        assert given == [], "what is given may die on the way"
        self.accelerator.end_step()
        assert torch.equal(z, 2 * x + w)
        assert torch.equal(first, w[:1])
        return z, first


def wants(layer: Layer) -> bool:
    return layer.accelerator._replays.wants_open_gates([layer.chain])


def steps(layer: Layer, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether each was replayed, or recorded and replayed."""
    found = []
    for x, w in pairs:
        before = layer.accelerator.counters.chains_replayed
        layer.step(x, w)
        found.append(layer.accelerator.counters.chains_replayed > before)
    return found


class Row:
    """Layers that follow each other, the first of ``x`` and all of ``ws``."""

    def __init__(self, accelerator: CudaAccelerator, count: int = 3) -> None:
        self.accelerator = accelerator
        self.layers = [Layer(accelerator, made=(0,) if index else ()) for index in range(count)]

    def step(self, x: Tensor, ws: Sequence[Tensor]) -> list[bool]:
        """Whether each was replayed."""
        self.accelerator.begin_step(facts=StepFacts(again=True, chains=[layer.chain for layer in self.layers]))
        value, expected, found = x, x, []
        for layer, w in zip(self.layers, ws, strict=True):
            before = self.accelerator.counters.chains_replayed
            value, _ = self.accelerator.launch_chain(layer.chain, [value, w])
            expected = 2 * expected + w
            found.append(self.accelerator.counters.chains_replayed > before)
        self.accelerator.end_step()
        assert torch.equal(value, expected)
        return found

    def recordings(self) -> list[Any]:
        return [layer.chain.recorded.recording for layer in self.layers]
