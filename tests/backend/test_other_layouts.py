"""Nested and sparse tensors: the graph runs on the host, as eager has it, and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.backend import make_backend
from hetegen_compile.steps.segments import plain_compiler
from tests.models.harness import emulated, new_schedules


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
    backend.reset()
