"""Fake inputs of a graph that are as its real ones: on the host, with their geometry and their aliasing."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from hetegen_compile.errors import UnsupportedModelError
from hetegen_compile.geometry import storage_id
from hetegen_compile.passes.sources import source_name


def fake_mode(module: fx.GraphModule) -> FakeTensorMode:
    """The mode that Dynamo traced the graph in."""
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def check_devices(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Refuse inputs that do not lie in host memory.

    Raises:
        UnsupportedModelError: one is on meta or on another device than the CPU.
    """
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


def fake_inputs(module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
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
    if key not in shared:
        shared[key] = another_fake(example, mode)
        return shared[key]
    with mode:
        base = shared[key]
        same_type = base if base.dtype == example.dtype else base.view(example.dtype)
        return same_type.as_strided(*geometry)


def another_fake(example: Tensor, mode: FakeTensorMode) -> FakeTensor:
    """A fake of the same geometry in memory of its own.

    Made as the fake mode makes what it has cached: neither dispatched, which takes longest, nor listened to.
    """
    env = mode.shape_env
    with in_kernel_invocation_manager(mode), env.suppress_guards() if env else contextlib.nullcontext():
        empty = torch.empty_strided(example.size(), example.stride(), dtype=example.dtype, device="meta")
    return FakeTensor(mode, empty, example.device)


__all__ = ["another_fake", "check_devices", "fake_inputs", "fake_mode"]
