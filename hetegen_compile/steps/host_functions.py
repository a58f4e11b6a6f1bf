"""What an operation of the host's side of a graph calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx

from hetegen_compile.host_memory.growing import append
from hetegen_compile.ir import info
from hetegen_compile.passes.append_tokens import append_tokens
from hetegen_compile.passes.tensors import tensors_in


def host_function(node: fx.Node, instead: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function or method of a node, or ``instead``; one that writes takes tensors made in inference mode.

    Where the program itself enters autocast it is called under autocast: the node is not where the program has it.
    """
    function, autocast = instead or _of_node(node), info(node).autocast
    return function if autocast is None else _under(autocast, function)


def _under(autocast: torch.dtype | Literal["off"], function: Callable[..., Any]) -> Callable[..., Any]:
    dtype = None if autocast == "off" else autocast

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            return function(*args, **kwargs)

    return call


def _of_node(node: fx.Node) -> Callable[..., Any]:
    if node.target is append_tokens:
        return append
    if node.op == "call_method":
        method = str(node.target)
        function: Callable[..., Any] = lambda self, *args, **kwargs: getattr(self, method)(*args, **kwargs)  # noqa: E731
    else:
        assert callable(node.target)
        function = node.target
    return in_place(function) if info(node).writes else function


def in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, in inference mode where it writes a tensor that was made there (torch insists on that)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(tensor.is_inference() for tensor in tensors_in(args)):
            with torch.inference_mode():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


__all__ = ["host_function", "in_place"]
