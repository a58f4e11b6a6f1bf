"""What may be issued while gates are closed: not too much, and nothing that runs for the first time.

Why: a stream takes about a thousand operations. Then whoever issues waits for the device, perhaps with the
interpreter's lock, which the worker needs to open the gate. What runs for the first time at its sizes may load code,
for which the driver waits, too. So attention to a cache that grows, whose sizes are new in each step, is issued when
all gates are open, and so are products with streamed experts, by the numbers of their tokens; everything else of such
a step has the sizes that it had in the step before.

Before:                                          After:

    a = wait_accelerator(u)   # closes a gate        a = wait_accelerator(u)
    q = join([a[0], s], 0)                           q = join([a[0], s], 0)
    y = attention(q, keys)    # keys: [.., n, ..]    c = caught_up(u)          # the worker has sent u: its gate is open
                                                     y = attention(q, keys)
"""

from __future__ import annotations

import operator

import sympy
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.utils import _pytree as pytree

from hetegen_compile import ir
from hetegen_compile.ir import annotate, info
from hetegen_compile.operands import grouped_part
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.resolve_sizes import size_inputs
from hetegen_compile.passes.tensors import symbols_in, symbols_of

LAUNCHES = 256
"""Operations behind a gate that may still be closed; a segment counts as if nothing in it were fused."""

_ISSUED = (ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED, ir.TO_HOST, ir.RELEASE, ir.WAIT, ir.WAIT_ACCELERATOR)
_NOT_ISSUED = (ir.MIRROR, ir.RESIDENT, operator.getitem)


def bound_launches(module: fx.GraphModule, context: Context) -> None:
    """Let the issuing thread catch up wherever too much would lie behind a gate, or something that is new each time."""
    gates, symbols = _ClosedGates(), _Symbols()
    known = frozenset(size_inputs(module.graph)) - context.lengths

    def is_new(node: fx.Node) -> bool:
        return node.target == ir.PARTIAL_GROUPED or not symbols.around(node) <= known

    for node in module.graph.nodes:
        launches = launches_of(node, module)
        if gates.last is not None and launches and (gates.most + launches > LAUNCHES or is_new(node)):
            with module.graph.inserting_before(node):
                annotate(ir.call(module.graph, ir.CAUGHT_UP, (gates.last,)), side="host")
            gates.open(gates.last)
        gates.passes(node, launches)


def sizes_behind_gates(module: fx.GraphModule) -> frozenset[sympy.Symbol]:
    """The sizes that what is issued behind gates depends on: as long as these are the same, nothing of it is new."""
    gates, symbols, found = _ClosedGates(), _Symbols(), set[sympy.Symbol]()
    for node in module.graph.nodes:
        launches = launches_of(node, module)
        if launches and gates.last is not None:
            found |= symbols.around(node)
        gates.passes(node, launches)
    return frozenset(found)


class _ClosedGates:
    """The gates that may be closed at a place of the issue order, and how much is issued behind each."""

    def __init__(self) -> None:
        self._sent: dict[fx.Node, int] = {}
        self._behind: dict[fx.Node, int] = {}

    @property
    def last(self) -> fx.Node | None:
        """The transfer of those that open them which the worker sends last."""
        return max(self._behind, key=self._sent.__getitem__, default=None)

    @property
    def most(self) -> int:
        """Operations behind the one closed first."""
        return max(self._behind.values(), default=0)

    def open(self, sent: fx.Node) -> None:
        """The worker has sent this, and what it sends before."""
        number = self._sent[sent]
        self._behind = {gate: count for gate, count in self._behind.items() if self._sent[gate] > number}

    def passes(self, node: fx.Node, launches: int) -> None:
        """``node`` is issued."""
        self._behind = {gate: count + launches for gate, count in self._behind.items()}
        if node.target == ir.TO_ACCELERATOR and info(node).ahead:
            self._sent[node] = len(self._sent)
        elif node.target == ir.WAIT_ACCELERATOR and node.all_input_nodes[0] in self._sent:
            self._behind[node.all_input_nodes[0]] = 0
        elif node.target == ir.CAUGHT_UP:
            self.open(node.all_input_nodes[0])


class _Symbols:
    """The symbols in the sizes of a graph's values, each looked through once: a segment's many readers ask again."""

    def __init__(self) -> None:
        self._found: dict[fx.Node, set[sympy.Symbol]] = {}

    def around(self, node: fx.Node) -> set[sympy.Symbol]:
        """The symbols in the sizes that a node reads and makes."""
        return set[sympy.Symbol]().union(*map(self._of, (node, *node.all_input_nodes)))

    def _of(self, node: fx.Node) -> set[sympy.Symbol]:
        if node not in self._found:
            leaves = pytree.tree_leaves(info(node).value)
            numbers = symbols_in(leaf for leaf in leaves if isinstance(leaf, py_sym_types))
            self._found[node] = numbers.union(*(symbols_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)))
        return self._found[node]


def launches_of(node: fx.Node, module: fx.GraphModule) -> int:
    """Operations that a node issues to a stream, at most."""
    if node.op == "call_module":
        inner = module.get_submodule(str(node.target))
        return sum(one.op.startswith("call") for one in inner.graph.nodes) if isinstance(inner, fx.GraphModule) else 1
    if node.target == ir.PARTIAL_GROUPED:
        return 1 + int(info(grouped_part(node).matrices).value.shape[0])  # zeros, and a product for each expert
    issues = info(node).side == "accelerator" or node.target in _ISSUED
    return int(issues and not info(node).ahead and node.target not in _NOT_ISSUED)


__all__ = ["LAUNCHES", "bound_launches", "launches_of", "sizes_behind_gates"]
