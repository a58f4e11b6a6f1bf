"""Which nodes move data and do not compute: what may run twice, and what only shows memory in another shape."""

from __future__ import annotations

from torch import fx

from hetegen_compile.ir import NodeInfo, info
from hetegen_compile.passes.aten_listener import FREE_ATEN
from hetegen_compile.passes.tensors import tensors_in

_MOVEMENT_NAMES = """_to_copy _unsafe_view alias arange as_strided cat clone constant_pad_nd copy_ copy detach empty
    empty_like empty_strided expand eye fill fill_ flip full full_like gather index index_copy index_copy_
    index_put index_put_ index_select lift_fresh lift_fresh_copy masked_fill masked_fill_ narrow new_empty
    new_full new_ones new_zeros ones ones_like permute repeat roll scalar_tensor scatter scatter_ select
    select_scatter slice slice_scatter split split_with_sizes squeeze stack t transpose tril tril_ triu triu_
    unbind unfold unsqueeze view where zero_ zeros zeros_like _local_scalar_dense"""
_VIEWS = FREE_ATEN - {"empty"} | {"narrow", "split_with_sizes", "unfold", "diagonal", "view_as_real", "view_as_complex"}
_MOVEMENT = _VIEWS.union(_MOVEMENT_NAMES.split())


def moves_data(node: fx.Node) -> bool:
    """Whether the node only moves data or computes with integers: run twice, it gives the same bits twice."""
    return _MOVEMENT.issuperset(info(node).aten) or is_integer(node)


def is_integer(node: fx.Node) -> bool:
    """Whether all tensors that the node reads and makes hold integers or booleans."""
    tensors = tensors_in([info(node).value, *(info(arg).value for arg in node.all_input_nodes)])
    return all(not t.dtype.is_floating_point and not t.dtype.is_complex for t in tensors)


def is_view(notes: NodeInfo) -> bool:
    """Whether a node's result is memory of an operand: no contents are read to make it."""
    return bool(notes.storages) and notes.storages <= notes.reads and not notes.writes and _VIEWS.issuperset(notes.aten)


__all__ = ["is_integer", "is_view", "moves_data"]
