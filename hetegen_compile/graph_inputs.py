"""What a captured graph's inputs tell about it: weights, sizes, aliases, tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import py_sym_types

from hetegen_compile.ir import info, written_storages
from hetegen_compile.passes.expressions import evaluate
from hetegen_compile.passes.tensors import is_ids, to_expr


def is_weight(node: fx.Node, value: Any) -> bool:
    """Whether an input belongs to the model (and is not given with each call)."""
    if not isinstance(value, Tensor):
        return False
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    text = str(name() if callable(name) else name)
    return isinstance(value, torch.nn.Parameter) or "_parameters[" in text or "_buffers[" in text


def model_weights(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The inputs that belong to the model, by the names of their placeholders."""
    placeholders = module.graph.find_nodes(op="placeholder")
    return {node.name: value for node, value in zip(placeholders, inputs, strict=True) if is_weight(node, value)}


def aliased_inputs(graph: fx.Graph) -> frozenset[int]:
    """Positions of the inputs that share a storage, which the graph writes, with another input.

    What nobody writes may be mirrored piece by piece: parameters that are parts of one flat tensor.
    """
    placeholders = graph.find_nodes(op="placeholder")
    written = written_storages(graph.nodes)
    lies_in = Counter(key for node in placeholders for key in info(node).storages & written)
    return frozenset(i for i, node in enumerate(placeholders) if any(lies_in[key] > 1 for key in info(node).storages))


def symbol_inputs(placeholders: Sequence[fx.Node]) -> dict[sympy.Symbol, int]:
    """Position of the input that tells each symbol of the graph."""
    return {
        info(node).value.node.expr: i
        for i, node in enumerate(placeholders)
        if isinstance(info(node).value, py_sym_types) and info(node).value.node.expr.is_Symbol
    }


class SequenceShape(NamedTuple):
    """What a graph is given: sequences, and tokens of each (0: unknown), which are ``fixed`` or those of this call."""

    sequences: int
    tokens: int
    fixed: bool


def sequence_shape(
    placeholders: Sequence[fx.Node], weights: Container[str], sizes: Mapping[sympy.Symbol, sympy.Integer]
) -> SequenceShape:
    """The sequences that a graph is given, by its integer inputs [sequences, tokens].

    Where none has a fixed size the one of fewest tokens counts (a mask has one for each token in a cache, too). Without
    such inputs the first of several dimensions counts as sequences, and their tokens are unknown.
    """
    several = _of_several_dimensions(placeholders, weights)
    shapes = [_first_two(tensor, sizes) for tensor in several]
    ids = [(tensor, shape) for tensor, shape in zip(several, shapes, strict=True) if is_ids(tensor)]
    fixed = [shape for tensor, shape in ids if all(isinstance(size, int) for size in tensor.shape)]
    if fixed:
        return SequenceShape(*fixed[0], fixed=True)
    if ids:
        return SequenceShape(*min((shape for _, shape in ids), key=lambda shape: shape[1]), fixed=False)
    return SequenceShape(shapes[0][0] if shapes else 0, 0, fixed=False)


def _first_two(tensor: Tensor, sizes: Mapping[sympy.Symbol, sympy.Integer]) -> tuple[int, int]:
    sequences, tokens, *_ = (number(to_expr(size), sizes) for size in tensor.shape)
    return sequences, tokens


def sequence_symbols(placeholders: Sequence[fx.Node], weights: Container[str]) -> frozenset[sympy.Symbol]:
    """Symbols that are a number of sequences, and of nothing else: the first size of inputs like [sequences, tokens].

    There may be several: Dynamo has one for ``input_ids`` and one for ``attention_mask`` until they meet.
    """
    several = _of_several_dimensions(placeholders, weights)
    first = {to_expr(tensor.shape[0]) for tensor in several if is_ids(tensor)}
    others = [to_expr(size).free_symbols for tensor in several for size in tensor.shape[1:]]
    return frozenset(size for size in first if size.is_Symbol).difference(*others)


def _of_several_dimensions(placeholders: Sequence[fx.Node], weights: Container[str]) -> list[Tensor]:
    """The tensors of two dimensions and more that come with each call."""
    given = [info(node).value for node in placeholders if node.name not in weights]
    return [tensor for tensor in given if isinstance(tensor, Tensor) and tensor.dim() >= 2]


def token_count(module: fx.GraphModule) -> sympy.Expr:
    """Activation rows of the Linear that has most, an expression over the graph's symbols."""
    found = [
        to_expr(x.numel()) / max(1, int(x.shape[-1]))
        for node in module.graph.nodes
        if node.op in ("call_function", "call_method") and (x := _linear_input(node)) is not None
    ]
    return sympy.Max(1, *found) if found else sympy.Integer(1)


def _linear_input(node: fx.Node) -> Tensor | None:
    if not {"mm", "addmm"} & set(info(node).aten) or not node.all_input_nodes:
        return None
    tensors = [info(arg).value for arg in node.all_input_nodes if isinstance(info(arg).value, Tensor)]
    activations = [t for t in tensors if isinstance(t.shape[-1], int) and t.dim() >= 2]
    return activations[0] if activations else None


def number(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, sympy.Integer | int]) -> int:
    """An expression over the graph's symbols at these sizes."""
    return int(evaluate(expression, sizes))


def as_int(value: Any) -> int:
    """A size as the step gets it (an int) or as the capture does (a SymInt with a hint)."""
    if type(value) is int:  # in each step, for each layer's cache
        return value
    return int(value.node.hint) if isinstance(value, py_sym_types) else int(value)
