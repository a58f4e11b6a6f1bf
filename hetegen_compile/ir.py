"""The schedule's own operations and the notes that nodes carry. A leaf of the project.

Two-node asynchronous IR: one node starts (``prefetch``, ``to_host``, ``to_accelerator``), one waits
(``wait``, ``wait_host``, ``wait_accelerator``). Activations go either way as lists: what shares a trip is one transfer.
A ``stage`` starts copying rows into the pinned ring; the prefetch that reads them waits for it. A prefetch for the
start of the next step is started by ``prefetch_ahead`` at the end of a step and taken over by ``carried`` in the next.
All of these copy rows (``dim`` 0) or columns (1) of a weight or a ``RECTANGLE`` of it. What is marked ``ahead`` is the
host worker's; ``caught_up`` blocks the issuing thread until the worker has sent a transfer up. The operations are
declared through ``torch.library``, so a scheduled graph can be propagated with fake tensors and, with the kernels given
here, run synchronously as a reference. In a bound schedule they are plain calls of an accelerator and never reach
torch's dispatcher.

A Linear with ``dim`` 0 has a weight [out, in], with ``dim`` 1 one that is stored [in, out] (GPT-2's Conv1D). It is cut
along one ``axis`` of the weight as it is stored, along its rows (0) unless a block says otherwise: parts along the
outputs are columns of the result, put side by side; parts along the inputs are partial sums. Two Linears with
pointwise operations between them are a block: the first is cut by the columns of its result, the second by its inputs,
so what lies between stays where it is (``find_blocks``).

A ``grouped`` product has a matrix of its own for each group of consecutive rows, out of a stack: the experts of a
mixture (``grouped_parts``). The host has the first groups. The others are streamed, and those parts follow each other:
each adds its groups' rows of the result to those of the others. Where groups end the host reads when it issues a part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from hetegen_compile.grouped_parts import first_groups, grouped_rows, whole_grouped
from hetegen_compile.linear_parts import join_parts, linear_rows, pad_parts, whole_linear

Side = Literal["host", "accelerator"]

_META_KEY = "hetegen"

VIEWED_UPLOAD_BYTES = 256 * 1024
"""Up to this size what goes up is read by its consumer where it lies in the host's memory."""
SMALL_UPLOAD_BYTES = 4 << 20
"""Up to this size a kernel reads what goes up, and it does not queue behind prefetches, which are up to 16 MiB each.

The kernel keeps the accelerator for as long as the bytes take, and nothing else waits for them there.
"""

GENERATOR = -1
"""The state of torch's random generator, as a storage: who draws reads and writes it, so draws keep their order."""


INPUT_OPS = ("placeholder", "get_attr")
"""``Node.op`` of what a graph is given and does not make."""


@dataclass(frozen=True)
class NodeInfo:
    """What the compiler knows about one node; survives copying of the graph.

    Attributes:
        value: the fake result (a tensor, a number or SymInt, or a tuple of them).
        storages: storages of the result's tensors.
        reads: storages of the tensors among the arguments.
        writes: storages that the node writes in place (``GENERATOR`` for one that draws random numbers).
        aten: names of the ATen operations it runs.
        random: draws random numbers.
        data_dependent: its result's shape or value (``item``) depends on data.
        rebinds: it lets a tensor that is there lie in another storage (``x.data = y``).
        flops: floating-point operations (torch.utils.flop_counter's formulas), a sympy expression.
        traffic_bytes: bytes read and written by compute operations, a sympy expression.
        made_bytes: bytes of all tensors that its ATen operations make, results included, a sympy expression.
        module: dotted path of the module it comes from.
        position: place in program order.
        side: where it runs, once that has been decided.
        ahead: it is the host worker's, given to it before its operands are there (``issue_ahead``).
        autocast: what the program itself has CPU autocast cast to there, "off" where it switches it off; None: as the
            caller has it.
    """

    value: Any = None
    storages: frozenset[int] = frozenset()
    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    aten: tuple[str, ...] = ()
    random: bool = False
    data_dependent: bool = False
    rebinds: bool = False
    flops: sympy.Expr = sympy.Integer(0)
    traffic_bytes: sympy.Expr = sympy.Integer(0)
    made_bytes: sympy.Expr = sympy.Integer(0)
    module: str = ""
    position: int = -1
    side: Side | None = None
    ahead: bool = False
    autocast: torch.dtype | Literal["off"] | None = None


_NOTHING = NodeInfo()


def info(node: fx.Node) -> NodeInfo:
    """The notes on ``node`` (empty ones if it has none yet)."""
    found: NodeInfo = node.meta.get(_META_KEY, _NOTHING)
    return found


def annotate(node: fx.Node, base: NodeInfo | None = None, **changes: Any) -> fx.Node:
    """Set the notes on ``node``: those of ``base`` (default: its own) with ``changes``."""
    notes = base if base is not None else info(node)
    node.meta[_META_KEY] = _changed(notes, changes) if changes else notes
    return node


def _changed(notes: NodeInfo, changes: dict[str, Any]) -> NodeInfo:
    """``dataclasses.replace`` at a sixth of its time: planning a deep model asks for it some hundred thousand times."""
    changed = object.__new__(NodeInfo)
    vars(changed).update(vars(notes))
    vars(changed).update(changes)
    if len(vars(changed)) != len(vars(notes)):
        raise TypeError(f"no such notes: {sorted(changes.keys() - vars(notes).keys())}")
    return changed


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's result is a single tensor."""
    return isinstance(info(node).value, Tensor)


def written_storages(nodes: Iterable[fx.Node]) -> frozenset[int]:
    """Storages that some of the nodes write in place."""
    return frozenset[int]().union(*(info(node).writes for node in nodes))


def writers_of(nodes: Iterable[fx.Node]) -> dict[int, list[fx.Node]]:
    """For each storage that some of the nodes write in place, those that do, in order."""
    found: dict[int, list[fx.Node]] = {}
    for node in nodes:
        for key in info(node).writes:
            found.setdefault(key, []).append(node)
    return found


def makers_of(nodes: Iterable[fx.Node]) -> dict[int, fx.Node]:
    """The first node of each storage: the input that brings it, or what made it."""
    found: dict[int, fx.Node] = {}
    for node in nodes:
        for key in info(node).storages:
            found.setdefault(key, node)
    return found


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with the notes on its nodes copied; parameters and submodules are shared."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copy_node(graph, node, copies.__getitem__)
    return lazy_module(module, graph)


def copy_node(graph: fx.Graph, node: fx.Node, operand: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """``graph.node_copy``; arguments are set after the node was made, as ``call`` does."""
    copy = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    set_args(copy, fx.map_arg(node.args, operand))
    if node.kwargs:
        copy.kwargs = fx.map_arg(node.kwargs, operand)
    copy.meta.update(node.meta)
    return copy


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """A call of one of the operations below at the graph's place of insertion.

    The arguments are set after the node was made: ``create_node`` looks through those that it is given for symbolic
    numbers, which takes longer than everything else that it does. A schedule has thousands of nodes.
    """
    node = graph.create_node("call_function", target, name=_node_name(target))
    set_args(node, args)
    return node


def set_args(node: fx.Node, args: tuple[Any, ...]) -> None:
    """``node.args = args`` without what assigning any attribute does: the graph's index by ``op`` and ``target``, which
    stay as they are, is made anew."""
    fx.Node.args.fset(node, args)  # type: ignore[attr-defined]


@lru_cache
def _node_name(target: Any) -> str:
    """What ``create_node`` would take for the name, which it makes anew each time."""
    return re.sub(r"\W", "_", str(target.__name__))


def lazy_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that generates its Python code when it is first called: most copies never are."""
    module: fx.GraphModule = _LazyGraphModule(root, graph)
    return module


def erase_dead_nodes(graph: fx.Graph) -> None:
    """Erase computing nodes that nothing reads and that write nothing.

    Not ``Graph.eliminate_dead_code``: that takes in-place methods (``index_copy_``) for pure.
    """
    for node in reversed(graph.nodes):
        kept = node.op in ("placeholder", "output") or node.is_impure() or info(node).writes or info(node).random
        if not node.users and not kept:
            graph.erase_node(node)


# ---- the operations --------------------------------------------------------------------------------------

_library = torch.library.Library("hetegen", "DEF")

_SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias, int dim) -> Tensor",
    "grouped": "(Tensor x, Tensor stack, Tensor ends, int dim, str product) -> Tensor",
    "mirror": "(Tensor host) -> Tensor",
    "resident": "(Tensor weight, int lo, int hi) -> Tensor",
    "stage": "(Tensor weight, int[] ranges, int dim, int offset, Tensor[] after) -> Tensor",
    "prefetch": "(Tensor weight, int[] ranges, int dim, int offset, Tensor[] after) -> Tensor",
    "prefetch_ahead": "(Tensor weight, int[] ranges, int dim, int offset, Tensor[] after) -> Tensor",
    "carried": "(Tensor weight, int[] ranges, int dim, int offset) -> Tensor",
    "wait": "(Tensor transfer) -> Tensor",
    "release": "(Tensor transfer) -> Tensor",
    "to_host": "(Tensor[] xs) -> Tensor[]",
    "wait_host": "(Tensor[] transfer) -> Tensor[]",
    "to_accelerator": "(Tensor[] xs) -> Tensor[]",
    "wait_accelerator": "(Tensor[] transfer) -> Tensor[]",
    "caught_up": "(Tensor[] transfer) -> ()",
    "host_linear": "(Tensor x, Tensor weight, Tensor? bias, int lo, int hi, int dim, int axis=0) -> Tensor",
    "partial_linear": "(Tensor x, Tensor rows, Tensor? bias, int lo, int hi, int dim, int axis=0) -> Tensor",
    "host_grouped": "(Tensor x, Tensor stack, Tensor ends, int hi, int dim, str product) -> Tensor",
    "partial_grouped": "(Tensor x, Tensor matrices, Tensor ends, Tensor? others, int lo, int dim) -> Tensor",
    "join": "(Tensor[] parts, int dim) -> Tensor",
    "pad": "(Tensor x, Tensor[] parts, int[] starts, int columns) -> Tensor",
    "write_back": "(Tensor(a!) host, Tensor value) -> ()",
    "twin": "(Tensor host, Tensor mirror) -> ()",
}


RECTANGLE = 2
"""In the place of ``dim``: ranges of a prefetch that are [first row, end row, first column, end column]."""


def _copy_ranges(weight: Tensor, ranges: list[int], dim: int, offset: int, after: list[Tensor]) -> Tensor:
    if dim == RECTANGLE:
        first, end, left, right = ranges
        return weight[first:end, left:right].clone()
    pieces = [weight.narrow(dim, lo, hi - lo) for lo, hi in zip(ranges[::2], ranges[1::2], strict=True)]
    return torch.cat(pieces, dim=dim)


def _carried(weight: Tensor, ranges: list[int], dim: int, offset: int) -> Tensor:
    return _copy_ranges(weight, ranges, dim, offset, [])


def _host_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int, axis: int = 0) -> Tensor:
    return linear_rows(x, weight.narrow(axis, lo, hi - lo), bias, lo, hi, dim, axis).clone()


def _partial_linear(x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int, axis: int = 0) -> Tensor:
    return linear_rows(x, rows, bias, lo, hi, dim, axis).clone()


def _write_back(host: Tensor, value: Tensor) -> None:
    host.copy_(value)


_KERNELS = {
    "linear": lambda x, weight, bias, dim: whole_linear(x, weight, bias, dim).clone(),
    "grouped": whole_grouped,
    "mirror": lambda host: host.clone(),
    "resident": lambda weight, lo, hi: weight[lo:hi].clone(),
    "stage": _copy_ranges,
    "prefetch": _copy_ranges,
    "prefetch_ahead": _copy_ranges,
    "carried": _carried,
    "wait": lambda transfer: transfer.clone(),
    "release": lambda transfer: transfer.new_empty(0),
    "to_host": lambda xs: [x.clone() for x in xs],
    "wait_host": lambda transfer: [x.clone() for x in transfer],
    "to_accelerator": lambda xs: [x.clone() for x in xs],
    "wait_accelerator": lambda transfer: [x.clone() for x in transfer],
    "caught_up": lambda transfer: None,
    "host_linear": _host_linear,
    "partial_linear": _partial_linear,
    "host_grouped": first_groups,
    "partial_grouped": grouped_rows,
    "join": lambda parts, dim: join_parts(parts, dim).clone(),
    "pad": pad_parts,
    "write_back": _write_back,
    "twin": lambda host, mirror: None,
}

for _name, _schema in _SCHEMAS.items():
    _library.define(f"{_name}{_schema}")
    _library.impl(_name, _KERNELS[_name], "CompositeExplicitAutograd")

torch.library.register_fake("hetegen::host_grouped")(
    lambda x, stack, ends, hi, dim, product: x.new_empty((x.shape[0], stack.shape[1 + dim]))
)
torch.library.register_fake("hetegen::partial_grouped")(
    lambda x, matrices, ends, others, lo, dim: x.new_empty((x.shape[0], matrices.shape[1 + dim]))
)  # both read where groups end

OPS = torch.ops.hetegen
LINEAR = OPS.linear.default
GROUPED = OPS.grouped.default
MIRROR = OPS.mirror.default
RESIDENT = OPS.resident.default
STAGE = OPS.stage.default
PREFETCH = OPS.prefetch.default
PREFETCH_AHEAD = OPS.prefetch_ahead.default
CARRIED = OPS.carried.default
WAIT = OPS.wait.default
RELEASE = OPS.release.default
TO_HOST = OPS.to_host.default
WAIT_HOST = OPS.wait_host.default
TO_ACCELERATOR = OPS.to_accelerator.default
WAIT_ACCELERATOR = OPS.wait_accelerator.default
CAUGHT_UP = OPS.caught_up.default
HOST_LINEAR = OPS.host_linear.default
PARTIAL_LINEAR = OPS.partial_linear.default
HOST_GROUPED = OPS.host_grouped.default
PARTIAL_GROUPED = OPS.partial_grouped.default
JOIN = OPS.join.default
PAD = OPS.pad.default
WRITE_BACK = OPS.write_back.default
TWIN = OPS.twin.default

IN_PARTS = (LINEAR, GROUPED)
"""What a schedule computes part by part. Their second operand is a weight, which lies on the host."""
HOST_PARTS = (HOST_LINEAR, HOST_GROUPED)
ACCELERATOR_PARTS = (PARTIAL_LINEAR, PARTIAL_GROUPED)

for _op in (
    STAGE, PREFETCH, PREFETCH_AHEAD, CARRIED, WAIT, RELEASE, TO_HOST, WAIT_HOST, TO_ACCELERATOR, WAIT_ACCELERATOR,
    CAUGHT_UP, WRITE_BACK, TWIN,
):  # fmt: skip
    fx.node.has_side_effect(_op)
