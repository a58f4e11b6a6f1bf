"""Accelerator nodes between Linears become segments; nodes on both sides get their host copy.

Why: a segment is what Inductor compiles, and it must not change when a plan does. So the cut is at every
Linear, whatever its placement: program order is walked once, and each Linear that is deeper than any before
opens the next level. Siblings (q/k/v) are equally deep and open one level together. Program order among
segment nodes is kept, so in-place writes stay where they were.

Before:

    q = linear(x, wq); a = view(q); k = linear(x, wk); b = view(k); c = sdpa(a, b); o = linear(c, wo)

After:

    q = linear(x, wq); k = linear(x, wk)
    c = segment_1(q, k)                     # view, view, sdpa
    o = linear(c, wo)
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import py_sym_types

from hetegen_compile.ir import (
    GROUPED,
    IN_PARTS,
    INPUT_OPS,
    LINEAR,
    MIRROR,
    TWIN,
    WRITE_BACK,
    NodeInfo,
    annotate,
    copy_node,
    info,
    is_tensor,
    lazy_module,
)
from hetegen_compile.linear_parts import whole_linear
from hetegen_compile.passes.annotate_costs import value_size
from hetegen_compile.passes.append_behind import lengthens
from hetegen_compile.passes.context import Context, require
from hetegen_compile.passes.levels import Levels
from hetegen_compile.passes.plans import Placement
from hetegen_compile.passes.resolve_sizes import size_inputs
from hetegen_compile.passes.tensors import tensors_in, to_expr


def group_segments(module: fx.GraphModule, context: Context) -> None:
    """Rewrite the graph into host nodes, Linears and calls of submodules ``segment_<level>``."""
    placement = require(context.placement, "place_nodes")
    if require(context.residency, "choose_residency").whole_graph:
        placement = _with_linears(module, placement)
    _Grouper(module, placement, context).group()


def _with_linears(module: fx.GraphModule, placement: Placement) -> Placement:
    """Everything fits: Linears are ordinary nodes of one segment, in the form that Inductor knows."""
    linears = [node for node in module.graph.nodes if node.target == LINEAR]
    for node in linears:
        node.target = whole_linear
    return Placement(placement.host, placement.accelerator | set(linears), placement.written_back)


class _Grouper:
    def __init__(self, module: fx.GraphModule, placement: Placement, context: Context) -> None:
        self._module = module
        self._graph = module.graph
        self._placement = placement
        self._context = context
        self._output = module.graph.output_node()
        self._nodes = [node for node in module.graph.nodes if node.op not in (*INPUT_OPS, "output")]
        self._levels = Levels(self._nodes, placement)
        self._sizes = size_inputs(module.graph)
        self._device: dict[fx.Node, fx.Node] = {}
        self._host: dict[fx.Node, fx.Node] = {}
        self._mirrors: dict[fx.Node, fx.Node] = {}

    def group(self) -> None:
        for level in range(self._levels.count):
            self._emit_host(level)
            for node in self._levels.linears(level):
                self._output.prepend(node)
                for place in (0, 2) if node.target == GROUPED else (0,):
                    node.update_arg(place, self._on_device(node.args[place]))  # type: ignore[arg-type]
            self._emit_segment(level)
        self._emit_host(None)
        self._finish()

    # ---- one side each -----------------------------------------------------------------------------------

    def _emit_host(self, level: int | None) -> None:
        for node in self._levels.hosts(level):
            with self._graph.inserting_before(self._output):
                copy = self._graph.node_copy(node, self._on_host)
            annotate(copy, info(node), side="host")
            self._host[node] = copy

    def _on_host(self, node: fx.Node) -> fx.Node:
        """The node that a host operation reads: the host's own value, else the accelerator's."""
        if node in self._host or node.op in INPUT_OPS:
            return self._host.get(node, node)
        return self._on_device(node)

    def _on_device(self, node: fx.Node) -> fx.Node:
        """The node that the accelerator reads: its own value, a mirror of an input, or the host's value."""
        if node in self._device:
            return self._device[node]
        if node.target in IN_PARTS or node.target == MIRROR:
            return node
        if node.op in INPUT_OPS:
            return self._mirror(node) if is_tensor(node) else node
        return self._host[node]

    def _mirror(self, node: fx.Node) -> fx.Node:
        if node not in self._mirrors:
            with self._graph.inserting_before(self._nodes[0]):
                mirror = self._graph.call_function(MIRROR, (node,))
            self._mirrors[node] = annotate(mirror, info(node), side="accelerator")
        return self._mirrors[node]

    # ---- segments ----------------------------------------------------------------------------------------

    def _emit_segment(self, level: int) -> None:
        members = self._levels.members(level)
        if not members:
            return
        inputs = self._with_sizes(_external_inputs(members))
        outputs = [node for node in members if self._is_read_outside(node, set(members))]
        operands = [self._on_device(node) for node in inputs]
        name = f"segment_{level}"
        self._module.add_submodule(name, _submodule(self._module, members, inputs, outputs))
        with self._graph.inserting_before(self._output):
            call = self._graph.call_module(name, tuple(operands))
            annotate(call, self._segment_info(members, inputs, outputs))
            for position, node in enumerate(outputs):
                item = self._graph.call_function(operator.getitem, (call, position))
                self._device[node] = annotate(item, info(node), side="accelerator", flops=sympy.Integer(0))

    def _with_sizes(self, inputs: list[fx.Node]) -> list[fx.Node]:
        """``inputs`` and the symbols of their sizes: Inductor cannot tell ``s`` from a tensor of ``s + 1`` rows."""
        symbols = {symbol for node in inputs for symbol in _symbols(info(node).value)}
        known = [node for symbol, node in self._sizes.items() if symbol in symbols]
        return list(dict.fromkeys([*inputs, *known]))

    def _is_read_outside(self, node: fx.Node, members: set[fx.Node]) -> bool:
        if not tensors_in(info(node).value) or not is_tensor(node):
            return False
        for user in node.users:
            if user.op == "output":
                return True
            on_accelerator = user.target in IN_PARTS or user in self._placement.accelerator
            if on_accelerator and user not in members:
                return True
            if user in self._placement.host and node not in self._placement.host:
                return True
        return False

    def _segment_info(self, members: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> NodeInfo:
        notes = [info(node) for node in members]
        outside = frozenset[int]().union(*(info(node).storages for node in inputs))
        return NodeInfo(
            value=tuple(info(node).value for node in outputs),
            storages=frozenset[int]().union(*(info(node).storages for node in outputs)),
            reads=outside,
            writes=frozenset[int]().union(*(note.writes for note in notes)) & outside,
            flops=sum((note.flops for note in notes), sympy.Integer(0)),
            traffic_bytes=sympy.Add(*map(value_size, (*inputs, *outputs)), *map(_not_copied, outputs)),
            module=_common_module([note.module for note in notes if note.module]),
            position=min(note.position for note in notes),
            side="accelerator",
        )

    # ---- the end of the graph ------------------------------------------------------------------------------

    def _finish(self) -> None:
        with self._graph.inserting_before(self._output):
            for node in self._placement.written_back:
                self._graph.call_function(WRITE_BACK, (node, self._mirror(node)))
            for node in self._output.all_input_nodes:
                if node in self._host and node in self._device:
                    self._graph.call_function(TWIN, (self._host[node], self._device[node]))
        for node in self._graph.find_nodes(op="call_function", target=WRITE_BACK):
            annotate(node, writes=info(node.args[0]).storages, reads=info(node.args[0]).storages, side="host")
        for node in self._graph.find_nodes(op="call_function", target=TWIN):
            annotate(node, side="host")
        self._output.args = fx.map_arg(self._output.args, self._on_host)
        for node in reversed(self._nodes):
            if node.target not in IN_PARTS:
                self._graph.erase_node(node)


def _not_copied(output: fx.Node) -> sympy.Expr:
    """What a longer cache has in common with the shorter one, which it lies behind: less nothing for all others."""
    return -value_size(output.all_input_nodes[0]) if lengthens(output) else sympy.Integer(0)


def _external_inputs(members: list[fx.Node]) -> list[fx.Node]:
    inside = set(members)
    found = dict.fromkeys(arg for node in members for arg in node.all_input_nodes if arg not in inside)
    return [node for node in found if not _is_submodule(node)]


def _symbols(value: Any) -> set[sympy.Symbol]:
    """Symbols in a number or in the geometry of a tensor."""
    if isinstance(value, Tensor):
        return set().union(*(_symbols(size) for size in (*value.shape, *value.stride(), value.storage_offset())))
    return set(to_expr(value).free_symbols) if isinstance(value, py_sym_types) else set()


def _is_submodule(node: fx.Node) -> bool:
    return node.op == "get_attr" and not is_tensor(node)


def _submodule(
    owner: fx.GraphModule, members: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(inputs):
        env[node] = annotate(graph.placeholder(f"in_{position}"), info(node))
    for node in members:
        for arg in node.all_input_nodes:
            if arg not in env:  # a submodule of a higher-order operation
                env[arg] = graph.get_attr(str(arg.target))
        env[node] = copy_node(graph, node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    return lazy_module(owner, graph)


def _common_module(paths: list[str]) -> str:
    """The longest dotted prefix that all paths share."""
    if not paths:
        return ""
    split = [path.split(".") for path in paths]
    length = next((i for i, steps in enumerate(zip(*split, strict=False)) if len(set(steps)) > 1), None)
    return ".".join(min(split, key=len)[:length])


__all__ = ["group_segments"]
