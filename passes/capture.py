"""Capture: the Dynamo graph with what one propagation of fake tensors tells about every node.

Dynamo's ``example_value`` was made while tracing and says nothing about writes. So the graph is run once
more on fresh fake inputs that alias each other as the real ones do; ``AtenListener`` notes, per node, the ATen
operations with their FLOPs and bytes, and the tensors' versions tell which storages it wrote.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.symbol import SymT, symbol_is_type

from hetegen_compile.errors import first_line
from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import GENERATOR, NodeInfo, annotate, info
from hetegen_compile.passes.append_tokens import Appending, append_in_place
from hetegen_compile.passes.aten_listener import AtenListener
from hetegen_compile.passes.context import HostOnlyGraphError
from hetegen_compile.passes.copy_before_writes import copy_before_writes
from hetegen_compile.passes.equal_calls import EqualCalls
from hetegen_compile.passes.fake_inputs import check_devices, fake_inputs, fake_mode
from hetegen_compile.passes.fold_transforms import fold_transforms
from hetegen_compile.passes.operators import BY_STRIDES, only_torchs_operations
from hetegen_compile.passes.return_views import return_views
from hetegen_compile.passes.sources import module_path, source_name
from hetegen_compile.passes.tensors import tensors_in
from hetegen_compile.passes.unfold_attention import unfold_attention
from hetegen_compile.passes.written_caches import inputs_laid_out, sharing, writer_of_caches, writes_in_place

_READ_MEMORY = frozenset({"as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "set_"})

_COSTS = ("flops", "traffic_bytes", "made_bytes")


class _Propagator(fx.Interpreter):
    """Runs the graph on fakes and leaves a ``NodeInfo`` on each node."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, listener: AtenListener) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._mode = mode
        self._listener = listener
        self._calls = EqualCalls(mode)
        self._position = 0
        self._callers = _autocast()

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        operands = [self.env[arg] for arg in n.all_input_nodes]
        reads = tensors_in(operands)
        lay_in, versions = [storage_id(t) for t in reads], [_version(t) for t in reads]
        result, found = self._run(n, reads)
        writes = frozenset(key for key, t, v in zip(lay_in, reads, versions, strict=True) if _version(t) != v)
        writes |= found.pop("writes") & frozenset(lay_in)  # others were made and are gone within the node
        generator = frozenset({GENERATOR} if found["random"] else ())
        annotate(
            n, NodeInfo(), value=result, position=self._position, module=module_path(n), writes=writes | generator,
            storages=frozenset(map(storage_id, tensors_in(result))), reads=frozenset(lay_in) | generator,
            rebinds=lay_in != [storage_id(t) for t in reads], **found,
            autocast=None if _autocast() == self._callers else _autocast(),
        )  # fmt: skip
        self._position += 1
        return result

    def _run(self, node: fx.Node, reads: list[Tensor]) -> tuple[Any, dict[str, Any]]:
        """The node's result and what was heard meanwhile; of calls that are all the same the first one's."""
        key = self._calls.key(node, *self.fetch_args_kwargs_from_env(node))
        again = self._calls.again(key)
        if again is not None:
            return again.result, again.heard
        self._listener.take()  # forgets
        result = super().run_node(node)
        heard = self._listener.take()
        self._calls.note(key, result, heard, reads)
        return result, heard


def _autocast() -> torch.dtype | Literal["off"]:
    """What CPU autocast casts to where this is called."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else "off"


def _version(tensor: Tensor) -> int | None:
    """None of one that was made in inference mode: schemas alone tell of its writes."""
    return None if tensor.is_inference() else tensor._version


def capture(module: fx.GraphModule, inputs: Sequence[Any]) -> FakeTensorMode:
    """Annotate every node of a Dynamo graph with its ``NodeInfo``.

    Args:
        module: the graph that Dynamo handed to the backend; changed in place.
        inputs: its real inputs, in the order of the placeholders.

    Returns:
        The fake mode (with the shape environment) that the annotations live in.

    Raises:
        UnsupportedModelError: an input is on meta or on a device other than the CPU.
        HostOnlyGraphError: it gets or returns nested or sparse tensors.
    """
    _refuse_other_layouts(module.graph)
    _drop_side_notes(module.graph)
    _drop_idle_autocast(module.graph)
    fold_transforms(module)
    _bind_python_floats(module)
    mode = fake_mode(module)
    check_devices(module, inputs)
    _propagate_appending(module, inputs, mode)
    for rewrite in (unfold_attention, copy_before_writes, return_views):
        if rewrite(module.graph):
            module.recompile()
            propagate(module, inputs, mode)
    return mode


def _refuse_other_layouts(graph: fx.Graph) -> None:
    """What a copy to the accelerator, a slot or a mirror is of such a tensor, nothing here knows."""
    ends = [*graph.find_nodes(op="placeholder"), *graph.output_node().all_input_nodes]
    told = other_layout(ends)
    if told is not None:
        raise HostOnlyGraphError(f"{told}, which cannot be offloaded")


def other_layout(nodes: Iterable[fx.Node]) -> str | None:
    """Which of the nodes of Dynamo's graph has a nested or sparse tensor, in words; None: none has."""
    for node in nodes:
        for tensor in tensors_in(node.meta.get("example_value")):
            if tensor.layout != torch.strided:
                kind = str(tensor.layout).removeprefix("torch.")
                return f"{source_name(node) or node.name} is a tensor with the layout {kind}"
    return None


def _propagate_appending(module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> None:
    """Annotate every node, caches that grow laid out token by token unless the program cannot do with these strides."""
    appending = append_in_place(module.graph)
    if not appending:
        return propagate(module, inputs, mode)
    module.recompile()
    try:
        propagate(module, inputs, mode)
        reason = _told_by_strides(module, appending)
        if reason is None and writes_in_place(module.graph):
            reason = _told_by_sharing(module, inputs, mode, appending)
    except Exception as error:  # whatever has nothing to do with strides is raised again below
        reason = f"laid out token by token the program cannot read it ({first_line(error)})"
    if reason is None:
        return None
    for one in appending:
        one.undo(reason)
    module.recompile()
    return propagate(module, inputs, mode)


def _told_by_strides(module: fx.GraphModule, appending: Sequence[Appending]) -> str | None:
    """Why other strides of a cache may change what the program computes or what the caller keeps; None: no reason.

    A write to a longer cache would be one to the shorter one, which the caller may have kept, too. Operators of others
    may read memory.
    """
    writer = writer_of_caches(module.graph, [node for one in appending for node in (one.node, one.past)])
    if writer is not None:
        return f"the program writes a cache in place ({writer.name})"
    reader = next((node.name for node in module.graph.nodes if _READ_MEMORY.intersection(info(node).aten)), None)
    if reader is not None or not only_torchs_operations(module, BY_STRIDES):
        return f"{reader or 'an operator that is not of torch'} may read memory as it lies"
    return None


def _told_by_sharing(
    module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode, appending: Sequence[Appending]
) -> str | None:
    """Why writes in place may go elsewhere than in eager; None: tensors share memory alike. Annotations stay.

    Caches that are given laid out token by token would be contiguous in eager, which had made them by ``cat``.
    """
    given = inputs_laid_out(module.graph)
    notes = {node: info(node) for node in module.graph.nodes if node.op != "output"}
    mine = sharing(module.graph)
    with contextlib.ExitStack() as eager:
        for one in appending:
            eager.enter_context(one.as_it_was())
        module.recompile()
        propagate(module, inputs, mode, given)
        theirs = sharing(module.graph)
    module.recompile()
    for node, base in notes.items():
        annotate(node, base)
    if mine == theirs:
        return None
    first = next(node.name for node, one, other in zip(notes, mine, theirs, strict=True) if one != other)
    return f"the program writes in place, and what shares memory with what depends on how a cache lies ({first})"


def propagate(
    module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode, contiguous: Container[fx.Node] = ()
) -> None:
    """Annotate every node anew by running the graph on fakes of ``inputs``, of which some are to be contiguous."""
    fakes = fake_inputs(module, inputs, mode)
    # the dispatcher in Python: in C++ some composite operations ask for numbers where sizes are symbols (torch 2.11)
    with (
        torch.inference_mode(False), torch.no_grad(), _restored_autocast(), mode, enable_python_dispatcher(),
        AtenListener() as listener,
    ):  # fmt: skip
        for place, node in enumerate(module.graph.find_nodes(op="placeholder")):
            if node in contiguous:
                fakes[place] = torch.empty_like(fakes[place], memory_format=torch.contiguous_format)
        _Propagator(module, mode, listener).run(*fakes, enable_io_processing=False)
    _unify_symbols(module.graph, mode)


def _unify_symbols(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Write the costs with the symbols that were left when symbols had turned out to be equal."""
    if mode.shape_env is None:
        return
    unified = functools.cache(mode.shape_env.replace)
    for node in graph.nodes:
        annotate(node, **{cost: unified(getattr(info(node), cost)) for cost in _COSTS})


def _drop_side_notes(graph: fx.Graph) -> None:
    """Remove calls that only tell torch's telemetry something."""
    for node in list(graph.nodes):
        if not node.users and getattr(node.target, "__name__", "") == "_log_api_usage_once":
            graph.erase_node(node)


def _drop_idle_autocast(graph: fx.Graph) -> None:
    """Remove autocast regions that change nothing: what transformers' rotary embeddings enter, mostly.

    A region that switches autocast off changes something inside one that has it on, the caller's included.
    """
    entered: list[tuple[fx.Node, bool]] = []
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            entered.append((node, bool(node.args[2] if len(node.args) > 2 else True)))
        elif name == "_exit_autocast":
            enter, enabled = entered.pop()
            if not enabled and not torch.is_autocast_enabled("cpu") and not any(on for _, on in entered):
                graph.erase_node(node)
                graph.erase_node(enter)


def _bind_python_floats(module: fx.GraphModule) -> None:
    """Let Dynamo trace again with the values of Python floats that it passed as tensors (``dynamic=True``).

    A float that becomes ``tensor.item()`` would be data from which the propagation must not decide anything.
    """
    items = module.graph.find_nodes(op="call_method", target="item")
    values = [node.meta.get("example_value") for node in items]
    symbols = {s for value in values if isinstance(value, torch.SymFloat) for s in value.node._expr.free_symbols}
    floats = sorted(str(s) for s in symbols if symbol_is_type(s, SymT.FLOAT))
    fresh = [name for name in floats if not TensorifyState.should_specialize(name)]
    for name in fresh:
        TensorifyState.specialize(name)
    if fresh:
        raise TensorifyScalarRestartAnalysis


@contextlib.contextmanager
def _restored_autocast() -> Iterator[None]:
    """Autocast as before, whatever nodes of the graph set. (``no_grad`` does the same for gradients.)"""
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", autocast[0])
        torch.set_autocast_dtype("cpu", autocast[1])


__all__ = ["capture", "propagate"]
