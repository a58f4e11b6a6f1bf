"""Compilers of segments: Inductor, and plain FX for tests that are about something else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from hetegen_compile.errors import CompilationError
from hetegen_compile.passes.context import SegmentCompiler

INDUCTOR_OPTIONS: dict[str, Any] = {
    "triton.cudagraph_trees": False,  # trees would copy slots at every replay
    "triton.cudagraphs": False,
    "freezing": False,  # weights are inputs and may change
    "shape_padding": False,
    "max_autotune": False,
    "joint_graph_constant_folding": False,  # needs a device that can run the constants
}


class SizeSource(NamedTuple):
    """Where a symbol can be read: an input, or a dimension of one, is ``factor`` times the symbol plus ``offset``."""

    position: int
    dim: int | None
    factor: int
    offset: int

    def read(self, args: Sequence[Any]) -> Any:
        """The symbol's value."""
        value = args[self.position]
        return ((value if self.dim is None else value.shape[self.dim]) - self.offset) // self.factor


def inductor_compiler(mode: FakeTensorMode) -> SegmentCompiler:
    """Compile with Inductor; example values are fakes and SymInts of ``mode``."""

    def compile_segment(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        examples = [_by_todays_symbol(example) for example in examples]
        sources = unnamed_sizes(examples)
        inputs = [*examples, *(source.read(examples) for source in sources)]
        context = TracingContext(mode)
        with tracing(context), inductor_config.patch(INDUCTOR_OPTIONS), torch.no_grad():
            compiled = compile_fx(_with_more_inputs(segment, len(sources)), inputs)
        assert callable(compiled)
        return _reading_sizes(compiled, sources) if sources else compiled

    return compile_segment


def unnamed_sizes(examples: Sequence[Any]) -> list[SizeSource]:
    """Sources of symbols that are no input by themselves, one for each.

    Dynamo gives its backends every symbol as an input, and Inductor counts on it. Its code uses symbols that no input
    defines (of an input ``s + 1`` it takes ``s``). Its cache on disk keeps and checks the guards of a compilation by
    these inputs alone: a guard on another symbol would be lost, or name a place in the model, at which the look-up of
    the next process fails.

    Raises:
        CompilationError: a symbol cannot be read from any input.
    """
    sizes = list(_sizes(examples))
    named = {expression for _, dim, expression in sizes if dim is None and expression.is_Symbol}
    found: dict[sympy.Symbol, SizeSource] = {}
    for position, dim, expression in sizes:
        terms = dict(expression.as_coefficients_dict())
        offset = int(terms.pop(sympy.S.One, 0))
        for symbol, factor in terms.items() if len(terms) == 1 else ():
            if symbol.is_Symbol and symbol not in named:
                found.setdefault(symbol, SizeSource(position, dim, int(factor), offset))
    missing = set().union(*(expression.free_symbols for _, _, expression in sizes)) - named - found.keys()
    if missing:
        raise CompilationError(f"no input of the segment shows {', '.join(sorted(map(str, missing)))}")
    return list(found.values())


def _sizes(examples: Sequence[Any]) -> Iterator[tuple[int, int | None, sympy.Expr]]:
    """(position, dimension, expression) of each symbolic input and dimension of one."""
    for position, value in enumerate(examples):
        numbers = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        for dim, number in numbers:
            if isinstance(number, torch.SymInt):
                yield position, dim, number.node.expr


def _with_more_inputs(segment: fx.GraphModule, count: int) -> fx.GraphModule:
    """The segment with so many inputs behind its own, which nothing uses."""
    graph = copy.deepcopy(segment.graph)
    behind = [*graph.find_nodes(op="placeholder")][-1:]
    for i in range(count):
        with graph.inserting_after(*behind):
            behind = [graph.placeholder(f"size_{i}")]
    return fx.GraphModule(segment, graph)


def _reading_sizes(compiled: Callable[..., Any], sources: Sequence[SizeSource]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return compiled(*args, *(source.read(args) for source in sources))

    return call


def _by_todays_symbol(example: Any) -> Any:
    """A size whose symbol turned out to be another's, by that one.

    Inductor's code names such an input by the old symbol and reads it by the new one.
    """
    if not isinstance(example, torch.SymInt) or example.node._expr == example.node.expr:
        return example
    return example.node.shape_env.create_symintnode(example.node.expr, hint=example.node.hint)


def plain_compiler(mode: FakeTensorMode) -> SegmentCompiler:
    """Run the segment as plain FX code."""
    del mode

    def compile_segment(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        del examples
        forward: Callable[..., Any] = segment.forward
        return forward

    return compile_segment
