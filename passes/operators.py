"""Whose operators a graph calls: others than torch's may do what neither a schema nor a fake tensor tells."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket


def only_torchs_operations(module: fx.GraphModule) -> bool:
    """Whether a graph calls no custom operator and no higher-order one."""
    targets = [node.target for one in module.modules() if isinstance(one, fx.GraphModule) for node in one.graph.nodes]
    return not any(
        isinstance(target, HigherOrderOperator)
        or isinstance(target, OpOverload | OpOverloadPacket)
        and _namespace(target) not in _TORCHS
        for target in targets
    )


_TORCHS = ("aten", "prims")


def _namespace(operation: OpOverload[Any, Any] | OpOverloadPacket[Any, Any]) -> str:
    return str(operation).partition(".")[0]


__all__ = ["only_torchs_operations"]
