"""Whose operators a graph calls: others than torch's may do what neither a schema nor a fake tensor tells."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

BY_STRIDES = frozenset({"transformers.grouped_mm_fallback"})
"""Operators of others that read what they are given by its sizes and strides, as torch's do."""


def only_torchs_operations(module: fx.GraphModule, besides: Container[str] = ()) -> bool:
    """Whether a graph calls no custom operator, but those named, and no higher-order one."""
    targets = [node.target for one in module.modules() if isinstance(one, fx.GraphModule) for node in one.graph.nodes]
    return not any(
        isinstance(target, HigherOrderOperator)
        or isinstance(target, OpOverload | OpOverloadPacket)
        and _namespace(target) not in _TORCHS
        and _name(target) not in besides
        for target in targets
    )


_TORCHS = ("aten", "prims")


def _namespace(operation: OpOverload[Any, Any] | OpOverloadPacket[Any, Any]) -> str:
    return str(operation).partition(".")[0]


def _name(operation: OpOverload[Any, Any] | OpOverloadPacket[Any, Any]) -> str:
    return ".".join(str(operation).split(".")[:2])


__all__ = ["BY_STRIDES", "only_torchs_operations"]
