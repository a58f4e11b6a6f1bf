"""What the program does to memory is noted before anything is placed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hetegen_compile.ir import info
from hetegen_compile.passes.findings import Effects
from hetegen_compile.passes.note_effects import note_effects
from tests.passes.graphs import case

A = nn.Linear(8, 8)


def noted(found: Effects) -> tuple[list[int], list[str]]:
    """How often each storage is written, and by which nodes."""
    return sorted(map(len, found.writes.values())), sorted(found.writers.values())


def test_writes_are_noted_in_program_order() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        y.view(-1).mul_(2)
        x.mul_(y)
        result: Tensor = A(x)
        return result

    found = case(function, torch.randn(2, 8), torch.randn(2, 8))
    effects = note_effects(found.module, found.context)
    counts, writers = noted(effects)
    assert counts == [1, 2]
    assert [name.partition(" ")[0] for name in writers] == ["add_", "mul_", "mul__1"]
    assert all(list(positions) == sorted(positions) for positions in effects.writes.values())


def test_outputs_are_noted_with_what_they_share() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = A(x)
        return y, y.view(-1), x[0]

    found = case(function, torch.randn(2, 8))
    first, view, given = note_effects(found.module, found.context).outputs
    assert first == view
    assert not first & given
    assert any(info(node).storages == given for node in found.module.graph.find_nodes(op="placeholder"))


def test_a_program_that_writes_nothing() -> None:
    found = case(lambda x: A(x), torch.randn(2, 8))
    effects = note_effects(found.module, found.context)
    assert not effects.writes
    assert not effects.writers
