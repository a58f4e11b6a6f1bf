"""Caches that a step makes or lengthens in memory with room behind them: its lines, and the room that each needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor, fx

from hetegen_compile.accelerators.base import Op
from hetegen_compile.passes.append_behind import Appended
from hetegen_compile.passes.expressions import evaluate
from hetegen_compile.passes.lower import CompiledSegment
from hetegen_compile.passes.tensors import to_expr
from hetegen_compile.passes.windows import TOKENS
from hetegen_compile.steps.like import like_text
from hetegen_compile.steps.step_source import StepSource


@dataclass(frozen=True)
class LongerCache:
    """A cache that a step lengthens.

    Attributes:
        given: position of the input.
        added: by how many tokens, from a step's inputs.
        tokens: of the longer one, an expression over the graph's sizes.
    """

    given: int
    added: Callable[[Sequence[Any]], int]
    tokens: sympy.Expr


class LongerCaches:
    """Those of one step; ``place_of``: of the input that is a size; ``room_tokens``: what a new cache has room for."""

    def __init__(
        self, source: StepSource, position: Mapping[fx.Node, int], place_of: Callable[[sympy.Symbol], int],
        room_tokens: Callable[[Tensor], int],
    ) -> None:  # fmt: skip
        self._source = source
        self._position = position
        self._place_of = place_of
        self._room_tokens = room_tokens
        self._added: dict[sympy.Expr, Callable[[Sequence[Any]], int]] = {}
        self.found: list[LongerCache] = []

    def lines(self, node: fx.Node, segment: CompiledSegment, launch: str) -> str:
        """Lines that call a segment with the caches; ``launch`` has ``{arguments}`` for what it is given.

        They are put back among its results.
        """
        texts = dict(enumerate(map(self._source.text, node.args)))
        before, behind, names = [], [], []
        for index, one in enumerate(segment.appended):
            name = texts[one.given] = f"_cache_{index}"
            made = self._new(node, one.value) if one.tokens is None else self._longer(node, one, one.tokens)
            before.append(f"{name} = {made}")
            behind.append(f"{node.name}.insert({one.result}, {name})")
            names.append(name)
        called = launch.format(arguments=f"({', '.join(texts[place] for place in sorted(texts))},)")
        return "\n    ".join([*before, f"{node.name} = list({called})", *behind, f"del {', '.join(names)}"])

    def _new(self, node: fx.Node, value: Tensor) -> str:
        made_like = like_text([value], self._source.constant, self._place_of)
        return f"new_cache({self._op(node)}, {made_like}[0], {self._room_tokens(value)})"

    def _longer(self, node: fx.Node, one: Appended, tokens: sympy.Expr) -> str:
        mirror: Any = node.args[one.given]
        places = [(symbol, self._place_of(symbol)) for symbol in tokens.free_symbols]
        added = self._added.setdefault(tokens, functools.partial(_number, tokens, places))
        given = self._position[mirror.all_input_nodes[0]]
        self.found.append(LongerCache(given, added, to_expr(one.value.shape[TOKENS])))
        number = str(tokens) if tokens.is_Integer else f"{self._source.constant('added', added)}(inputs)"
        return f"lengthen({self._op(node)}, {mirror}, {number})"

    def _op(self, node: fx.Node) -> str:
        return self._source.constant("op", Op(f"a cache of {node.name}"))


def _number(size: sympy.Expr, places: Sequence[tuple[Any, int]], inputs: Sequence[Any]) -> int:
    return int(evaluate(size, {symbol: inputs[place] for symbol, place in places}))


__all__ = ["LongerCache", "LongerCaches"]
