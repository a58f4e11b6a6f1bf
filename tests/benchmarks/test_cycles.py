"""Random life cycles: some that are right, and one whose fault has to be found."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.cycles.__main__ import _line
from benchmarks.cycles.compare import compare
from benchmarks.cycles.one import run_cycle
from benchmarks.cycles.watch import Failure
from hetegen_compile.steps.run_step import run_step
from tests.models.harness import fresh_dynamo

__all__ = ["fresh_dynamo"]

CYCLES = [
    (4, "gpt2", "causal", [1, 2]),
    (3, "t5", "seq2seq", [0]),
    (5, "bert", "masked", [0]),
]
"""Seed, architecture, kind, and the actions that are kept."""


@pytest.mark.parametrize(("seed", "name", "kind", "keep"), CYCLES)
def test_a_cycle_is_like_eager(seed: int, name: str, kind: str, keep: list[int]) -> None:
    report = run_cycle(seed, name, kind, keep)
    assert report["status"] == "equal", report["detail"]
    assert report["compared"] >= len(keep)
    assert report["steps"] > 0
    assert sum(line[:1].isdigit() for line in report["story"]) == len(keep)


def _one_percent_more(*given: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor * 1.01, run_step(*given))


def test_a_fault_is_found_and_told() -> None:
    seed, name, kind, keep = CYCLES[-1]
    with mock.patch("hetegen_compile.compiled.run_step", _one_percent_more):
        report = run_cycle(seed, name, kind, keep)
    assert report["status"] == "FAILED"
    assert "logits: differs by" in report["detail"]
    told = _line({**report, "seed": seed, "name": name, "kind": kind, "keep": keep, "seconds": 1.0})
    assert "--seed 5 --cycles 1 --architecture bert --kind masked --keep 0" in told
    assert "0: forward bert" in told


def test_tokens_are_whole_and_values_are_near() -> None:
    logits, tokens = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[5, 6, 7]])
    expected = {"logits": logits, "tokens": tokens}
    compare({"logits": logits + 1e-5, "tokens": tokens}, expected, rough=False)
    with pytest.raises(Failure, match="logits: differs"):
        compare({"logits": logits + 1e-2, "tokens": tokens}, expected, rough=False)
    with pytest.raises(Failure, match="tokens"):
        compare({"logits": logits, "tokens": tokens + 1}, expected, rough=False)


def test_rough_values_are_compared_while_tokens_are_alike() -> None:
    """Steps 1 and 2 are made of the same tokens; what follows another token may be anything."""
    logits = torch.arange(6.0).reshape(3, 1, 2)
    expected = {"logits": logits, "tokens": torch.tensor([[5, 6, 7, 8]])}
    other = {"logits": logits + torch.tensor([0.1, 0.1, 9.0])[:, None, None], "tokens": torch.tensor([[5, 6, 9, 8]])}
    compare(other, expected, rough=True)
    with pytest.raises(Failure, match="logits: differs"):
        compare({**other, "logits": logits + 2.0}, expected, rough=True)
