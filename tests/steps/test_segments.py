"""Inductor as the compiler of segments: what it is given besides a segment's inputs, its cache, what is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.two_tensor import TwoTensor

from hetegen_compile.passes.segment_calls import CompiledCall, with_declared_strides
from hetegen_compile.steps import segments
from hetegen_compile.steps.segments import inductor_compiler
from tests.models.harness import through_inductor


class Grown(torch.nn.Module):
    """A segment as of a growing cache: one of its inputs is the cache, another the length that it will have."""

    def forward(self, cache: Tensor, row: Tensor, longer: int, length: int) -> tuple[Tensor]:
        del length
        return (torch.cat([cache, row]).expand(2, longer, 8).sum(0),)


class Longer(torch.nn.Module):
    """A segment that only counts to the length that a cache will have."""

    def forward(self, longer: int, length: int) -> tuple[Tensor]:
        del length
        return (torch.arange(longer) * 2,)


Inputs = Callable[[Any, Any, Any], list[Any]]
"""Of a segment, from a cache, a row and the cache's length."""


def grown(cache: Any, row: Any, length: Any) -> list[Any]:
    return [cache, row, length + 1, length]


def longer(cache: Any, row: Any, length: Any) -> list[Any]:
    return [length + 1, length]


def run_compiled(
    rows: int,
    segment: torch.nn.Module,
    inputs: Inputs,
    called: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Tensor:
    """Compile a segment for a cache whose length is a symbol, as Dynamo makes it, and run it twice."""

    def backend(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        examples = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
        mode = detect_fake_mode(examples)
        assert mode is not None
        length, cache, row = examples
        compiled = inductor_compiler(mode)(fx.symbolic_trace(segment), inputs(cache, row, length))
        call = called(compiled)

        def twice(length: int, cache: Tensor, row: Tensor) -> Any:
            with torch.no_grad():
                call(*inputs(cache, row, length))
                return call(*inputs(cache, row, length))

        return twice

    torch._dynamo.reset()
    cache, row = torch.ones(rows, 8), torch.zeros(1, 8)
    torch._dynamo.mark_dynamic(cache, 0)
    result: Tensor = torch.compile(lambda cache, row: torch.cat([cache, row]), backend=backend)(cache, row)
    return result


@through_inductor
@pytest.mark.parametrize(("segment", "inputs"), [(Grown(), grown), (Longer(), longer)])
def test_symbols_are_inputs_of_their_own(segment: torch.nn.Module, inputs: Inputs) -> None:
    """Otherwise a look-up in the cache fails on a guard that names a place in the model, or code on a missing name."""
    from torch._inductor.utils import fresh_cache

    counters.clear()
    with fresh_cache():
        for rows in (5, 9):
            (expected,) = segment(*inputs(torch.ones(rows, 8), torch.zeros(1, 8), rows))
            assert torch.equal(run_compiled(rows, segment, inputs), expected)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1


@through_inductor
def test_nothing_is_timed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's benchmarks take memory beside the budget."""
    seen: list[tuple[bool, bool]] = []

    def compile_fx(segment: fx.GraphModule, examples: list[Any], **_: Any) -> Callable[..., Any]:
        seen.append((inductor_config.deterministic, inductor_config.triton.autotune_pointwise))
        return segment.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    before = inductor_config.deterministic, inductor_config.triton.autotune_pointwise
    inductor_compiler(FakeTensorMode())(fx.symbolic_trace(torch.nn.ReLU()), [])
    assert seen == [(True, False)]
    assert (inductor_config.deterministic, inductor_config.triton.autotune_pointwise) == before


FLASH = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
NO_OTHER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


@through_inductor
@pytest.mark.parametrize(
    ("symbolic", "allowed", "kept"),
    [("size", FLASH, False), ("number", FLASH, False), ("", FLASH, True), ("size", NO_OTHER, True)],
)
def test_attention_to_any_length_is_not_cudnns(
    symbolic: str, allowed: list[SDPBackend], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which builds a plan for each length; where no other fused one is allowed it stays."""
    seen: list[bool] = []

    def compile_fx(segment: fx.GraphModule, examples: list[Any], **_: Any) -> Callable[..., Any]:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise RuntimeError("a compiler's failure leaves the choice as it was, too")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC if symbolic else DimDynamic.STATIC])
    example: Any = mode.from_tensor(torch.ones(5), symbolic_context=dynamic)
    if symbolic == "number":  # of a preallocated buffer's tokens that are looked at
        example = example.shape[0]
    with sdpa_kernel(allowed):
        with pytest.raises(RuntimeError, match="failure"):
            inductor_compiler(mode)(fx.symbolic_trace(torch.nn.ReLU()), [example])
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert seen == [kept]


def compiled(function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    segment = function if isinstance(function, fx.GraphModule) else fx.symbolic_trace(function)
    with torch.no_grad():
        return inductor_compiler(mode)(segment, [mode.from_tensor(one) for one in inputs])


def writes(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x.mul_(2)
    return (x + y,)


def writes_a_view(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x[1:].copy_(y[1:])
    return (x + y,)


PLAIN: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "sum": lambda x, y: (x + y,),
    "two": lambda x, y: (x + y, (x * y).t()),
    "unused input": lambda x, y: (y + 1,),
    "two views of one": lambda x, y: (lambda z: (z[0], z[1]))(x + y),
    "a value and its view": lambda x, y: (lambda z: (z, z.t()))(x + y),
    "one twice": lambda x, y: (lambda z: (z, z))(x + y),
    "writes": writes,
    "writes a view": writes_a_view,
}
LAYERED: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "view of an input": lambda x, y: (x.t(), x + y),
    "an input": lambda x, y: (x, x + y),
}


@through_inductor
@pytest.mark.parametrize("name", [*PLAIN, *LAYERED])
def test_what_is_called_past_torchs_layers(name: str) -> None:
    """Where nothing is to be done around the code, which may write what it is given; all is eager's in every call."""
    function = {**PLAIN, **LAYERED}[name]
    x, y = torch.randn(3, 3), torch.randn(3, 3)
    found = compiled(function, x, y)
    assert isinstance(found, CompiledCall) is (name in PLAIN)
    mine, other = x.clone(), x.clone()
    with torch.no_grad():
        call = with_declared_strides(found, function(x.clone(), y))
        for _ in range(3):
            results, expected = call(mine, y), function(other, y)
            torch.testing.assert_close(tuple(results), expected, check_stride=True)
            assert torch.equal(mine, other)
            shown = [one.untyped_storage().data_ptr() for one in (mine, *results)]
            right = [one.untyped_storage().data_ptr() for one in (other, *expected)]
            assert [shown.index(one) for one in shown] == [right.index(one) for one in right]


@through_inductor
def test_from_the_second_call_on_torchs_layers_are_not_called() -> None:
    x = torch.randn(3)
    found = compiled(PLAIN["sum"], x, x)
    assert isinstance(found, CompiledCall)
    layers = mock.Mock(wraps=found.function)
    call = with_declared_strides(CompiledCall(layers, found.boxed), [x])
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(call(x, x)[0], x + x)
    assert layers.call_count == 1


@through_inductor
@pytest.mark.parametrize("without", [True, False])
def test_code_from_the_cache_is_called_past_them_too(without: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd's cache (which refuses graphs that call methods) would hide it."""
    from torch._inductor.utils import fresh_cache

    if not without:
        monkeypatch.setattr(segments, "_without_aot_cache", contextlib.nullcontext)
    counters.clear()
    found = []
    with fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            found.append(compiled(lambda x, y: (torch.t(x * y),), torch.randn(5, 5), torch.randn(5, 5)))
    assert isinstance(found[0], CompiledCall)
    assert isinstance(found[1], CompiledCall) is without
    assert counters["aot_autograd"]["autograd_cache_hit"] == (not without)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1


@through_inductor
def test_sizes_are_inputs_of_the_code_alone() -> None:
    found: list[Callable[..., Any]] = []
    for rows in (5, 9):
        expected = Grown()(*grown(torch.ones(rows, 8), torch.zeros(1, 8), rows))

        def called(function: Callable[..., Any], outputs: Sequence[Tensor] = expected) -> Callable[..., Any]:
            found.append(function)
            return with_declared_strides(function, outputs)

        assert torch.equal(run_compiled(rows, Grown(), grown, called), expected[0])
    assert [type(one) for one in found] == [CompiledCall, CompiledCall]


def test_where_torch_keeps_its_notes_otherwise_its_layers_are_called(caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor.output_code import CompiledFxGraph

    segment = fx.symbolic_trace(PLAIN["sum"])
    with caplog.at_level("INFO", "hetegen_compile"):
        assert segments._code_alone(mock.Mock(spec=CompiledFxGraph), object(), segment, 2) is None
    assert "through all of torch's layers: 'object' object has no attribute 'output_info'" in caplog.text


@through_inductor
def test_subclasses_are_taken_apart_and_gradients_switched_by_torch() -> None:
    x = torch.randn(3, 3)
    pair = TwoTensor(x, x.clone())
    assert not isinstance(compiled(PLAIN["sum"], pair, pair), CompiledCall)
    switching = fx.symbolic_trace(PLAIN["sum"])
    with switching.graph.inserting_before(switching.graph.output_node()):
        switching.graph.call_function(torch._C._set_grad_enabled, (True,))
    switching.recompile()
    assert not isinstance(compiled(switching, x, x), CompiledCall)


@through_inductor
def test_where_autocast_is_to_be_switched_off_they_are_called() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(lambda x, y: (x @ y,), x, x)
        assert not isinstance(found, CompiledCall)
        (result,) = found(x, x)
    assert result.dtype is torch.bfloat16
