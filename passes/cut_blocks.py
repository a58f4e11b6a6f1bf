"""The host's share of a block: what lies between its Linears, on the host's columns only.

Why: the host goes through a block with columns ``0:h`` of the intermediate. The operations between the Linears act on
each column for itself, so the same operations on the host's part of the first Linears' results are its part of the
last one's input. ``split_linears`` calls this when it has cut the first Linears and comes to the last. The
accelerator's copy of the operations, which is in a compiled segment, stays as it is: it sees all columns, of which the
host's are zero and are not read behind it.

Before (``g`` and ``u`` are cut: ``gh``, ``uh`` are the host's parts):          After:

    p = segment_3(pad(g parts), pad(u parts)); m = p[0]                           ... and on the host
    d = linear(m, wd)                                                             ah = silu(gh); mh = mul(ah, uh)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import NodeInfo, annotate, info
from hetegen_compile.passes.find_blocks import is_reshape, reshape_sizes
from hetegen_compile.passes.findings import Block

HostParts = Mapping[int, Sequence[fx.Node]]
"""The host's parts of the first Linears' results, by the position of the Linear; one for each of its ways."""


def cut_block(module: fx.GraphModule, block: Block, consumer: fx.Node, parts: HostParts, columns: int) -> fx.Node:
    """Repeat the block's operations on the host's ``columns``, at the graph's insertion point; returns the result."""
    value: Any = consumer.args[0]
    if info(value).position in block.siblings:  # nothing between
        return parts[info(value).position][0]
    call, place = value.args
    if value.target is not operator.getitem or call.op != "call_module":
        raise ScheduleError(f"{consumer.name} reads {value.name}, which is no result of a segment")
    segment = module.get_submodule(str(call.target))
    assert isinstance(segment, fx.GraphModule), "segments are lowered later"
    results: Any = segment.graph.output_node().args[0]
    env = {
        inner: parts[info(operand).position][0] if info(operand).position in block.siblings else operand
        for inner, operand in zip(segment.graph.find_nodes(op="placeholder"), call.args, strict=True)
    }
    views = {node: (sibling, way) for node, sibling, way in block.parts}
    for node in segment.graph.nodes:
        position = info(node).position
        if node.op != "placeholder" and position in views:
            sibling, way = views[position]
            env[node] = parts[sibling][way]
        elif node.op != "placeholder" and position in block.region:
            env[node] = _on_columns(module.graph, node, env, block.columns, columns)
    return env[results[place]]


def _on_columns(graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, fx.Node], columns: int, fewer: int) -> fx.Node:
    """A copy of ``node`` that acts on fewer columns."""
    copy = graph.node_copy(node, env.__getitem__)
    if is_reshape(node):
        copy.args = (copy.args[0], (*reshape_sizes(copy)[:-1], fewer))
    notes = info(node)
    share = notes.value.new_empty((*notes.value.shape[:-1], fewer))
    part = NodeInfo(
        value=share, aten=notes.aten, flops=notes.flops * fewer / columns,
        traffic_bytes=notes.traffic_bytes * fewer / columns, module=notes.module, position=notes.position, side="host",
    )  # fmt: skip
    return annotate(copy, part)


__all__ = ["HostParts", "cut_block"]
