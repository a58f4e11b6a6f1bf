"""Caches that grow are laid out token by token, so that the next token's keys and values need no copy of all others.

Why: ``cat([past, new], -2)`` of [sequences, heads, tokens, width] puts each head's tokens together, and a longer cache
lies otherwise than the one before it: each step copies all of it. With the tokens outermost in memory a longer cache
begins as the shorter one does, and what is new goes behind that, on the host (``host_memory/growing.py``) and on the
accelerator (``append_behind``). Sizes and values are the same, strides do not depend on the length, and Dynamo sees
them when the cache comes back. Caches that came in otherwise (reordered for beams, given) go on as they are, and so do
windows: they are cut from what is put together, at places that strides do not tell, and do not grow for long.

Before:

    keys = cat([past, new], -2)                                # contiguous
    return (..., keys)

After:

    keys = append_tokens(past, new)                            # strides (heads * width, width, sequences * ..., 1)
    return (..., keys)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from hetegen_compile.geometry import token_strides
from hetegen_compile.passes.tensors import tensors_in, to_expr
from hetegen_compile.passes.windows import CACHE_DIMS, TOKENS

_CATS = frozenset({torch.cat, torch.concat, torch.concatenate})
COPIED = "hetegen_copied"
"""Key of a node's ``meta``: why a cache that it makes is copied as it grows."""

_OUTERMOST = (2, 0, 1, 3)
_BACK = (1, 2, 0, 3)


def append_tokens(past: Tensor, new: Tensor) -> Tensor:
    """``cat`` along the tokens, with these outermost in memory; ``past`` may be an empty tensor of one dimension."""
    parts = [past, new] if past.dim() == CACHE_DIMS else [new]
    return torch.cat([part.permute(_OUTERMOST) for part in parts]).permute(_BACK)


class Appending(NamedTuple):
    """A node that was rewritten, the cache that it was given, and what it was."""

    node: fx.Node
    past: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The node as it was inside the block."""
        node = self.node
        appends = node.target, node.args, node.kwargs
        node.target, node.args, node.kwargs = self.target, self.args, self.kwargs
        try:
            yield
        finally:
            node.target, node.args, node.kwargs = appends

    def undo(self, reason: str) -> None:
        """The node as it was."""
        self.node.target, self.node.args, self.node.kwargs = self.target, self.args, self.kwargs
        self.node.meta[COPIED] = reason


def append_in_place(graph: fx.Graph) -> list[Appending]:
    """Rewrite what makes returned caches of given ones (or of none), in a graph that Dynamo has just made."""
    returned = set(graph.output_node().all_input_nodes)
    found = []
    for node in graph.nodes:
        parts = _parts(node) if node.target in _CATS and node in returned else None
        other = None if parts is None else _other_reader(node, parts[0])
        if other is not None:
            node.meta[COPIED] = f"{other.name} reads the shorter one, too"
        elif parts is not None:
            found.append(Appending(node, parts[0], node.target, node.args, dict(node.kwargs)))
            node.target, node.args, node.kwargs = append_tokens, parts, {}
    return found


def lies_by_token(tensor: Tensor) -> bool:
    """Whether a fake tensor is laid out as ``append_tokens`` does."""
    if tensor.dim() != CACHE_DIMS:
        return False
    expected = token_strides([*map(to_expr, tensor.shape)])
    return all(to_expr(stride) == one for stride, one in zip(tensor.stride(), expected, strict=True))


def _other_reader(node: fx.Node, past: fx.Node) -> fx.Node | None:
    """Who else may read the tokens of what a node lengthens (its sizes may be asked for); None: nobody does.

    Behind it there is room for one longer cache. And a reader of the shorter one would often come behind the write to
    the longer one in Inductor's code, for which all of it would be copied.
    """
    if past.meta["example_value"].dim() != CACHE_DIMS:
        return None
    return next(
        (user for user in past.users if user is not node and not _is_size(user.meta.get("example_value"))), None
    )


def _is_size(value: Any) -> bool:
    """Whether a node's result is known to be of sizes; of a write (``x[:n] = past``) Dynamo notes nothing."""
    return value is not None and not tensors_in(value)


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What is given and what is new, if that is what the node puts together."""
    given = dict(node.kwargs)
    parts, *others = node.args or (given.pop("tensors", None),)
    dim = others[0] if others else given.pop("dim", 0)
    if given or len(others) > 1 or not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    past, new = parts
    if not isinstance(past, fx.Node) or not isinstance(new, fx.Node) or dim not in (TOKENS, CACHE_DIMS + TOKENS):
        return None
    given_value, new_value = past.meta.get("example_value"), new.meta.get("example_value")
    if not isinstance(given_value, Tensor) or not isinstance(new_value, Tensor) or new_value.is_quantized:
        return None
    is_given = past.op == "placeholder" and lies_by_token(given_value)
    is_nothing = given_value.dim() == 1 and given_value.shape[0] == 0
    alike = new_value.dim() == CACHE_DIMS and given_value.dtype == new_value.dtype
    return (past, new) if alike and past is not new and (is_given or is_nothing) else None


__all__ = ["COPIED", "Appending", "append_in_place", "append_tokens", "lies_by_token"]
