"""Where a node of Dynamo's graph comes from, in the user's words."""

from __future__ import annotations

import re
from functools import lru_cache

from torch import fx

_SOURCE_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_SOURCE_NOISE = frozenset({"_modules", "_parameters", "_buffers"})
_ROOT_NOISE = frozenset({"self", "kwargs", "args", "fn"})


def source_name(node: fx.Node) -> str:
    """Dotted name of a placeholder as the user knows it (``model.layers.0.self_attn.q_proj.weight``)."""
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    name = getattr(source, "name", "") if source is not None else ""
    text = str(name() if callable(name) else name)
    return _dotted(text)


@lru_cache(maxsize=4096)
def _dotted(source: str) -> str:
    """Dynamo's source text less its own words: the root (``self``) and the dictionaries of a module.

    Some ten nodes in a row come from one module.
    """
    steps = [a or b or c for a, b, c in _SOURCE_STEP.findall(source)]
    steps = steps[1:] if len(steps) > 1 and steps[0] in _ROOT_NOISE else steps
    return ".".join(step for step in steps if step not in _SOURCE_NOISE)


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward the node was traced in ("" outside of any)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = _dotted(str(list(stack.values())[-1][0]))
    return "" if path in _ROOT_NOISE else path


__all__ = ["module_path", "source_name"]
