"""Nested and sparse tensors: the graph runs on the host, as eager has it, and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.backend import make_backend
from hetegen_compile.steps.segments import plain_compiler
from tests.models.harness import RecordingBackend, emulated, new_schedules


class Ragged(nn.Module):
    """Computes with sequences of different lengths, which come so or are made so."""

    def __init__(self, *, makes: bool) -> None:
        super().__init__()
        self.makes = makes
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nested.nested_tensor([x[0], x[1, :4]], layout=torch.jagged) if self.makes else x
        result: Tensor = self.second(self.first(x).relu()).values()
        return result


@pytest.mark.parametrize("makes", [False, True])
def test_jagged_tensors_are_the_hosts(makes: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, known = Ragged(makes=makes).eval(), hetegen_compile.schedules()
    jagged = torch.nested.nested_tensor([torch.randn(9, 64), torch.randn(4, 64)], layout=torch.jagged)
    x = torch.randn(2, 9, 64) if makes else jagged
    backend = make_backend(plain_compiler)
    compiled = torch.compile(model, backend=backend, options=emulated(gpu_memory="64MiB"))
    with torch.no_grad(), caplog.at_level(logging.WARNING, "hetegen_compile"):
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))
    (schedule,) = new_schedules(known)
    assert "runs on the host in eager mode" in schedule.explain()
    assert "is a tensor with the layout jagged" in caplog.text
    assert ("could not be compiled" in caplog.text) == makes
    backend.reset()


class Between(nn.Module):
    """A jagged tensor only between two Linears, as attention to sequences of different lengths has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(self.first(x).relu(), offsets)
        result: Tensor = self.second((jagged * 2).values())
        return result


def test_a_jagged_tensor_on_the_way_leaves_linears_to_both_sides() -> None:
    torch.manual_seed(0)
    model, backend, known = Between().eval(), RecordingBackend(), hetegen_compile.schedules()
    budget = sum(one.nbytes for one in model.parameters()) + (16 << 10)
    compiled = torch.compile(model, backend=backend, options=emulated(gpu_memory=budget))
    with torch.no_grad():
        for offsets in ([0, 3, 8], [0, 1, 8]):
            x, where = torch.randn(8, 64), torch.tensor(offsets)
            torch.testing.assert_close(compiled(x, where), model(x, where), rtol=1e-4, atol=1e-5)
    assert sum(schedule.host_bytes for schedule in new_schedules(known)) > 0
