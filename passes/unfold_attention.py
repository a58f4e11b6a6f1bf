"""torch's function for multi-head attention becomes the operations that it is made of.

Why: Dynamo takes ``F.multi_head_attention_forward``, which ``nn.MultiheadAttention`` calls, as one node, and the
Linears in it could not be split. So the function is run on fakes once more and the calls that it makes at torch's
level take its place. Part of the capture: all stages after it see ordinary nodes.

Before:

    a = multi_head_attention_forward(q, k, v, 16, 4, w, b, ..., w_out, b_out); y = a[0]

After:

    w_q, w_kv = w.split([16, 32]); ...; a = scaled_dot_product_attention(...); ...; y = linear(a, w_out, b_out)
"""

from __future__ import annotations

import contextlib
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hetegen_compile.ir import info
from hetegen_compile.passes.resolve_sizes import emit_value, size_inputs
from hetegen_compile.passes.tensors import tensors_in

_FUNCTION = F.multi_head_attention_forward
_NOT_COPIED = ("example_value", "hetegen")


def unfold_attention(graph: fx.Graph) -> bool:
    """Put the parts in the place of every call; whether there was one, in which case new nodes have no notes yet."""
    found = [_unfold(graph, node) for node in graph.find_nodes(op="call_function", target=_FUNCTION)]
    return any(found)


def _unfold(graph: fx.Graph, node: fx.Node) -> bool:
    operands = {id(info(one).value): one for one in node.all_input_nodes}
    arguments, named = fx.map_arg((node.args, node.kwargs), lambda one: info(one).value)
    recorder = _Recorder(node, operands)
    with graph.inserting_before(node), _on_fakes(operands), recorder:
        result = _unwrapped()(*arguments, **named)
    made = tuple(recorder.node_of(item) for item in result)
    for user in list(node.users):
        if user.target is operator.getitem:
            _substitute(user, made[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    _substitute(node, made)
    graph.erase_node(node)
    return True


def _unwrapped() -> Callable[..., Any]:
    """The function without its question whether somebody else (the recorder) takes the call as a whole."""
    names = {**vars(F), "has_torch_function": lambda _: False}
    copy = types.FunctionType(_FUNCTION.__code__, names, argdefs=_FUNCTION.__defaults__)
    copy.__kwdefaults__ = _FUNCTION.__kwdefaults__
    return copy


@contextlib.contextmanager
def _on_fakes(operands: dict[int, fx.Node]) -> Iterator[None]:
    values = [info(node).value for node in operands.values()]
    fake = next(value for value in values if isinstance(value, FakeTensor))
    with torch.inference_mode(False), torch.no_grad(), fake.fake_mode, enable_python_dispatcher():
        yield


def _substitute(node: fx.Node, new: Any) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda one: new if one is node else one)
        user.kwargs = fx.map_arg(user.kwargs, lambda one: new if one is node else one)


class _Recorder(TorchFunctionMode):
    """Makes a node of each call that returns tensors. Kept results keep their identities."""

    def __init__(self, node: fx.Node, operands: dict[int, fx.Node]) -> None:
        super().__init__()
        self._node = node
        self._nodes = dict(operands)
        self._kept: list[Any] = []
        self._sizes = size_inputs(node.graph)

    def node_of(self, value: Any) -> Any:
        """The node of a tensor or a size; anything else is itself."""
        if isinstance(value, Tensor):
            return self._nodes[id(value)]
        is_size = isinstance(value, py_sym_types)
        return emit_value(self._node.graph, value, self._sizes) if is_size else value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if tensors_in(result):
            self._kept.append(result)
            self._note(result, self._call(func, args, kwargs or {}))
        return result

    def _call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> fx.Node:
        graph = self._node.graph
        operands, named = pytree.tree_map(self.node_of, (tuple(args), dict(kwargs)))
        name = func.__name__
        if name == "__get__":
            node = graph.call_function(getattr, (operands[0], func.__self__.__name__))  # type: ignore[attr-defined]
        elif name == "__getitem__":
            node = graph.call_function(operator.getitem, operands)
        elif getattr(Tensor, name, None) is func:
            node = graph.call_method(name, operands, named)
        else:
            node = graph.call_function(func, operands, named)
        return self._from_there(node)

    def _note(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._nodes[id(result)] = node
            return
        for position, item in enumerate(result):
            if isinstance(item, Tensor):
                picked = self._node.graph.call_function(operator.getitem, (node, position))
                self._nodes[id(item)] = self._from_there(picked)

    def _from_there(self, node: fx.Node) -> fx.Node:
        node.meta = {key: value for key, value in self._node.meta.items() if key not in _NOT_COPIED}
        return node


__all__ = ["unfold_attention"]
