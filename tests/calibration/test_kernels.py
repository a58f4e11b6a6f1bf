"""Rotation over weights, rates in bytes of the given weights, and kernels that do not exist everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.calibration.kernels import (
    FLOAT32_COPY,
    LINEAR,
    PREPACKED,
    HostKernel,
    compare_kernels,
    describe_fastest,
    kernel_rate,
    kernels_for,
    make_weights,
)
from tests.calibration.tiny import TINY, Clock


def test_weights_fill_the_rotation_in_whole_turns() -> None:
    weights = make_weights(((4, 8), (2, 8)), torch.bfloat16, 200)
    assert [tuple(weight.shape) for weight in weights] == [(4, 8), (2, 8)] * 3  # a turn has 96 bytes
    assert all(weight.dtype == torch.bfloat16 for weight in weights)
    assert len({weight.data_ptr() for weight in weights}) == 6


def test_calls_rotate_over_all_weights_with_inputs_that_fit() -> None:
    weights = make_weights(((4, 8), (8, 4)), torch.float32, 512)
    seen: list[tuple[Tensor, Tensor]] = []
    spy = HostKernel("spy", lambda weight, tokens: weight, lambda x, w: seen.append((x, w)) or w)  # type: ignore[func-returns-value]
    kernel_rate(spy, weights, 3, replace(TINY, repeats=len(weights) + 1))
    assert [w.data_ptr() for _, w in seen[1:]] == [w.data_ptr() for w in (*weights, weights[0])]
    assert all(x.shape == (3, w.shape[1]) for x, w in seen)


def test_a_rate_is_bytes_of_the_given_weights_over_the_median() -> None:
    clock = Clock()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        clock.advance(2.0)
        return x

    kernel = HostKernel("fp32", lambda weight, tokens: weight.float(), run)
    weights = make_weights(((4, 8),), torch.float16, 64)
    assert kernel_rate(kernel, weights, 1, replace(TINY, clock=clock)) == 64 / 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_compute_a_linear(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 32).to(dtype), torch.randn(16, 32).to(dtype)
    expected = F.linear(x.float(), weight.float())
    computed = 0
    for kernel in kernels_for(dtype):
        try:
            prepared = kernel.prepare(weight, 3)
        except RuntimeError:
            assert kernel is PREPACKED
            continue
        result = kernel.run(x, prepared)
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=0.2)
        computed += 1
    assert computed >= (1 if dtype == torch.float32 else 2)


def test_a_float32_copy_of_float32_is_no_candidate() -> None:
    assert FLOAT32_COPY not in kernels_for(torch.float32)
    assert FLOAT32_COPY in kernels_for(torch.float16)


def test_a_kernel_that_cannot_is_left_out() -> None:
    def refuse(weight: Tensor, tokens: int) -> Tensor:
        raise RuntimeError("not on this processor\nwith a long trace")

    weights = make_weights(((4, 8),), torch.float32, 64)
    rates = compare_kernels((HostKernel("cannot", refuse, F.linear), LINEAR), weights, 1, TINY)
    assert list(rates) == ["F.linear"]
    assert rates["F.linear"] > 0


def test_prepacking_that_this_torch_lacks_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    with pytest.raises(RuntimeError, match="no oneDNN prepacking"):
        PREPACKED.prepare(torch.ones(4, 8), 1)


def test_the_fastest_is_named_beside_the_one_in_use() -> None:
    assert describe_fastest({"F.linear": 2e9, "other": 1e9}) == "F.linear 2 GB/s"
    assert describe_fastest({"F.linear": 2e9, "other": 4e9}) == "other 4 GB/s (F.linear 2)"
