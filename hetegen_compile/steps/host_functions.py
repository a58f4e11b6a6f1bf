"""What an operation of the host's side of a graph calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hetegen_compile.host_memory.growing import append
from hetegen_compile.ir import info
from hetegen_compile.passes.append_tokens import append_tokens
from hetegen_compile.passes.tensors import tensors_in


def host_function(node: fx.Node) -> Callable[..., Any]:
    """The function or method of a node; one that writes may be called with tensors made in inference mode."""
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
