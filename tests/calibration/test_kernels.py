"""Rotation over weights, rates in bytes of the given weights, and kernels that do not exist everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.calibration.kernels import (
    FLOAT32_COPY,
    PREPACKED,
    CopyingKernel,
    activation_dtype,
    call_durations_s,
    copying_kernels,
    copying_rate,
    cut_weights,
    in_place,
    kernel_rate,
    make_arena,
)
from hetegen_compile.host_kernels import VECTORISED
from tests.calibration.tiny import TINY, Clock


def test_weights_tile_the_arena_with_columns_in_turn() -> None:
    arena = make_arena(torch.bfloat16, 400)
    weights = cut_weights(arena, 64, (8, 16))
    assert [tuple(weight.shape) for weight in weights] == [(4, 8), (2, 16)] * 3  # 64 bytes each
    assert [weight.storage_offset() for weight in weights] == [32 * i for i in range(6)]
    assert all(weight.untyped_storage().data_ptr() == arena.data_ptr() for weight in weights)


def test_a_weight_has_at_least_one_row() -> None:
    (weight, *_) = cut_weights(make_arena(torch.float32, 400), 4, (8,))
    assert weight.shape == (1, 8)


def test_calls_rotate_over_all_weights_with_inputs_that_fit() -> None:
    weights = cut_weights(make_arena(torch.float32, 512), 128, (8, 4))
    seen: list[tuple[Tensor, Tensor]] = []
    effort = replace(TINY, repeats=len(weights) + 1)
    calls = call_durations_s(lambda x, w: seen.append((x, w)), weights, 3, effort)
    assert [w.data_ptr() for _, w in seen[1:]] == [w.data_ptr() for w in (*weights, weights[0])]
    assert all(x.shape == (3, w.shape[1]) for x, w in seen)
    assert [nbytes for nbytes, _ in calls] == [128] * 5


def test_calls_begin_where_they_are_told_and_go_on_in_turn() -> None:
    weights = cut_weights(make_arena(torch.float32, 448), 64, (8, 12))
    assert [weight.nbytes for weight in weights] == [64, 48] * 4
    seen: list[Tensor] = []
    effort = replace(TINY, repeats=5)
    calls = call_durations_s(lambda x, w: seen.append(w), weights, 1, effort, start=0.7)
    order = [weights[which] for which in (5, 6, 7, 0, 1)]
    assert [w.data_ptr() for w in seen[1:]] == [w.data_ptr() for w in order]
    assert seen[0] is seen[1], "what is not counted is the first"
    assert [nbytes for nbytes, _ in calls] == [w.nbytes for w in order]


def test_forms_are_read_from_the_same_place() -> None:
    weights = cut_weights(make_arena(torch.float32, 256), 64, (8,))
    forms = [weight.clone() for weight in weights]
    seen: list[Tensor] = []
    call_durations_s(lambda x, w: seen.append(w), weights, 1, TINY, forms, start=0.5)
    assert [form.data_ptr() for form in forms[2:]] == [w.data_ptr() for w in seen[1:3]]


def test_a_rate_is_bytes_of_the_given_weights_over_the_median() -> None:
    clock = Clock()
    kernel = CopyingKernel("fp32", lambda weight, tokens: weight.float(), lambda x, weight: clock.advance(2.0))
    weights = cut_weights(make_arena(torch.float16, 64), 64, (8,))
    effort = replace(TINY, clock=clock)
    assert copying_rate(kernel, weights, 1, effort) == 64 / 2.0
    assert kernel_rate(kernel.run, weights, 1, effort) == 64 / 2.0


def test_a_kernel_of_the_registry_computes_a_whole_linear() -> None:
    x, weight = torch.randn(3, 32), torch.randn(16, 32)
    torch.testing.assert_close(in_place(VECTORISED)(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copying_kernels_compute_a_linear(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 32).to(dtype), torch.randn(16, 32).to(dtype)
    expected = F.linear(x.float(), weight.float())
    for kernel in copying_kernels(dtype):
        try:
            prepared = kernel.prepare(weight, 3)
        except RuntimeError:
            assert kernel is PREPACKED
            continue
        result = kernel.run(x, prepared)
        assert isinstance(result, Tensor)
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=0.2)


def test_a_float32_copy_of_float32_is_no_candidate() -> None:
    assert copying_kernels(torch.float32) == (PREPACKED,)
    assert copying_kernels(torch.float16) == (PREPACKED, FLOAT32_COPY)
    assert copying_kernels(torch.int8) == ()
    assert activation_dtype(torch.int8) == torch.bfloat16
    assert activation_dtype(torch.float16) == torch.float16


def test_a_kernel_that_cannot_has_no_rate(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(weight: Tensor, tokens: int) -> Tensor:
        raise RuntimeError("not on this processor\nwith a long trace")

    weights = cut_weights(make_arena(torch.float32, 64), 64, (8,))
    with caplog.at_level("INFO", logger="hetegen_compile"):
        assert copying_rate(CopyingKernel("cannot", refuse, F.linear), weights, 1, TINY) is None
    assert "cannot: not for float32 here: not on this processor" in caplog.text


def test_prepacking_that_this_torch_lacks_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    with pytest.raises(RuntimeError, match="no oneDNN prepacking"):
        PREPACKED.prepare(torch.ones(4, 8), 1)
