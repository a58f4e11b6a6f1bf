"""Segments traced on the CPU become segments of the accelerator's device.

Why: the graph was captured from a model on the host, so constructors and ``.to("cpu")`` name the CPU, and fake
values have its strides (attention's differ between devices). Device constants are replaced, then every
segment is propagated once more in issue order with fakes on the accelerator's device: those are the examples
that it is compiled with. On the emulated accelerator, whose device is the CPU, nothing changes.

Before:

    a = arange(4, device="cpu"); b = x.to("cpu"); c = zeros(2)

After:

    a = arange(4, device="cuda:0"); b = x.to("cuda:0"); c = zeros(2, device="cuda:0")

The propagation also runs where torch has no CUDA: the Python forms that ask for a device guard there (indexing,
``contiguous``, ``copy_``, ``~``) go to their ATen overloads, and attention's softmax to one whose decomposition for
symbolic sizes does not use them. With ``HETEGEN_CHECK_DEVICES=1`` in the environment every schedule of the
emulated accelerator is propagated so for ``cuda:0``, and the result thrown away: a host tensor that reaches a
node of the accelerator is an error at compile time on a machine without one. It costs a fifth of a second for two
layers of a transformer, so it is not always on; the tests do it for all architectures.
"""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from hetegen_compile import ir
from hetegen_compile.errors import ScheduleError
from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import annotate, copy_module, info
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.fold_transforms import Folded
from hetegen_compile.passes.fused_attention import attention_at_any_length
from hetegen_compile.passes.insert_transfers import operand_side
from hetegen_compile.passes.tensors import tensors_in

CHECK_VARIABLE = "HETEGEN_CHECK_DEVICES"
_CUDA = torch.device("cuda", 0)

aten = torch.ops.aten


def retarget_devices(module: fx.GraphModule, context: Context) -> None:
    """Move every segment, and the notes on its values, to the context's device."""
    if context.device.type != "cpu":
        _own_segments(module)
        _retarget(module, context.device)
    elif os.environ.get(CHECK_VARIABLE) == "1":
        check_devices(module)


def check_devices(module: fx.GraphModule) -> None:
    """Propagate a copy of a scheduled graph as if the accelerator were ``cuda:0``.

    Raises:
        ScheduleError: a tensor is used on a device where it is not; names the node and its module.
    """
    copy = copy_module(module)
    _own_segments(copy)
    _retarget(copy, _CUDA)


def _own_segments(module: fx.GraphModule) -> None:
    """Give the schedule copies of its segments: it shares them with the graph that other splits are made from.

    What such a graph occupies is measured on the host's values, and its operations may be repeated on the host.
    """
    for call in module.graph.find_nodes(op="call_module"):
        segment = module.get_submodule(str(call.target))
        if isinstance(segment, fx.GraphModule):
            setattr(module, str(call.target), copy_module(segment))


def _retarget(module: fx.GraphModule, device: torch.device) -> None:
    segments = [module.get_submodule(str(call.target)) for call in module.graph.find_nodes(op="call_module")]
    for segment in segments:
        if isinstance(segment, fx.GraphModule):
            retarget_constants(segment.graph, device)
    mode = _fake_mode(module)
    if mode is not None:
        guards = contextlib.nullcontext() if torch.cuda.is_available() else _GuardFreeAttention()  # type: ignore[no-untyped-call]
        with mode, torch.no_grad(), guards, enable_python_dispatcher():  # for what has no C++ form with symbolic sizes
            _DeviceValues(module, device).propagate()


def retarget_constants(graph: fx.Graph, device: torch.device) -> None:
    """Replace the CPU by ``device`` in the arguments of every node, and give it to constructors without one."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if isinstance(node.target, Folded):
            node.target = node.target.on(device, retarget_constants)
        node.args = tuple(_replaced(argument, node, device) for argument in node.args)
        node.kwargs = {name: _replaced(argument, node, device) for name, argument in node.kwargs.items()}
        if node.op == "call_method" and node.target == "cpu":
            node.target, node.args = "to", (node.args[0], device)
        if node.target in _device_constructors() and node.kwargs.get("device") is None:
            node.kwargs = {**node.kwargs, "device": device}


def _replaced(argument: Any, node: fx.Node, device: torch.device) -> Any:
    if isinstance(argument, torch.device):
        return device if argument.type == "cpu" else argument
    if argument == "cpu" and isinstance(argument, str):
        autocast = getattr(node.target, "__name__", "") == "_enter_autocast"
        return device.type if autocast else device
    return argument


def _fake_mode(module: fx.GraphModule) -> FakeTensorMode | None:
    for node in module.graph.nodes:
        for tensor in tensors_in(info(node).value):
            if isinstance(tensor, FakeTensor):
                return tensor.fake_mode
    return None


class _DeviceValues:
    """Fakes of every value on the device where it is, by propagation in issue order."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._values: dict[fx.Node, Any] = {}
        self._bases: dict[int, Tensor] = {}

    def propagate(self) -> None:
        """Go through the schedule; values of the accelerator are on the device, all others on the host."""
        for node in self._module.graph.nodes:
            if node.target is not operator.getitem:
                self._check(node)
            self._values[node] = self._value(node)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return self._segment(node)
        if node.target is operator.getitem and isinstance(self._values[_first(node)], tuple | list):
            return self._values[_first(node)][node.args[1]]
        value = info(node).value
        if info(node).side != "accelerator" or node.target in _ON_THE_WAY:
            return value
        if node.target == ir.WAIT_ACCELERATOR:
            return [self._fresh(node, one) for one in value]
        return self._fresh(node, value) if isinstance(value, Tensor) else value

    def _check(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            side = operand_side(node, operand)
            if side is None or operand.target in _ON_THE_WAY:
                continue
            expected = self._device.type if side == "accelerator" else "cpu"
            for tensor in tensors_in(self._values[operand]):
                if tensor.device.type != expected:
                    raise ScheduleError(
                        f"retarget_devices: {node.name} ({info(node).module}) runs on {expected} and reads "
                        f"{operand.name} ({info(operand).module}), which is on {tensor.device.type}"
                    )

    def _fresh(self, node: fx.Node, value: Tensor) -> Tensor:
        """A fake of the same geometry; mirrors of one storage share one."""
        if node.target != ir.MIRROR:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self._device)
        key = storage_id(value)
        if key not in self._bases:
            length = value.untyped_storage().nbytes() // value.element_size()
            self._bases[key] = torch.empty(length, dtype=value.dtype, device=self._device)
        base = self._bases[key]
        same_type = base if base.dtype == value.dtype else base.view(value.dtype)
        return same_type.as_strided(value.shape, value.stride(), value.storage_offset())

    def _segment(self, node: fx.Node) -> tuple[Any, ...]:
        segment = self._module.get_submodule(str(node.target))
        assert isinstance(segment, fx.GraphModule)
        inputs = [self._values[arg] for arg in node.args if isinstance(arg, fx.Node)]
        for placeholder, value in zip(segment.graph.find_nodes(op="placeholder"), inputs, strict=True):
            annotate(placeholder, value=value)
        with attention_at_any_length(inputs):  # as it will be compiled: strides of results depend on the kernel
            outputs: tuple[Any, ...] = _SegmentOnDevice(segment, node, self._device).run(*inputs)
        return outputs


_ON_THE_WAY = (ir.PREFETCH, ir.PREFETCH_AHEAD, ir.CARRIED, ir.TO_HOST, ir.TO_ACCELERATOR, ir.RELEASE)
"""Values that nothing reads before a wait. Not ``stage``: what lies in the pinned ring is the host's."""


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


class _SegmentOnDevice(fx.Interpreter):
    """Runs a segment on fakes of the device and leaves each value on its node."""

    def __init__(self, segment: fx.GraphModule, call: fx.Node, device: torch.device) -> None:
        super().__init__(segment, garbage_collect_values=False)
        self.extra_traceback = False
        self._call = call
        self._device = device

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except RuntimeError as error:
            raise ScheduleError(
                f"retarget_devices: {n.name} ({info(n).module}) in {self._call.name} does not run on "
                f"{self._device.type}: {error}"
            ) from error
        annotate(n, value=result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _FUNCTIONS and isinstance(args[0], Tensor):
            return _FUNCTIONS[target](*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _METHODS:
            return _METHODS[target](*args, **kwargs)
        return super().call_method(target, args, kwargs)


class _GuardFreeAttention(TorchDispatchMode):
    """Attention's softmax by its plain form, of the same geometry, where a device guard cannot be had."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten._safe_softmax.default:
            return aten._softmax.default(args[0], args[1], False)
        return func(*args, **(kwargs or {}))


def _contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    result: Tensor = aten.clone(tensor, memory_format=memory_format)
    return result


def _copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    result: Tensor = aten.copy_(tensor, source, non_blocking)
    return result


def index(tensor: Tensor, key: Any) -> Tensor:
    """``tensor[key]`` in ATen operations: integers, slices, None, Ellipsis, index tensors and lists of places."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [k for k in keys if not isinstance(k, Tensor)]:
        place = next(i for i, k in enumerate(keys) if k is Ellipsis)
        taken = sum(k is not None and k is not Ellipsis for k in keys)
        keys[place : place + 1] = [slice(None)] * (tensor.dim() - taken)
    dim = 0
    advanced: list[Tensor | None] = []
    for k in keys:
        tensor, kept, indices = _index_one(tensor, dim, k)
        dim += kept
        advanced += [indices] * kept
    return aten.index(tensor, advanced) if any(i is not None for i in advanced) else tensor


def _index_one(tensor: Tensor, dim: int, key: Any) -> tuple[Tensor, int, Tensor | None]:
    """Apply one index to one dimension; returns the result, how many dimensions it leaves, and an index tensor."""
    if key is None:
        return aten.unsqueeze(tensor, dim), 1, None
    if isinstance(key, slice):
        if key == slice(None):
            return tensor, 1, None
        return aten.slice(tensor, dim, key.start, key.stop, 1 if key.step is None else key.step), 1, None
    if isinstance(key, Tensor):
        return tensor, 1, key
    if isinstance(key, list):  # of fakes only the geometry is wanted, and numbers would ask for a device guard
        fake = torch.empty(len(key), dtype=torch.int64, device=tensor.device)
        return tensor, 1, fake if isinstance(tensor, FakeTensor) else torch.tensor(key, device=tensor.device)
    return aten.select(tensor, dim, key), 0, None


def _write(view: Tensor, value: Any) -> None:
    if isinstance(value, Tensor):
        aten.copy_(view, value)
    else:
        aten.fill_(view, value)


def _set_item(tensor: Tensor, key: Any, value: Any) -> None:
    _write(index(tensor, key), value)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.getitem: index,
    operator.setitem: _set_item,
    operator.invert: aten.bitwise_not,
}
_METHODS: dict[str, Callable[..., Any]] = {"contiguous": _contiguous, "copy_": _copy}
