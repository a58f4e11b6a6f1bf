"""Fingerprints: every changed byte is found by the full comparison, dense changes by any sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hetegen_compile.mirrors.fingerprints import BLOCK_BYTES, SAMPLES, Fingerprint
from tests.passes.graphs import property_test


def _of(data: Tensor, start: int, nbytes: int) -> Fingerprint:
    return Fingerprint(data.untyped_storage(), start, nbytes)


@property_test
@given(start=st.integers(0, 40), nbytes=st.integers(1, 3 * BLOCK_BYTES + 5), data=st.data())
def test_any_changed_byte_is_found_and_none_outside(start: int, nbytes: int, data: st.DataObject) -> None:
    memory = torch.randint(0, 256, (start + nbytes + 16,), dtype=torch.uint8)
    fingerprint = _of(memory, start, nbytes)
    assert fingerprint.matches(memory.untyped_storage())
    place = data.draw(st.integers(0, len(memory) - 1))
    memory[place] += data.draw(st.integers(1, 255))
    assert fingerprint.matches(memory.untyped_storage()) == (not start <= place < start + nbytes)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("nbytes", [1, 200, 256, 257, BLOCK_BYTES, 5 * BLOCK_BYTES + 12])
def test_blocks_and_samples_of_what_did_not_change_match(start: int, nbytes: int) -> None:
    memory = torch.randint(0, 256, (start + nbytes,), dtype=torch.uint8)
    fingerprint = _of(memory, start, nbytes)
    assert all(fingerprint.sample_matches(memory.data_ptr(), turn) for turn in range(2 * SAMPLES))
    assert all(fingerprint.block_matches(memory.data_ptr(), turn) for turn in range(12))


def test_each_turn_compares_another_block() -> None:
    weight = torch.randn(64, 1024)
    fingerprint = _of(weight, 0, weight.numel() * 4)
    weight.numpy()[10, 3] += 1
    assert [turn for turn in range(64) if not fingerprint.block_matches(weight.data_ptr(), turn)] == [10]


def test_a_change_of_all_is_seen_by_every_sample() -> None:
    weight = torch.randn(64, 1024)
    fingerprint = _of(weight, 0, weight.numel() * 4)
    weight.data += 0.01
    assert not any(fingerprint.sample_matches(weight.data_ptr(), turn) for turn in range(SAMPLES))
