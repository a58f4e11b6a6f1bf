"""Inductor as the compiler of segments: what is done about C++ of its own that does not compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.exc import CppCompileError, InductorError
from torch._subclasses.fake_tensor import FakeTensorMode

from hetegen_compile.segments import inductor_compiler
from tests.models.harness import through_inductor


def allowed(mask: Tensor) -> Tensor:
    """A mask picked with positions that are compared, too, as those of sliding windows are."""
    keys, queries = torch.arange(8)[None, None, None, :], torch.arange(7, 8)[None, None, :, None]
    rows = torch.arange(1)[:, None, None, None]
    return (keys > queries - 8) & (keys <= queries) & mask[rows, keys]


@through_inductor
def test_a_mask_of_symbolic_length_that_is_picked_by_positions_compiles() -> None:
    """Inductor of torch 2.11 writes C++ for it that does not compile, at first."""

    def backend(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        mode = detect_fake_mode(examples)
        assert mode is not None
        return inductor_compiler(mode)(module, examples)

    mask = torch.tensor([[True, False] * 8])
    torch._dynamo.mark_dynamic(mask, 1)
    assert torch.equal(torch.compile(allowed, backend=backend)(mask), allowed(mask))


def compiled_with(monkeypatch: pytest.MonkeyPatch, failures: Sequence[Exception]) -> list[bool]:
    """Compile a segment with an Inductor that fails so often: whether indices were propagated, attempt by attempt."""
    attempts: list[bool] = []
    left = list(failures)

    def compile_fx(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        attempts.append(config.constant_and_index_propagation)
        if left:
            raise left.pop(0)
        return segment.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    inductor_compiler(FakeTensorMode())(fx.symbolic_trace(nn.Identity()), [])
    return attempts


@through_inductor
def test_what_does_not_compile_is_written_once_more_without_propagated_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    error = CppCompileError(["g++"], "‘tmp2’ was not declared in this scope")
    assert compiled_with(monkeypatch, []) == [True]
    assert compiled_with(monkeypatch, [error]) == [True, False]
    assert compiled_with(monkeypatch, [InductorError(error, None)]) == [True, False]
    with pytest.raises(CppCompileError, match="tmp2"):
        compiled_with(monkeypatch, [error, error])


@through_inductor
def test_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (InductorError(RuntimeError("no such lowering"), None), ValueError("no such lowering")):
        with pytest.raises(type(error), match="no such lowering"):
            compiled_with(monkeypatch, [error, error])
