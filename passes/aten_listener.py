"""The ATen operations that a node is made of: their names, FLOPs, bytes, and whether they draw or depend on data.

``writes`` are storages that they write by their schemas or without saying so: not all of it shows in the versions of
fake tensors (lists of tensors, statistics of a norm).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import bmm_flop, flop_registry, mm_flop, sdpa_flop_count

from hetegen_compile.geometry import storage_id
from hetegen_compile.passes.tensors import tensor_bytes, tensors_in, to_expr

FREE_ATEN = frozenset({"view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select"})
FREE_ATEN |= frozenset({"unsqueeze", "squeeze", "detach", "alias", "as_strided", "empty", "split", "unbind"})
"""ATen operations that move no bytes."""
SHAPE_ONLY_ATEN = frozenset({f"{made}_like" for made in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")})
SHAPE_ONLY_ATEN |= frozenset({f"new_{made}" for made in ("empty", "empty_strided", "zeros", "ones", "full")})
"""ATen operations that read no contents of what they are given, only its geometry."""
_LOOKUPS = frozenset({"embedding", "index", "index_select", "gather"})
GROUPED_ATEN = frozenset({"_grouped_mm", "grouped_mm_fallback"})
"""Products of which each group of rows has a matrix of its own; the second is transformers' operation."""
_STATISTICS = ("running_mean", "running_var")
_UPDATES = frozenset({"index_copy_", "index_put_", "scatter_", "index_add_"})


class AtenListener(TorchDispatchMode):
    """Notes ATen operations with their FLOPs and bytes; ``take`` returns and forgets them.

    A higher-order operation (``flex_attention``, ``cond``) counts as one: what it calls is not listened to.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.take()

    def take(self) -> dict[str, Any]:
        found = dict(getattr(self, "_found", {}))
        self._found: dict[str, Any] = {
            "aten": (), "random": False, "data_dependent": False, "writes": frozenset(),
            "flops": sympy.Integer(0), "traffic_bytes": sympy.Integer(0), "made_bytes": sympy.Integer(0),
        }  # fmt: skip
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            self._add(func.name(), _higher_order_flops(func, args, out), _total_bytes((args, out)), out, args)
        elif func.namespace != "prim":
            name = func.overloadpacket.__name__
            self._found["random"] |= _is_random(func, args, kwargs)
            self._found["data_dependent"] |= _is_data_dependent(func, args)
            self._found["writes"] |= frozenset(map(storage_id, _written(func, args, kwargs)))
            self._add(name, _flops(func, args, kwargs, out), _traffic(name, args, out), out, (args, kwargs))
        return out

    def _add(self, name: str, flops: sympy.Expr, traffic_bytes: sympy.Expr, out: Any, operands: Any) -> None:
        self._found["aten"] += (name,)
        self._found["flops"] += flops
        self._found["traffic_bytes"] += traffic_bytes
        self._found["made_bytes"] += _new_bytes(out, operands)


def _traffic(name: str, args: Any, out: Any) -> sympy.Expr:
    """Bytes that one ATen call reads and writes; a lookup or an update touches only the rows that it moves."""
    if name in FREE_ATEN:
        return sympy.Integer(0)
    if name in _LOOKUPS:
        return 2 * _total_bytes(out)
    if name in _UPDATES:
        return 2 * _total_bytes(args[1:])
    if name in GROUPED_ATEN and args[0].dim() == 2 and args[1].dim() == 3:
        return _grouped_bytes(args[0], args[1]) + _total_bytes(out)
    return _total_bytes((args, out))


def _grouped_bytes(rows: Tensor, matrices: Tensor) -> sympy.Expr:
    """Bytes that a grouped product reads: no more groups' matrices than there are rows."""
    groups = int(matrices.shape[0])
    read = sympy.Min(groups, to_expr(rows.shape[0]))
    return tensor_bytes(rows) + read * (tensor_bytes(matrices) / groups)


def _total_bytes(value: Any) -> sympy.Expr:
    return sum((tensor_bytes(tensor) for tensor in tensors_in(value)), sympy.Integer(0))


def _new_bytes(out: Any, operands: Any) -> sympy.Expr:
    """Bytes of the tensors of ``out`` that lie in no operand's storage."""
    known = {storage_id(tensor) for tensor in tensors_in(operands)}
    return _total_bytes([tensor for tensor in tensors_in(out) if storage_id(tensor) not in known])


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the call draws random numbers; attention is tagged so even when its dropout is 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = _given(func, args, kwargs)
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return "dropout_p" not in defaults or given.get("dropout_p", defaults["dropout_p"]) != 0.0


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """What the schema says is written, and statistics that a batch norm in training writes without saying so."""
    given = _given(func, args, kwargs)
    declared = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tensors_in([given.get(name) for name in (*declared, *(_STATISTICS if given.get("training") else ()))])


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name."""
    names: list[str] = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_data_dependent(func: Any, args: Any) -> bool:
    """Whether the result's shape or value depends on data; an ``index`` is tagged so, but only masks make it so."""
    if func.overloadpacket.__name__ == "index":
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> sympy.Expr:
    """FLOPs of one ATen call by torch's own formulas.

    The formulas' registry lacks attention's CPU kernel, which counts as attention, and products by groups of rows.
    """
    packet = func.overloadpacket
    if packet in flop_registry:
        return to_expr(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet.__name__.startswith("_scaled_dot_product"):
        return to_expr(_attention_flops(*(tuple(t.shape) for t in args[:3])))
    if packet.__name__ in GROUPED_ATEN:
        return to_expr(_grouped_flops(tuple(args[0].shape), tuple(args[1].shape)))
    return sympy.Integer(0)


def _higher_order_flops(func: HigherOrderOperator, args: Any, out: Any) -> sympy.Expr:
    """Those of an operation that is given functions: by torch's formula, else attention's (torch before 2.13)."""
    if func in flop_registry:
        return to_expr(flop_registry[func](*args, out_val=out))
    if func.name() == "flex_attention":
        return to_expr(_attention_flops(*(tuple(t.shape) for t in args[:3])))
    return sympy.Integer(0)


def _attention_flops(query: tuple[Any, ...], key: tuple[Any, ...], value: tuple[Any, ...]) -> Any:
    """Each query head against its key head, which several may share (torch before 2.13 counts no shared ones)."""
    batch, heads, _, width = query
    return sdpa_flop_count(query, (batch, heads, key[2], width), (batch, heads, key[2], value[3]))


def _grouped_flops(a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
    """A grouped product multiplies each row (or column) with its group's matrix only: one product over all groups.

    Both operands with groups of their own (three dimensions each) are a batch of products.
    """
    return bmm_flop(a, b) if len(a) == len(b) == 3 else mm_flop(a[-2:], b[-2:])


__all__ = ["FREE_ATEN", "GROUPED_ATEN", "AtenListener"]
