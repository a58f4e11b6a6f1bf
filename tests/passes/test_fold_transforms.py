"""``vmap`` regions become one node, and run as in eager on either side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._C import _functorch

from hetegen_compile.passes.fold_transforms import Folded, fold_transforms
from hetegen_compile.passes.retarget_devices import retarget_constants
from tests.backend.modules import BUDGET, Linear, around, random
from tests.models.harness import compiled_like_eager, emulated
from tests.passes.graphs import case, dynamo_graph


def _row(row: Tensor) -> tuple[Tensor, Tensor]:
    return row.sin() * torch.arange(3.0, device="cpu"), row.sum()


def _twice(x: Tensor) -> tuple[Tensor, Tensor]:
    first, total = torch.vmap(_row)(x)
    second, _ = torch.vmap(_row)(first)
    return second, total


def _folds(x: Tensor) -> list[Folded]:
    found = case(_twice, x)
    return [node.target for node in found.module.graph.nodes if isinstance(node.target, Folded)]


def test_a_region_is_one_node() -> None:
    module, _ = dynamo_graph(_twice, torch.randn(2, 3))
    assert "_vmap_increment_nesting" in module.code
    fold_transforms(module)
    assert "nesting" not in module.code
    x = torch.randn(2, 3)
    torch.testing.assert_close(tuple(module(x)), _twice(x))


def test_regions_with_the_same_code_share_a_function() -> None:
    def both(x: Tensor) -> Tensor:
        return torch.vmap(torch.sin)(torch.vmap(torch.sin)(x))

    module, _ = dynamo_graph(both, torch.randn(2, 3))
    fold_transforms(module)
    first, second = [node.target for node in module.graph.nodes if isinstance(node.target, Folded)]
    assert first is second


def test_device_constants_inside_are_changed() -> None:
    folded, *_ = _folds(torch.randn(2, 3))
    moved = folded.on(torch.device("meta"), retarget_constants)
    assert "meta" in moved.module.code
    assert "meta" not in folded.module.code
    assert folded.on(torch.device("meta"), retarget_constants) is moved


def test_an_error_inside_leaves_no_transform_entered() -> None:
    folded, *_ = _folds(torch.randn(2, 3))
    depth = _functorch.get_dynamic_layer_stack_depth()
    with pytest.raises(RuntimeError):
        folded(torch.randn(2, 5))
    assert _functorch.get_dynamic_layer_stack_depth() == depth


def test_runs_like_eager_between_linears() -> None:
    def body(before: Linear, after: Linear, x: Tensor) -> Tensor:
        return after(torch.vmap(lambda row: row * row.mean())(before(x)))

    model = around(body)

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(2, 64))
        return result

    compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), calls=1)
