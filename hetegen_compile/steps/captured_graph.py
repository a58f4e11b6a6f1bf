"""A graph as Dynamo captured it, and what it tells about the inputs that it will be called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
from torch import Tensor, fx

from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.geometry import storage_id
from hetegen_compile.graph_inputs import aliased_inputs, as_int, is_weight, sequence_shape, symbol_inputs
from hetegen_compile.options import Options
from hetegen_compile.passes.context import Bucket, SegmentCache
from hetegen_compile.passes.lift_parts import WeightPart
from hetegen_compile.passes.sources import source_name
from hetegen_compile.planning.planned import Sizes
from hetegen_compile.steps.results import Results
from hetegen_compile.steps.step_values import InputFacts
from hetegen_compile.steps.undo import HostWrites, host_writes

Part = tuple[Bucket, int]
"""A bucket of tokens of one model: Dynamo lets models of one class and shape share a compiled graph."""


@dataclass(frozen=True)
class CapturedGraph:
    """What is known once, whatever is planned and wherever it runs.

    Attributes:
        segments: those that have been compiled.
        parts: of weights, which are inputs of the module behind those that the caller gives; "inputs" are all of them.
        weights: positions of parameters and buffers among the inputs, by name of the placeholder.
        symbols: position of the input that tells each symbol.
        writes: inputs that need care before a step may run twice.
        results: what the caller's compiler reads of what is returned.
    """

    module: fx.GraphModule
    options: Options
    profile: HardwareProfile
    segments: SegmentCache
    parts: Sequence[WeightPart]
    weights: Mapping[str, int]
    facts: InputFacts
    symbols: Mapping[sympy.Symbol, int]
    writes: HostWrites
    results: Results

    @classmethod
    def of(
        cls,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Options,
        profile: HardwareProfile,
        segments: SegmentCache,
        parts: Sequence[WeightPart] = (),
    ) -> CapturedGraph:
        """From a module that ``capture`` has annotated, while Dynamo's notes on its inputs are there."""
        placeholders = module.graph.find_nodes(op="placeholder")
        names = [source_name(node) or node.name for node in placeholders]
        weights = {node.name: i for i, node in enumerate(placeholders) if is_weight(node, inputs[i])}
        facts = InputFacts.of(placeholders, names, aliased_inputs(module.graph), frozenset(weights.values()))
        symbols = symbol_inputs(placeholders)
        sizes = {symbol: sympy.Integer(as_int(inputs[i])) for symbol, i in symbols.items()}
        shape = sequence_shape(placeholders, weights, sizes)
        return cls(
            module=module,
            options=options,
            profile=profile,
            segments=segments,
            parts=parts,
            weights=weights,
            facts=facts,
            symbols=symbols,
            writes=host_writes(module.graph),
            results=Results.of(module, shape.tokens if shape.fixed else 0),
        )

    @cached_property
    def described(self) -> str:
        """The model that the graph is of, in words: by the first of its weights."""
        position = self._first_weight
        return "a function without weights" if position is None else f"the model of {self.facts.names[position]}"

    def sizes(self, inputs: Sequence[Any]) -> Sizes:
        """The sizes of one call."""
        return {symbol: sympy.Integer(as_int(inputs[i])) for symbol, i in self.symbols.items()}

    def size_numbers(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """The same as plain numbers, in the order of ``symbols``."""
        return tuple([as_int(inputs[i]) for i in self.symbols.values()])

    def anchor(self, inputs: Sequence[Any]) -> Tensor | None:
        """One of the model's weights: plans are void when it is gone."""
        return None if self._first_weight is None else inputs[self._first_weight]

    @cached_property
    def _first_weight(self) -> int | None:
        return min(self.weights.values(), default=None)

    def model_of(self, inputs: Sequence[Any]) -> int:
        """Whose weights these are: the storage of one of them tells."""
        anchor = self.anchor(inputs)
        return 0 if anchor is None else storage_id(anchor)

    def weight_tensors(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """The model's tensors by the names of their placeholders."""
        return {name: inputs[i] for name, i in self.weights.items()}


__all__ = ["CapturedGraph", "Part"]
