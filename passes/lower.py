"""Each segment becomes compiled code; equal segments are compiled once.

Why: compile time must depend on how many different segments a model has, not on how deep it is. The key of
a segment is everything its code depends on: operations and constants by value, each input's dtype, sizes,
strides, alignment and aliasing, and how symbols recur. What the plan decides (shares, residency) is not in it.

Before:

    s = segment_3(a, b)            # an fx.GraphModule

After:

    s = segment_3(a, b)            # a ``CompiledSegment``: one callable shared by all equal segments
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch.fx.experimental.proxy_tensor import py_sym_types

from hetegen_compile.errors import drop_frames
from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import info
from hetegen_compile.passes.append_behind import Appended, append_behind
from hetegen_compile.passes.aten_listener import GROUPED_ATEN
from hetegen_compile.passes.context import Context, Refusal, SegmentCache
from hetegen_compile.passes.segment_calls import with_declared_strides
from hetegen_compile.passes.tensors import to_expr

logger = logging.getLogger("hetegen_compile")

_REASON_CHARACTERS = 500  # a compiler's message may hold the code that it was given


class CompiledSegment(torch.nn.Module):
    """A segment's compiled callable in the graph's place of it.

    ``waits``: its code may wait for what the device computes, to read it (where groups of rows end). ``appended``:
    the caches that it has to be given to write the end of (``append_behind``), which it does not return.
    """

    def __init__(
        self, function: Callable[..., Any], outputs: int, mutates: tuple[int, ...], *, waits: bool = False,
        appended: tuple[Appended, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.function = function
        self.outputs = outputs
        self.mutates = mutates
        self.waits = waits
        self.appended = appended

    def forward(self, *args: Any) -> Any:
        """The segment's outputs as a sequence."""
        return self.function(*args)


def lower(module: fx.GraphModule, context: Context) -> None:
    """Replace every segment of the graph by its compiled form."""
    for node in module.graph.find_nodes(op="call_module"):
        segment = module.get_submodule(str(node.target))
        if isinstance(segment, fx.GraphModule):
            where = " ".join(filter(None, (node.name, info(node).module)))
            setattr(module, str(node.target), _compiled(segment, where, context.segments))


def _compiled(segment: fx.GraphModule, where: str, cache: SegmentCache) -> CompiledSegment:
    segment, appended = append_behind(segment)
    key = segment_key(segment)
    if key not in cache.compiled:
        cache.compiled[key] = _compile_or_refuse(segment, where, key, cache)
    results: Any = segment.graph.output_node().args[0]
    outputs = [info(node).value for node in results]
    function = with_declared_strides(cache.compiled[key], outputs)
    waits = any(not GROUPED_ATEN.isdisjoint(info(node).aten) for node in segment.graph.nodes)
    mutates = tuple(sorted({*mutated_inputs(segment), *(one.given for one in appended)}))
    return CompiledSegment(function, len(outputs), mutates, waits=waits, appended=appended)


def _compile_or_refuse(segment: fx.GraphModule, where: str, key: Hashable, cache: SegmentCache) -> Callable[..., Any]:
    """The compiled segment or, where its compiler fails, the segment as plain FX code and a refusal that says so."""
    examples = [_unified(info(node).value) for node in segment.graph.find_nodes(op="placeholder")]
    try:
        return cache.compile_segment(segment, examples)
    except TensorifyScalarRestartAnalysis:
        raise
    except Exception as error:  # whatever a compiler raises: right and slow beats not at all, and it is told
        reason = f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]
        cache.refused[key] = Refusal(where, f"runs as plain FX code, its compiler failed with {reason}")
        logger.warning("%s %s", where, cache.refused[key].reason)
        logger.debug("where it was raised", exc_info=error)
        drop_frames(error)
        forward: Callable[..., Any] = segment.forward
        return forward


def _unified(value: Any) -> Any:
    """A size by the symbol that is left of those found to be equal: Inductor reads the one it was made with."""
    if not isinstance(value, torch.SymInt) or value.node._expr == value.node.expr:
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def mutated_inputs(segment: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the inputs whose storage the segment writes."""
    written = frozenset[int]().union(*(info(node).writes for node in segment.graph.nodes))
    inputs = segment.graph.find_nodes(op="placeholder")
    return tuple(i for i, node in enumerate(inputs) if info(node).storages & written)


def segment_key(segment: fx.GraphModule) -> Hashable:
    """Everything that a segment's compiled code depends on, as a hashable value."""
    state = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.get_default_dtype())
    return (state, *_graph_key(segment, _Names()))


def _graph_key(module: fx.GraphModule, names: _Names) -> tuple[Hashable, ...]:
    places = {node: position for position, node in enumerate(module.graph.nodes)}
    return tuple(_node_key(module, node, places, names) for node in module.graph.nodes)


class _Names:
    """Symbols and storages by order of first appearance, so that equal layers have equal keys."""

    def __init__(self) -> None:
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self._storages: dict[int, int] = {}

    def expression(self, value: Any) -> str:
        expression = to_expr(value)
        for symbol in sorted(expression.free_symbols, key=str):
            fresh = sympy.Symbol(f"k{len(self._symbols)}", integer=True)
            self._symbols.setdefault(symbol, fresh)
        return str(expression.xreplace(self._symbols))

    def storage(self, tensor: Tensor) -> int:
        return self._storages.setdefault(storage_id(tensor), len(self._storages))


def _node_key(segment: fx.GraphModule, node: fx.Node, places: dict[fx.Node, int], names: _Names) -> Hashable:
    if node.op == "placeholder":
        return ("input", _value_key(info(node).value, names))
    if node.op == "get_attr":
        found = getattr(segment, str(node.target))
        return _graph_key(found, names) if isinstance(found, fx.GraphModule) else ("attribute", id(found))
    return (node.op, _target_key(node), _argument_key((node.args, node.kwargs), places, names))


def _target_key(node: fx.Node) -> Hashable:
    return node.target if isinstance(node.target, str) else (id(node.target), str(node.target))


def _value_key(value: Any, names: _Names) -> Hashable:
    if isinstance(value, Tensor):
        geometry = tuple(names.expression(v) for v in (*value.shape, *value.stride()))
        offset = names.expression(value.storage_offset())
        return (str(value.dtype), str(value.device), value.dim(), geometry, offset, names.storage(value))
    if isinstance(value, py_sym_types):
        return ("symbol", names.expression(value))
    return (type(value).__name__, repr(value))


def _argument_key(argument: Any, places: dict[fx.Node, int], names: _Names) -> Hashable:
    if isinstance(argument, fx.Node):
        return ("node", places[argument])
    if isinstance(argument, (tuple, list)):
        return (type(argument).__name__, *(_argument_key(item, places, names) for item in argument))
    if isinstance(argument, dict):
        return ("dict", *((key, _argument_key(item, places, names)) for key, item in argument.items()))
    if isinstance(argument, slice):
        return ("slice", *(_argument_key(v, places, names) for v in (argument.start, argument.stop, argument.step)))
    return _value_key(argument, names)
