"""Host tensors for results: the geometry that eager's have, down to what they are a view of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators.geometry import copy_span, empty_result, span_length

DENSE = [
    torch.randn(3, 4),
    torch.randn(3, 4).t(),
    torch.randn(2, 3, 4, 5, dtype=torch.float64).permute(0, 2, 1, 3),
    torch.tensor(3.0),
    torch.randn(0, 4),
    torch.randn(1).expand(4),
]


@pytest.mark.parametrize("value", DENSE, ids=lambda value: f"{tuple(value.shape)}{value.stride()}")
def test_what_has_no_gaps_is_a_tensor_by_itself(value: Tensor) -> None:
    result = empty_result(value)
    assert result._base is None
    assert (result.shape, result.stride(), result.dtype) == (value.shape, value.stride(), value.dtype)
    assert result.untyped_storage().nbytes() == span_length(value) * value.element_size() * (value.numel() > 0)


def test_a_window_is_cut_from_a_tensor_like_the_one_it_comes_from() -> None:
    whole = torch.randn(2, 3, 9, 16)
    window = whole[:, :, -7:]
    result = empty_result(window)
    copy_span(result, window)
    assert torch.equal(result, window)
    assert (result.stride(), result.storage_offset()) == (window.stride(), window.storage_offset())
    assert result._base is not None
    assert result._base.shape == whole.shape


def test_a_tensor_much_longer_than_the_window_is_not_made_again() -> None:
    window = torch.randn(1, 1000, 16)[:, -7:].expand(2, 7, 16)
    few = torch.randn(2, 16, 1000)[:1, :2, -7:]
    for value in (window, few):
        result = empty_result(value)
        copy_span(result, value)
        assert torch.equal(result, value)
        assert result._base is None
        assert result.untyped_storage().nbytes() <= span_length(value) * value.element_size()


def test_an_offset_beyond_the_dense_tensor_is_left_out() -> None:
    value = torch.randn(4, 2, 9, 16)[3:, :, -7:]
    result = empty_result(value)
    copy_span(result, value)
    assert torch.equal(result, value)
    assert result.stride() == value.stride()
    assert result._base is not None
    assert result._base.shape == (1, 2, 9, 16)
