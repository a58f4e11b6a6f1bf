"""Results of a compiled model against eager's: nests by name, tensors by their dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.cycles.watch import Failure

TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the largest number of a tensor, as far as that is above 1. Wide models have their norms in float32."""
ROUGH = 0.15
"""The same where keys and values are rounded to 8 bits."""


def compare(result: Mapping[str, Any], expected: Mapping[str, Any], *, rough: bool) -> None:
    """Raise ``Failure`` if they differ.

    Values are compared before whole numbers (tokens): where both differ, the values tell more. ``rough``: tokens may
    differ from some step on, and logits [steps, batch, vocabulary] are compared up to there, all else by its form.
    """
    if result.keys() != expected.keys():
        raise Failure(f"{sorted(result)} instead of {sorted(expected)}")
    for name in sorted(expected, key=lambda name: not _is_floating(expected[name])):
        if not rough:
            _compare(name, result[name], expected[name], 0.0)
        else:
            _compare_forms(name, result[name], expected[name])
    for name in sorted(expected) if rough else ():
        if name.endswith("logits") and not _compare_while_alike(name, result, expected):
            return


def _compare_while_alike(name: str, result: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """The logits of steps whose inputs are the same; whether all are."""
    tokens = name.removesuffix("logits") + "tokens"
    one, other, steps = result[tokens], expected[tokens], len(expected[name])
    same = [torch.equal(one[:, i - steps], other[:, i - steps]) for i in range(steps)]
    alike = 1 + same.index(False) if False in same else steps
    _compare(name, result[name][:alike], expected[name][:alike], ROUGH)
    return all(same)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _compare_forms(name: str, one: Any, other: Any) -> None:
    forms = [(each.dtype, each.shape) if isinstance(each, Tensor) else each for each in (one, other)]
    if forms[0] != forms[1]:
        raise Failure(f"{name}: {forms[0]} instead of {forms[1]}")


def _compare(name: str, one: Any, other: Any, least: float) -> None:
    _compare_forms(name, one, other)
    if not isinstance(other, Tensor):
        return
    if not other.dtype.is_floating_point:
        if not torch.equal(one, other):
            raise Failure(f"{name}: {one.tolist()} instead of {other.tolist()}")
        return
    finite = other.isfinite()
    largest = other[finite].abs().max().item() if finite.any() else 0.0
    near = max(1.0, largest) * max(TOLERANCES[other.dtype], least)
    if not torch.allclose(one, other, rtol=0.0, atol=near, equal_nan=True):
        raise Failure(f"{name}: differs by {(one - other).abs()[finite].max().item():g}, largest {largest:g}")
