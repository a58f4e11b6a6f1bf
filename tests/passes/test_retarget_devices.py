"""Segments of the CPU's graph become segments of a GPU's, propagated with fake CUDA tensors on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hetegen_compile.passes.retarget_devices as retargeting
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import (
    CARRIED,
    HOST_LINEAR,
    JOIN,
    LINEAR,
    MIRROR,
    PARTIAL_LINEAR,
    PREFETCH,
    PREFETCH_AHEAD,
    STAGE,
    TO_HOST,
    annotate,
    copy_module,
    info,
)
from hetegen_compile.passes.carry_prefetches import carry_prefetches
from hetegen_compile.passes.insert_transfers import insert_transfers
from hetegen_compile.passes.retarget_devices import (
    CHECK_VARIABLE,
    check_devices,
    index,
    retarget_constants,
    retarget_devices,
)
from hetegen_compile.passes.schedule import schedule
from hetegen_compile.passes.split_linears import split_linears
from tests.passes.graphs import Case, planned, scheduled

CUDA = torch.device("cuda:0")
A, B = nn.Linear(64, 64), nn.Linear(64, 64)


def attention(x: Tensor) -> Tensor:
    """Constructors, ``.to("cpu")``, indexing, ``contiguous`` and attention between two Linears."""
    q = A(x).view(1, -1, 4, 16).transpose(1, 2)
    place = torch.arange(q.shape[2]).to("cpu") + torch.zeros(1, dtype=torch.int64)
    q = torch.cat([q[..., 8:], q[..., :8]], dim=-1).contiguous() + place[None, None, :, None]
    out = nn.functional.scaled_dot_product_attention(q, q, q)
    result: Tensor = B(out.transpose(1, 2).reshape(1, -1, 64))
    return result


def tensors_of(found: Case) -> list[Tensor]:
    calls = found.module.graph.find_nodes(op="call_module")
    segments = [found.module.get_submodule(str(call.target)) for call in calls]
    nodes = [node for one in segments if isinstance(one, fx.GraphModule) for node in one.graph.nodes]
    return [info(node).value for node in nodes if isinstance(info(node).value, Tensor)]


def test_every_value_of_every_segment_is_on_the_device() -> None:
    found = scheduled(attention, torch.randn(1, 5, 64))
    assert {tensor.device.type for tensor in tensors_of(found)} == {"cpu"}
    retarget_devices(found.module, replace(found.context, device=CUDA))
    assert {tensor.device for tensor in tensors_of(found)} == {CUDA}


def test_the_graph_that_other_splits_are_made_from_stays_the_hosts() -> None:
    found = scheduled(attention, torch.randn(1, 5, 64))
    base = replace(found, module=copy_module(found.module))
    retarget_devices(found.module, replace(found.context, device=CUDA))
    assert {tensor.device for tensor in tensors_of(found)} == {CUDA}
    assert {tensor.device.type for tensor in tensors_of(base)} == {"cpu"}


def test_the_emulated_accelerator_changes_nothing() -> None:
    found = scheduled(attention, torch.randn(1, 5, 64))
    before = [str(node.args) for node in found.module.graph.nodes]
    retarget_devices(found.module, found.context)
    assert [str(node.args) for node in found.module.graph.nodes] == before
    assert {tensor.device.type for tensor in tensors_of(found)} == {"cpu"}


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        ("to", ("cpu",), {}),
        ("to", (torch.device("cpu"), torch.float32), {}),
        ("cpu", (), {}),
        (torch.zeros, (3,), {}),
        (torch.ones, (3,), {"device": "cpu"}),
    ],
)
def test_constants_name_the_device(target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    if isinstance(target, str):
        node = graph.call_method(target, (x, *args), kwargs)  # type: ignore[arg-type]
    else:
        node = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
    retarget_constants(graph, CUDA)
    assert CUDA in (*node.args, *node.kwargs.values())
    assert "cpu" not in str((node.args, node.kwargs))


@pytest.mark.parametrize(
    "key",
    [
        0,
        slice(1, 3),
        (..., None),
        (None, slice(None), 1),
        (..., slice(None, 2)),
        (slice(0, 2), torch.tensor([0, 2])),
        (slice(None), [-2]),
        (..., [0, 1]),
    ],
)
def test_indexing_by_aten_operations_is_indexing(key: object) -> None:
    x = torch.arange(24).reshape(4, 3, 2)
    torch.testing.assert_close(index(x, key), x[key])  # type: ignore[index]


def test_fake_cuda_tensors_are_indexed_without_cuda() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 3, 2, device=CUDA)
        assert index(x, (slice(1, 3), ..., None)).shape == (2, 3, 2, 1)


# ---- every schedule as if the accelerator were a GPU -----------------------------------------------------------


def test_a_schedule_is_checked_for_a_gpu_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scheduled(attention, torch.randn(1, 5, 64))
    first = next(node for node in found.module.graph.nodes if node.op == "call_module")
    first.update_arg(0, found.module.graph.find_nodes(op="placeholder")[0])
    monkeypatch.delenv(CHECK_VARIABLE, raising=False)
    retarget_devices(found.module, found.context)
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    with pytest.raises(ScheduleError, match=f"{first.name} .*runs on cuda and reads .*, which is on cpu"):
        retarget_devices(found.module, found.context)


def test_the_check_leaves_the_schedule_as_it_was() -> None:
    found = scheduled(attention, torch.randn(1, 5, 64))
    before = [str(node.args) for node in found.module.graph.nodes]
    check_devices(found.module)
    assert [str(node.args) for node in found.module.graph.nodes] == before
    assert {tensor.device.type for tensor in tensors_of(found)} == {"cpu"}


@pytest.mark.parametrize("target", [PARTIAL_LINEAR, JOIN, TO_HOST])
def test_a_host_tensor_that_reaches_the_accelerator(target: object) -> None:
    found = scheduled(attention, torch.randn(1, 5, 64))
    reader, host = found.nodes(target)[0], found.module.graph.find_nodes(op="placeholder")[-1]
    reader.replace_input_with(reader.all_input_nodes[0], host)
    with pytest.raises(ScheduleError, match=f"{reader.name} .*runs on cuda and reads {host.name} .*on cpu"):
        check_devices(found.module)


def test_an_accelerator_value_that_reaches_the_host() -> None:
    found = scheduled(attention, torch.randn(1, 5, 64))
    reader = found.nodes(HOST_LINEAR)[-1]
    value = found.nodes(TO_HOST)[0].args[0][0]
    reader.update_arg(0, value)
    with pytest.raises(ScheduleError, match=f"{reader.name} .*runs on cpu and reads {value.name} .*on cuda"):
        check_devices(found.module)


def test_a_host_constant_inside_a_segment_names_the_node() -> None:
    found = scheduled(attention, torch.randn(1, 5, 64))
    call = next(node for node in found.module.graph.nodes if node.op == "call_module")
    segment = found.module.get_submodule(str(call.target))
    assert isinstance(segment, fx.GraphModule)
    node = next(n for n in segment.graph.nodes if n.op == "call_method" and isinstance(info(n).value, Tensor))
    with segment.graph.inserting_after(node):
        mixed = segment.graph.call_function(on_the_host, (node,))
    node.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)
    with pytest.raises(ScheduleError, match=rf"{mixed.name} \(\) in {call.name} does not run on cuda"):
        check_devices(found.module)


def on_the_host(x: Tensor) -> Tensor:
    """Adds a tensor of the host, whose device no argument of a node names."""
    return x + torch.ones(1, 1, 1, 1, device="cpu")


def cached(x: Tensor, past: Tensor) -> Tensor:
    keys = torch.cat([past, A(x).view(1, 4, 1, 16)], dim=2)
    result: Tensor = B(nn.functional.scaled_dot_product_attention(keys[:, :, -1:], keys, keys).reshape(1, 64))
    return result


@pytest.mark.parametrize("symbolic", [True, False])
def test_attention_is_propagated_as_it_will_be_compiled(symbolic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of symbolic length not to cuDNN's kernel: the strides of a result depend on which one it is."""
    seen: list[bool] = []
    run = retargeting._SegmentOnDevice.run

    def noting(self: Any, *inputs: Any) -> Any:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return run(self, *inputs)

    monkeypatch.setattr(retargeting._SegmentOnDevice, "run", noting)
    past = torch.randn(1, 4, 7, 16)
    if symbolic:
        torch._dynamo.mark_dynamic(past, 2)
    found = scheduled(cached, torch.randn(1, 64), past)
    assert any(not isinstance(size, int) for tensor in tensors_of(found) for size in tensor.shape) is symbolic
    check_devices(found.module)
    assert seen
    assert all(seen) is not symbolic
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_padding_to_a_symbolic_length_is_propagated() -> None:
    """As attention of a GPU pads masks to multiples of 16, by an operation whose C++ form takes numbers only."""

    def padded(x: Tensor, past: Tensor) -> Tensor:
        y = A(x).view(1, 4, 1, 16) + past
        y = nn.functional.pad(y, (0, 0, 0, 16 - past.shape[2] % 16))
        result: Tensor = B(y[:, :, -1].reshape(1, 64))
        return result

    past = torch.randn(1, 4, 7, 16)
    torch._dynamo.mark_dynamic(past, 2)
    found = scheduled(padded, torch.randn(1, 64), past)
    check_devices(found.module)


# ---- staged weights and carried prefetches ---------------------------------------------------------------------


def staged() -> Case:
    """Both weights go through the pinned ring."""
    found = planned(attention, torch.randn(1, 5, 64))
    weights = [node.args[1].name for node in found.nodes(LINEAR)]
    found.context = replace(found.context, staged=dict.fromkeys(weights, "a test"))
    for stage in (split_linears, insert_transfers, schedule):
        found.apply(stage)
    assert len(found.nodes(STAGE)) == len(found.nodes(PREFETCH)) == 2
    return found


def carried() -> Case:
    """What the next step needs first is started at the end of this one."""
    found = scheduled(attention, torch.randn(1, 5, 64))
    found.apply(carry_prefetches)
    assert found.nodes(CARRIED)
    assert len(found.nodes(CARRIED)) == len(found.nodes(PREFETCH_AHEAD))
    return found


@pytest.mark.parametrize("made", [staged, carried])
def test_staged_and_carried_schedules_pass_the_check(made: Callable[[], Case]) -> None:
    found = made()
    check_devices(found.module)
    retarget_devices(found.module, replace(found.context, device=CUDA))
    assert {tensor.device for tensor in tensors_of(found)} == {CUDA}


@pytest.mark.parametrize(("made", "target"), [(staged, STAGE), (carried, CARRIED), (carried, PREFETCH_AHEAD)])
def test_what_goes_up_lies_on_the_host(made: Callable[[], Case], target: object) -> None:
    found = made()
    reader = found.nodes(target)[-1]
    with found.module.graph.inserting_before(reader):
        mirror = found.module.graph.call_function(MIRROR, (reader.args[0],))
    annotate(mirror, info(reader.args[0]), side="accelerator")
    reader.update_arg(0, mirror)
    with pytest.raises(ScheduleError, match=f"{reader.name} .*runs on cpu and reads {mirror.name} .*on cuda"):
        check_devices(found.module)


def test_the_pinned_ring_is_not_the_accelerators() -> None:
    found = staged()
    part = found.nodes(PARTIAL_LINEAR)[-1]
    stage = found.nodes(STAGE)[-1]
    part.update_arg(1, stage)
    with pytest.raises(ScheduleError, match=f"{part.name} .*runs on cuda and reads {stage.name} .*on cpu"):
        check_devices(found.module)
