"""Where a node of Dynamo's graph comes from, in the user's words."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from torch import fx

OWN_MODULE = "hetegen_own_module"
"""The key in ``node.meta`` of what the traced method calls its own module, where that is not ``self``."""

_SOURCE_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_SOURCE_NOISE = frozenset({"_modules", "_parameters", "_buffers"})
_ROOT_NOISE = frozenset({"self", "kwargs", "args", "fn"})
_OF_LOCAL_MODULE = re.compile(r"L\['(\w+)'\]\._(?:modules|parameters|buffers)\[")


def note_own_module(graph: fx.Graph) -> None:
    """Keep on the nodes what the traced method calls its own module, so that their names leave it out.

    That is the one argument that is a module and is not called: of modules that are called, names begin with theirs.
    """
    own = {_given_module(node) for node in graph.find_nodes(op="placeholder")} - {""}
    stacks = (node.meta.get("nn_module_stack") for node in graph.nodes)
    called = {str(next(iter(stack.values()))[0]) for stack in stacks if stack}
    own = {name for name in own if f"L['{name}']" not in called}
    if len(own) == 1:
        for node in graph.nodes:
            node.meta[OWN_MODULE] = next(iter(own))


def source_name(node: fx.Node) -> str:
    """Dotted name of a placeholder as the user knows it (``model.layers.0.self_attn.q_proj.weight``)."""
    return _dotted(_text(_source(node)), node.meta.get(OWN_MODULE, ""))


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward the node was traced in ("" outside of any)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = _dotted(str(list(stack.values())[-1][0]), node.meta.get(OWN_MODULE, ""))
    return "" if path in _ROOT_NOISE else path


def _source(node: fx.Node) -> Any:
    return getattr(node.meta.get("grapharg"), "source", None)


def _text(source: Any) -> str:
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _given_module(node: fx.Node) -> str:
    """The argument of the traced function that is a module and has this tensor; "" if there is none."""
    root = _source(node)
    found = _OF_LOCAL_MODULE.match(_text(root))
    while hasattr(root, "base"):
        root = root.base
    return found[1] if found and getattr(root, "is_input", False) else ""


@lru_cache(maxsize=4096)
def _dotted(source: str, own: str) -> str:
    """Dynamo's source text less its own words: the root (``self``) and the dictionaries of a module.

    Some ten nodes in a row come from one module.
    """
    steps = [a or b or c for a, b, c in _SOURCE_STEP.findall(source)]
    steps = steps[1:] if len(steps) > 1 and steps[0] in (own, *_ROOT_NOISE) else steps
    return ".".join(step for step in steps if step not in _SOURCE_NOISE)


__all__ = ["OWN_MODULE", "module_path", "note_own_module", "source_name"]
