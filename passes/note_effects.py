"""What the captured program does to memory: the promise that every schedule of it is verified against.

Why: a schedule that is consistent in itself may still have lost a write or read an older value. So the order
of in-place writes, and which inputs and outputs share memory, are noted before any pass places a node.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.findings import Effects, LinearOperands
from hetegen_compile.passes.happens_before import name_of, nodes_in


def note_effects(module: fx.GraphModule, context: Context) -> Effects:
    """Positions of the in-place writes of each storage, the storages of each output, operands of Linears."""
    del context
    writes: dict[int, set[int]] = {}
    writers = {info(node).position: name_of(node) for node in module.graph.nodes if info(node).writes}
    for node in module.graph.nodes:
        for key in info(node).writes:
            writes.setdefault(key, set()).add(info(node).position)
    output = module.graph.output_node()
    return Effects(
        writes={key: tuple(sorted(positions)) for key, positions in writes.items()},
        writers=writers,
        outputs=tuple(info(node).storages for node in nodes_in(output.args[0])),
        linears={info(node).position: _operands(*node.args) for node in module.graph.nodes if node.target == LINEAR},
    )


def _operands(x: Any, weight: Any, bias: Any, dim: Any) -> LinearOperands:
    return LinearOperands(
        info(x).position, info(weight).position, None if bias is None else info(bias).position, int(dim)
    )
