"""Capture: the Dynamo graph with what one propagation of fake tensors tells about every node.

Dynamo's ``example_value`` was made while tracing and says nothing about writes. So the graph is run once
more on fresh fake inputs that alias each other as the real ones do; a dispatch mode listens underneath
and notes, per node, the ATen operations, their FLOPs and bytes, and which storages they wrote.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils.flop_counter import bmm_flop, flop_registry, mm_flop, sdpa_flop_count

from hetegen_compile.errors import UnsupportedModelError
from hetegen_compile.ir import GENERATOR, NodeInfo, annotate, info
from hetegen_compile.passes.copy_before_writes import copy_before_writes
from hetegen_compile.passes.fold_transforms import fold_transforms

FREE_ATEN = frozenset({"view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select"})
FREE_ATEN |= frozenset({"unsqueeze", "squeeze", "detach", "alias", "as_strided", "empty", "split", "unbind"})
"""ATen operations that move no bytes."""
_LOOKUPS = frozenset({"embedding", "index", "index_select", "gather"})
_GROUPED = frozenset({"_grouped_mm", "grouped_mm_fallback"})  # the latter is transformers' operation
_UPDATES = frozenset({"index_copy_", "index_put_", "scatter_", "index_add_"})


def to_expr(value: Any) -> sympy.Expr:
    """A number or SymInt as a sympy expression over the graph's symbols."""
    return value.node.expr if isinstance(value, py_sym_types) else sympy.sympify(value, strict=True)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nest of containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def tensor_bytes(tensor: Tensor) -> sympy.Expr:
    """Bytes of the tensor's elements (not of its storage), a sympy expression."""
    return to_expr(tensor.numel()) * tensor.element_size()


def storage_id(tensor: Tensor) -> int:
    """Identity of the tensor's storage while that is alive."""
    return int(tensor.untyped_storage()._cdata)


class _Listener(TorchDispatchMode):
    """Notes ATen operations with their FLOPs and bytes; ``take`` returns and forgets them.

    A higher-order operation (``flex_attention``, ``cond``) counts as one: what it calls is not listened to.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.take()

    def take(self) -> dict[str, Any]:
        found = dict(getattr(self, "_found", {}))
        self._found: dict[str, Any] = {
            "aten": (), "random": False, "data_dependent": False,
            "flops": sympy.Integer(0), "traffic_bytes": sympy.Integer(0), "made_bytes": sympy.Integer(0),
        }
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            self._add(func.name(), _higher_order_flops(func, args, out), _total_bytes((args, out)), out, args)
        elif func.namespace != "prim":
            name = func.overloadpacket.__name__
            self._found["random"] |= _is_random(func, args, kwargs)
            self._found["data_dependent"] |= _is_data_dependent(func, args)
            self._add(name, _flops(func, args, kwargs, out), _traffic(name, args, out), out, (args, kwargs))
        return out

    def _add(self, name: str, flops: sympy.Expr, traffic_bytes: sympy.Expr, out: Any, operands: Any) -> None:
        self._found["aten"] += (name,)
        self._found["flops"] += flops
        self._found["traffic_bytes"] += traffic_bytes
        self._found["made_bytes"] += _new_bytes(out, operands)


def _traffic(name: str, args: Any, out: Any) -> sympy.Expr:
    """Bytes that one ATen call reads and writes; a lookup or an update touches only the rows that it moves."""
    if name in FREE_ATEN:
        return sympy.Integer(0)
    if name in _LOOKUPS:
        return 2 * _total_bytes(out)
    if name in _UPDATES:
        return 2 * _total_bytes(args[1:])
    if name in _GROUPED and args[0].dim() == 2 and args[1].dim() == 3:
        return _grouped_bytes(args[0], args[1]) + _total_bytes(out)
    return _total_bytes((args, out))


def _grouped_bytes(rows: Tensor, matrices: Tensor) -> sympy.Expr:
    """Bytes that a grouped product reads: no more groups' matrices than there are rows."""
    groups = int(matrices.shape[0])
    read = sympy.Min(groups, to_expr(rows.shape[0]))
    return tensor_bytes(rows) + read * (tensor_bytes(matrices) / groups)


def _total_bytes(value: Any) -> sympy.Expr:
    return sum((tensor_bytes(tensor) for tensor in tensors_in(value)), sympy.Integer(0))


def _new_bytes(out: Any, operands: Any) -> sympy.Expr:
    """Bytes of the tensors of ``out`` that lie in no operand's storage."""
    known = {storage_id(tensor) for tensor in tensors_in(operands)}
    return _total_bytes([tensor for tensor in tensors_in(out) if storage_id(tensor) not in known])


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the call draws random numbers; attention is tagged so even when its dropout is 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return "dropout_p" not in defaults or given.get("dropout_p", defaults["dropout_p"]) != 0.0


def _is_data_dependent(func: Any, args: Any) -> bool:
    """Whether the result's shape or value depends on data; an ``index`` is tagged so, but only masks make it so."""
    if func.overloadpacket.__name__ == "index":
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> sympy.Expr:
    """FLOPs of one ATen call by torch's own formulas.

    The formulas' registry lacks attention's CPU kernel, which counts as attention, and products by groups of rows.
    """
    packet = func.overloadpacket
    if packet in flop_registry:
        return to_expr(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet.__name__.startswith("_scaled_dot_product"):
        return to_expr(_attention_flops(*(tuple(t.shape) for t in args[:3])))
    if packet.__name__ in _GROUPED:
        return to_expr(_grouped_flops(tuple(args[0].shape), tuple(args[1].shape)))
    return sympy.Integer(0)


def _higher_order_flops(func: HigherOrderOperator, args: Any, out: Any) -> sympy.Expr:
    """FLOPs of an operation that is given functions: by torch's formula, or what attention takes (torch before 2.13)."""
    if func in flop_registry:
        return to_expr(flop_registry[func](*args, out_val=out))
    if func.name() == "flex_attention":
        return to_expr(_attention_flops(*(tuple(t.shape) for t in args[:3])))
    return sympy.Integer(0)


def _attention_flops(query: tuple[Any, ...], key: tuple[Any, ...], value: tuple[Any, ...]) -> Any:
    """Each query head against its key head, which several may share (torch before 2.13 counts no shared ones)."""
    batch, heads, _, width = query
    return sdpa_flop_count(query, (batch, heads, key[2], width), (batch, heads, key[2], value[3]))


def _grouped_flops(a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
    """A grouped product multiplies each row (or column) with its group's matrix only: one product over all groups.

    Both operands with groups of their own (three dimensions each) are a batch of products.
    """
    return bmm_flop(a, b) if len(a) == len(b) == 3 else mm_flop(a[-2:], b[-2:])


class _Propagator(fx.Interpreter):
    """Runs the graph on fakes and leaves a ``NodeInfo`` on each node."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, listener: _Listener) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._mode = mode
        self._listener = listener
        self._position = 0

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        operands = [self.env[arg] for arg in n.all_input_nodes]
        reads = tensors_in(operands)
        before = {storage_id(t): t._version for t in reads}
        self._listener.take()
        result = super().run_node(n)
        writes = frozenset(storage_id(t) for t in reads if t._version != before[storage_id(t)])
        found = self._listener.take()
        generator = frozenset({GENERATOR} if found["random"] else ())
        annotate(
            n, NodeInfo(), value=result, position=self._position, module=module_path(n), writes=writes | generator,
            storages=frozenset(map(storage_id, tensors_in(result))), reads=frozenset(before) | generator, **found,
        )
        self._position += 1
        return result


def capture(module: fx.GraphModule, inputs: Sequence[Any]) -> FakeTensorMode:
    """Annotate every node of a Dynamo graph with its ``NodeInfo``.

    Args:
        module: the graph that Dynamo handed to the backend; changed in place.
        inputs: its real inputs, in the order of the placeholders.

    Returns:
        The fake mode (with the shape environment) that the annotations live in.

    Raises:
        UnsupportedModelError: an input is on meta or on a device other than the CPU.
    """
    _drop_side_notes(module.graph)
    _drop_idle_autocast(module.graph)
    fold_transforms(module)
    _bind_python_floats(module)
    mode = _fake_mode(module)
    _check_devices(module, inputs)
    _propagate(module, inputs, mode)
    if copy_before_writes(module.graph):
        _propagate(module, inputs, mode)
    _unify_symbols(module.graph, mode)
    return mode


def _propagate(module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> None:
    fakes = _fake_inputs(module, inputs, mode)
    # the dispatcher in Python: in C++ some composite operations ask for numbers where sizes are symbols (torch 2.11)
    with (
        torch.inference_mode(False), torch.no_grad(), _restored_state(), mode, enable_python_dispatcher(),
        _Listener() as listener,
    ):  # fmt: skip
        _Propagator(module, mode, listener).run(*fakes, enable_io_processing=False)


def _unify_symbols(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Write the costs with the symbols that were left when symbols had turned out to be equal."""
    if mode.shape_env is None:
        return
    unified: dict[sympy.Expr, sympy.Expr] = {}
    for node in graph.nodes:
        found = info(node)
        for cost in (found.flops, found.traffic_bytes):
            if cost.free_symbols and cost not in unified:
                unified[cost] = mode.shape_env.replace(cost)
        if found.flops in unified or found.traffic_bytes in unified:
            flops, traffic = (unified.get(cost, cost) for cost in (found.flops, found.traffic_bytes))
            annotate(node, flops=flops, traffic_bytes=traffic)


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


def _fake_mode(module: fx.GraphModule) -> FakeTensorMode:
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _check_devices(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            continue
        name = source_name(node) or node.name
        if value.device.type == "meta":
            raise UnsupportedModelError(
                f"{name} is on meta and has no values to compute with: load the weights first, or use "
                "hetegen_compile.plan(model, ...) for a plan without running"
            )
        raise UnsupportedModelError(
            f"{name} is on {value.device}; hetegen expects the whole model and its "
            "inputs in host memory and moves what it needs itself: call .to('cpu') on it first"
        )


def _fake_inputs(module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Fresh fakes with the geometry of Dynamo's and the aliasing of the real inputs."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    shared: dict[int, Tensor] = {}
    lies_in = Counter(storage_id(real) for real in inputs if isinstance(real, Tensor))
    for real in inputs:
        if isinstance(real, Tensor) and (real.storage_offset() != 0 or lies_in[storage_id(real)] > 1):
            with mode:
                length = real.untyped_storage().nbytes() // real.element_size()
                shared.setdefault(storage_id(real), torch.empty(length, dtype=real.dtype, device=real.device))
    return [
        _fake_like(node.meta.get("example_value", real), real, mode, shared)
        for node, real in zip(placeholders, inputs, strict=True)
    ]


def _fake_like(example: Any, real: Any, mode: FakeTensorMode, shared: dict[int, Tensor]) -> Any:
    if not isinstance(example, Tensor):
        return example
    if not isinstance(example, FakeTensor):
        return mode.from_tensor(example)
    geometry = (tuple(example.shape), tuple(example.stride()), example.storage_offset())
    key = storage_id(real) if isinstance(real, Tensor) else id(real)
    with mode:
        if key not in shared:
            shared[key] = torch.empty_strided(*geometry[:2], dtype=example.dtype, device=example.device)
            return shared[key]
        base = shared[key]
        same_type = base if base.dtype == example.dtype else base.view(example.dtype)
        return same_type.as_strided(*geometry)


@contextlib.contextmanager
def _restored_state() -> Iterator[None]:
    """Grad and autocast state as before, whatever nodes of the graph set."""
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", autocast[0])
        torch.set_autocast_dtype("cpu", autocast[1])


# ---- where a node comes from -------------------------------------------------------------------------------

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


def _dotted(source: str) -> str:
    """Dynamo's source text less its own words: the root (``self``) and the dictionaries of a module."""
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


__all__ = ["annotate", "capture", "info", "module_path", "source_name", "tensor_bytes", "tensors_in", "to_expr"]
