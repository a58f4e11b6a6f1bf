"""Windows of caches as the captured graph has them: what is returned is cut from the end of what came in and the new.

full = cat([keys, new], -2)           # keys: an input
window = full[:, :, -31:]             # a result, of at most 31 tokens: so are the keys that come next

With ``dynamic=True`` the 31 is a symbol of its own, which is the same in every step.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from hetegen_compile.ir import info, is_tensor
from hetegen_compile.passes.tensors import to_expr

CACHE_DIMS = 4
"""A KV cache is [sequences, heads, tokens, width]."""
TOKENS = -2


def window_of(result: fx.Node) -> sympy.Expr | None:
    """Tokens of a window that is cut from the end of a cache, as ``cache[:, :, -tokens:]``; None: it is not."""
    index: Any = result.args[1] if result.target is operator.getitem and len(result.args) > 1 else None
    if not isinstance(index, tuple) or len(index) != CACHE_DIMS or not isinstance(index[TOKENS], slice):
        return None
    cut = index[TOKENS]
    others = (*index[:TOKENS], *index[TOKENS + 1 :])
    if any(other != slice(None) for other in others) or (cut.stop, cut.step) != (None, None):
        return None
    start = info(cut.start).value if isinstance(cut.start, fx.Node) else cut.start
    if isinstance(start, torch.SymInt):
        return -to_expr(start) if int(start.node.hint) < 0 else None
    return sympy.Integer(-start) if isinstance(start, int) and start < 0 else None


def window_symbols(module: fx.GraphModule) -> set[sympy.Symbol]:
    """The symbols that windows are made of."""
    windows = map(window_of, module.graph.output_node().all_input_nodes)
    return set[sympy.Symbol]().union(*(window.free_symbols for window in windows if window is not None))


def windowed_inputs(module: fx.GraphModule) -> dict[fx.Node, sympy.Expr]:
    """The caches among the inputs that come back as windows, with the tokens of these."""
    found: dict[fx.Node, sympy.Expr] = {}
    for result in module.graph.output_node().all_input_nodes:
        window = window_of(result)
        whole = result.all_input_nodes[0] if window is not None else None
        if window is not None and whole is not None and whole.target is torch.cat:
            given = [node for node in whole.all_input_nodes if node.op == "placeholder" and is_tensor(node)]
            found.update(dict.fromkeys(given, window))
    return found


__all__ = ["CACHE_DIMS", "TOKENS", "window_of", "window_symbols", "windowed_inputs"]
