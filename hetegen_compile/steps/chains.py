"""Chains: launches of a step that follow each other with nothing of the host or of another stream between them.

An accelerator may issue a chain launch by launch, or record it once and have all of it issued by a single call, as a
CUDA graph is. That needs launches which are the same in each step but for what their tensors hold:

- no size among their arguments and results varies (attention to a cache that grows is launched by itself),
- no result outlives the step, for the next step's would be written over it,
- results are small, for each of them keeps memory of its own,
- none of them waits for the device, which nothing can while it is recorded.

Before:                                          After:

    a = launch(op_1, segment, (x, y))                def chain_1(_given):
    b = a[0]                                             x, y, w = _given; _given.clear()
    c = launch(op_2, linear, (b, w))                     a = launch(op_1, segment, (x, y))
                                                         del x, y
                                                         b = a[0]
                                                         c = launch(op_2, linear, (b, w))
                                                         return (c,)

                                                     _given = [x, y, w]; del x, y
                                                     (c,) = launch_chain(chain_1, _given)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import info
from hetegen_compile.passes.lower import CompiledSegment
from hetegen_compile.passes.tensors import symbols_of, tensor_bytes, tensors_in
from hetegen_compile.steps.step_source import StepSource

RESULT_BYTES = 256 << 10
"""Results of one launch that are not small any more: decode steps of a few sequences have less, prompts have more."""

_LAUNCHED = (ir.PARTIAL_LINEAR, ir.JOIN, ir.PAD)
_FETCHED = (ir.MIRROR, ir.RESIDENT)


class ChainRules:
    """Which nodes of a schedule can be part of a chain; none unless ``allowed``."""

    def __init__(self, module: fx.GraphModule, *, allowed: bool = True) -> None:
        self._module = module
        self._allowed = allowed
        kept = [node for node in module.graph.nodes if node.op == "output" or node.target == ir.TWIN]
        read = [argument for node in kept for argument in node.all_input_nodes]
        self._written = ir.written_storages(node for node in module.graph.nodes if _on_device(node))
        self._kept = frozenset[int]().union(*(info(node).storages for node in read if _on_device(node)))

    def launches(self, node: fx.Node) -> bool:
        """Whether it is a launch that is the same in each step."""
        notes = info(node)
        if not _on_device(node) or (node.op != "call_module" and node.target not in _LAUNCHED):
            return False
        if not self._allowed or self.passes_on(node) or self._waits(node):
            return False
        if any(info(one).storages & self._kept for one in (node, *filter(self.passes_on, node.users))):
            return False
        arguments = node.all_input_nodes
        if not all(map(_tensors_alone, (node, *arguments))):
            return False
        if any(symbols_of(tensor) for one in (node, *arguments) for tensor in tensors_in(info(one).value)):
            return False
        return sum(int(tensor_bytes(tensor)) for tensor in tensors_in(notes.value)) <= RESULT_BYTES

    def _waits(self, node: fx.Node) -> bool:
        called = self._module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(called, CompiledSegment) and called.waits

    def passes_on(self, node: fx.Node) -> bool:
        """Whether it is its only operand: a join of one part. (An upload may be a view of the host's tensor, which
        nothing may write.)"""
        return node.target == ir.JOIN and len(node.all_input_nodes) == 1 and not info(node).storages & self._written

    def finds(self, node: fx.Node) -> bool:
        """Whether it is a value of the device that is there already, and no launch."""
        return _on_device(node) and (node.target == operator.getitem or self.passes_on(node))

    def written_positions(self, given: Iterable[fx.Node]) -> tuple[int, ...]:
        """Of what a chain is given, the positions of what the step writes in place: here, or through a view later."""
        return tuple(i for i, node in enumerate(given) if info(node).storages & self._written)


class ChainLines:
    """Lines on their way into the step's text: those of launches that follow each other become chains.

    What a node between them only looks up is looked up before them.
    """

    def __init__(self, source: StepSource, rules: ChainRules, dying: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
        self._source = source
        self._rules = rules
        self._dying = dying
        self._lines: dict[fx.Node, str] = {}
        self._launched: list[fx.Node] = []
        self._made: set[fx.Node] = set()

    def add(self, node: fx.Node, line: str) -> None:
        """One more node of the schedule, in order."""
        if self._rules.launches(node):
            self._launched.append(node)
            self._lines[node] = line
        elif self._rules.finds(node) and any(one in self._lines for one in node.all_input_nodes):
            self._lines[node] = line
        else:
            if not self._may_precede(node):
                self._end()
            self._source.add(line)
            if node.op != "output":
                self._source.add(self._dropped(node))

    def _may_precede(self, node: fx.Node) -> bool:
        """Whether its line only finds a value that was there before the launches, and drops nothing they are given."""
        found = node.op in ("placeholder", "get_attr") or node.target in _FETCHED or self._rules.finds(node)
        if not found:
            return False
        read = {one for launched in self._lines for one in launched.all_input_nodes}
        return read.isdisjoint(self._dying.get(node, ()))

    def _end(self) -> None:
        if not self._launched:
            return
        nodes = list(self._lines)
        given = list(dict.fromkeys(one for node in nodes for one in node.all_input_nodes if one not in self._lines))
        dead = {one for node in nodes for one in self._dying.get(node, ())}
        self._source.add_chain(
            self._launched[0].name,
            [text for node in nodes for text in (self._lines[node], self._dropped(node)) if text],
            [node.name for node in given],
            [node.name for node in nodes if node not in dead],
            dying=[node.name for node in given if node in dead],
            written=self._rules.written_positions(given),
            made=tuple(i for i, node in enumerate(given) if node in self._made),
        )
        self._made.update(nodes)
        self._lines, self._launched = {}, []

    def _dropped(self, node: fx.Node) -> str:
        dead = self._dying.get(node)
        return f"del {', '.join(one.name for one in dead)}" if dead else ""


def _on_device(node: fx.Node) -> bool:
    return info(node).side == "accelerator"


def _tensors_alone(node: fx.Node) -> bool:
    """No numbers, which could be others in the next step."""
    value = info(node).value
    leaves = value if isinstance(value, list | tuple) else [value]
    return len(tensors_in(value)) == len(leaves)


__all__ = ["RESULT_BYTES", "ChainLines", "ChainRules"]
