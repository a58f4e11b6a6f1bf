"""What runs inside a functorch transform (``vmap``, ``grad``, ``jvp``) becomes one node.

Why: between the nodes that enter and leave a transform, values are wrappers of tensors: they have no storage, mean
nothing outside, and the nodes must run together and in order. Models use ``vmap`` in mask functions and, through
``associative_scan``, in recurrences.

Before:

    e = _vmap_increment_nesting(3, "error"); a = _add_batch_dim(x, 0, 1)
    b = mul(a, 2); c = _remove_batch_dim(b, 1, 3, 0); d = _vmap_decrement_nesting()

After:

    c = transform(x)                # a ``Folded``: the five nodes
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._C import _functorch

_ENTER = "_increment_nesting"
_LEAVE = "_decrement_nesting"


class Folded:
    """Several nodes as one function of the values that they read.

    Attributes:
        module: the nodes; returns one value, or a tuple where several are read outside.
    """

    __name__ = "transform"

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._on: dict[torch.device, Folded] = {}

    def on(self, device: torch.device, retarget: Callable[[fx.Graph, torch.device], None]) -> Folded:
        """The same nodes with their device constants changed; the same object each time."""
        if device not in self._on:
            graph = fx.Graph()
            graph.output(graph.graph_copy(self.module.graph, {}))
            retarget(graph, device)
            self._on[device] = Folded(fx.GraphModule(self.module, graph))
        return self._on[device]

    def __call__(self, *args: Any) -> Any:
        """Run the nodes; an error inside leaves no transform entered."""
        depth = _functorch.get_dynamic_layer_stack_depth()
        try:
            return self.module.forward(*args)
        except BaseException:
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
            raise


def fold_transforms(module: fx.GraphModule) -> None:
    """Replace each outermost run of nodes inside a transform by one call of a ``Folded``; equal runs share it."""
    known: dict[str, Folded] = {}
    for run in _runs(module.graph):
        _fold(module, run, known)
    if known:
        module.recompile()


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    """Nodes from each outermost entry to its exit, both included."""
    runs: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name.endswith(_ENTER):
            depth += 1
            if depth == 1:
                runs.append([])
        if depth and node.op != "placeholder":
            runs[-1].append(node)
        depth -= name.endswith(_LEAVE)
    return runs


def _fold(module: fx.GraphModule, run: list[fx.Node], known: dict[str, Folded]) -> None:
    inside = set(run)
    inputs = list(dict.fromkeys(arg for node in run for arg in node.all_input_nodes if arg not in inside))
    outputs = [node for node in run if any(user not in inside for user in node.users)]
    folded = _folded(module, run, inputs, outputs)
    code = folded.module.code
    folded = known.setdefault(f"{code} {id(folded)}" if _has_attributes(run) else code, folded)
    with module.graph.inserting_after(run[-1]):
        call = module.graph.call_function(folded, tuple(inputs))
    call.meta = dict(run[-1].meta)
    _replace(module.graph, call, outputs, inside)
    for node in reversed(run):
        module.graph.erase_node(node)


def _folded(module: fx.GraphModule, run: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> Folded:
    graph = fx.Graph()
    env = {node: graph.placeholder(f"in_{position}") for position, node in enumerate(inputs)}
    for position, node in enumerate(run):
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node]._rename(f"n_{position}")  # equal runs have equal code
    results = tuple(env[node] for node in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return Folded(fx.GraphModule(module, graph))


def _has_attributes(run: list[fx.Node]) -> bool:
    return any(node.op in ("get_attr", "call_module") for node in run)


def _replace(graph: fx.Graph, call: fx.Node, outputs: list[fx.Node], inside: set[fx.Node]) -> None:
    """Let readers outside the run read the call's result."""
    after = call
    for position, node in enumerate(outputs):
        result = call
        if len(outputs) > 1:
            with graph.inserting_after(after):
                result = after = graph.call_function(operator.getitem, (call, position))
        result.meta["example_value"] = node.meta.get("example_value")
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)


__all__ = ["Folded", "fold_transforms"]
