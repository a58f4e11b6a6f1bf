"""Segments traced on the CPU become segments of the accelerator's device.

Why: the graph was captured from a model on the host, so constructors and ``.to("cpu")`` name the CPU, and fake
values have its strides (attention's differ between devices). Device constants are replaced, then every
segment is propagated once more in issue order with fakes on the accelerator's device: those are the examples
that it is compiled with. On the emulated accelerator, whose device is the CPU, nothing changes.

Before:

    a = arange(4, device="cpu"); b = x.to("cpu"); c = zeros(2)

After:

    a = arange(4, device="cuda:0"); b = x.to("cuda:0"); c = zeros(2, device="cuda:0")

The propagation also runs where torch has no CUDA: the Python forms that ask for a device guard there
(indexing, ``contiguous``, ``copy_``) go to their ATen overloads.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._device import _device_constructors

from hetegen_compile import ir
from hetegen_compile.ir import annotate, info
from hetegen_compile.passes.capture import storage_id, tensors_in
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.fold_transforms import Folded

aten = torch.ops.aten


def retarget_devices(module: fx.GraphModule, context: Context) -> None:
    """Move every segment, and the notes on its values, to the context's device."""
    if context.device.type == "cpu":
        return
    segments = [module.get_submodule(str(call.target)) for call in module.graph.find_nodes(op="call_module")]
    for segment in segments:
        if isinstance(segment, fx.GraphModule):
            retarget_constants(segment.graph, context.device)
    mode = _fake_mode(module)
    if mode is not None:
        with mode, torch.no_grad():
            _DeviceValues(module, context.device).propagate()


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
    """Fakes on the accelerator's device for every value there, by propagation in issue order."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._values: dict[fx.Node, Any] = {}
        self._bases: dict[int, Tensor] = {}

    def propagate(self) -> None:
        for node in self._module.graph.nodes:
            if node.op == "call_module":
                self._values[node] = self._segment(node)
            elif node.target is operator.getitem and node.args[0] in self._values:
                self._values[node] = self._values[node.args[0]][node.args[1]]
            elif info(node).side == "accelerator" and isinstance(info(node).value, Tensor):
                self._values[node] = self._fresh(node, info(node).value)

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
        inputs = [self._values.get(arg, info(arg).value) for arg in node.args if isinstance(arg, fx.Node)]
        for placeholder, value in zip(segment.graph.find_nodes(op="placeholder"), inputs, strict=True):
            annotate(placeholder, value=value)
        outputs: tuple[Any, ...] = _SegmentOnDevice(segment, garbage_collect_values=False).run(*inputs)
        return outputs


class _SegmentOnDevice(fx.Interpreter):
    """Runs a segment on fakes of the device and leaves each value on its node."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        annotate(n, value=result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem and isinstance(args[0], Tensor):
            return index(args[0], args[1])
        if target is operator.setitem and isinstance(args[0], Tensor):
            return _write(index(args[0], args[1]), args[2])
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "contiguous" and not kwargs:
            return args[0] if args[0].is_contiguous() else aten.clone(args[0], memory_format=torch.contiguous_format)
        if target == "copy_":
            return aten.copy_(*args, **kwargs)
        return super().call_method(target, args, kwargs)


def index(tensor: Tensor, key: Any) -> Tensor:
    """``tensor[key]`` in ATen operations: integers, slices, None, Ellipsis and index tensors."""
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
    return aten.select(tensor, dim, key), 0, None


def _write(view: Tensor, value: Any) -> None:
    if isinstance(value, Tensor):
        aten.copy_(view, value)
    else:
        aten.fill_(view, value)
