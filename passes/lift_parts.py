"""Parts of stored weights that Linears read become inputs of the graph by themselves.

Why: a Linear is split if its weight is a whole, contiguous input. Programs also read a row range of a packed parameter
(``nn.MultiheadAttention``'s ``in_proj_weight``, a fused qkv), one matrix of a stack, or a parameter that is stored
column-major. Each of these is a contiguous matrix in the parameter's storage, perhaps stored [in, out], so it is a
weight like any other once the graph is given it. No bytes are copied: the parts are views of the parameter, made anew
at each call. Part of the capture, since what the graph is given is known once.

Before:

    q, k, v = w.chunk(3); y = linear(x, q)             z = linear(x, u)         # u [out, in] with strides (1, out)

After (``w_0 = w[0:n]`` and ``u_0 = u.t()`` are inputs behind all others):

    y = linear(x, w_0)                                 z = linear(x, u_0.t())
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hetegen_compile.ir import copy_module, erase_dead_nodes, info, is_tensor, written_storages
from hetegen_compile.passes.capture import propagate
from hetegen_compile.passes.movement import is_view
from hetegen_compile.passes.normalise_linears import made_of_weights, match_linear, untransposed


@dataclass(frozen=True)
class WeightPart:
    """A contiguous part of an input.

    Attributes:
        base: position of the input.
        shape, stride: of the part; a bias has one dimension.
        offset: of its first element from the input's first, in elements.
    """

    base: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, inputs: Sequence[Any]) -> Tensor:
        """The part of this call's input, which has its version; of a parameter it is one."""
        base: Tensor = inputs[self.base]
        part = base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)
        return nn.Parameter(part, requires_grad=False) if isinstance(base, nn.Parameter) else part


def with_parts(inputs: Sequence[Any], parts: Sequence[WeightPart]) -> Sequence[Any]:
    """The inputs of a graph whose ``parts`` were lifted, from those that the caller gives."""
    if not parts:
        return inputs
    with torch.no_grad():
        return (*inputs, *(part.of(inputs) for part in parts))


def lift_parts(
    module: fx.GraphModule, inputs: Sequence[Any], weights: Collection[str], mode: FakeTensorMode
) -> tuple[fx.GraphModule, tuple[WeightPart, ...]]:
    """Make the parts of ``weights`` (names of placeholders) that Linears read inputs behind those that there are.

    Args:
        module: annotated by ``capture``; not changed, since Dynamo calls what it gets with what its graph asks for.
        inputs: the real inputs.
        mode: what ``capture`` returned.

    Returns:
        An annotated copy with the new placeholders, and their parts in this order, which ``with_parts`` makes at each
        call; ``module`` itself and nothing if no part is read.
    """
    lifted = copy_module(module)
    parts = _Lifter(lifted.graph, weights).lift()
    if not parts:
        return module, ()
    erase_dead_nodes(lifted.graph)
    propagate(lifted, with_parts(inputs, parts), mode)
    return lifted, parts


class _Lifter:
    def __init__(self, graph: fx.Graph, weights: Collection[str]) -> None:
        self._graph = graph
        self._inputs = graph.find_nodes(op="placeholder")
        self._made_of_weights = made_of_weights(graph.nodes, weights)
        written = written_storages(graph.nodes)
        self._bases = {
            node: i for i, node in enumerate(self._inputs) if node.name in weights and is_tensor(node)
            and not info(node).storages & written
        }  # fmt: skip
        self._lifted: dict[WeightPart, fx.Node] = {}

    def lift(self) -> tuple[WeightPart, ...]:
        for node in list(self._graph.nodes):
            match = match_linear(node)
            if match is None or match.is_scaled or match.x in self._made_of_weights:
                continue
            if self._lift(node, match.weight, dims=2) and match.bias is not None:
                self._lift(node, match.bias, dims=1)
        return tuple(self._lifted)

    def _lift(self, reader: fx.Node, operand: fx.Node, *, dims: int) -> bool:
        """Give ``reader`` the part that ``operand`` is of a weight; whether it reads a part or an input now."""
        root, _ = untransposed(operand)
        if root in self._bases and info(root).value.dim() == dims and info(root).value.is_contiguous():
            return True
        base, value = self._base(operand), info(operand).value
        if base is None or not _is_fixed(value, info(base).value) or value.dim() != dims or not value.numel():
            return False
        flipped = not value.is_contiguous()
        stored = value.t() if flipped else value
        if not stored.is_contiguous():
            return False
        part = self._placeholder(base, stored)
        with self._graph.inserting_before(reader):
            new = self._graph.call_function(torch.t, (part,)) if flipped else part
        reader.replace_input_with(operand, new)
        return True

    def _base(self, node: fx.Node) -> fx.Node | None:
        """The weight that a value is a view of and of nothing else, None if there is none."""
        while node not in self._bases:
            sources = [one for one in node.all_input_nodes if info(one).storages]
            if len(sources) != 1 or not is_view(info(node)):
                return None
            node = sources[0]
        return node

    def _placeholder(self, base: fx.Node, stored: Tensor) -> fx.Node:
        shape, stride = tuple(map(int, stored.shape)), tuple(map(int, stored.stride()))
        offset = int(stored.storage_offset()) - int(info(base).value.storage_offset())
        part = WeightPart(self._bases[base], shape, stride, offset)
        if part not in self._lifted:
            last = next(reversed(self._lifted.values()), self._inputs[-1])
            with self._graph.inserting_after(last):
                node = self._graph.placeholder(f"{base.name}_part_{len(self._lifted)}")
            node.meta = {key: value for key, value in base.meta.items() if key == "grapharg"}
            node.meta["example_value"] = stored
            self._lifted[part] = node
        return self._lifted[part]


def _is_fixed(value: Tensor, base: Tensor) -> bool:
    """Whether both are of known sizes and of one dtype."""
    return value.dtype == base.dtype and _are_numbers(_geometry(value)) and _are_numbers(_geometry(base))


def _geometry(value: Tensor) -> tuple[Any, ...]:
    return (*value.shape, *value.stride(), value.storage_offset())


def _are_numbers(sizes: Iterable[Any]) -> bool:
    return all(type(size) is int for size in sizes)


__all__ = ["WeightPart", "lift_parts", "with_parts"]
