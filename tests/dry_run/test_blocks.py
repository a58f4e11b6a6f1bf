"""The cost model decides whether MLP blocks are cut as one."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.reports.schedule import Schedule

WIDTH, WIDE, LAYERS = 512, 2048, 3


class Mlp(nn.Module):
    """Residual blocks without attention, on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDE, device="meta") for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(WIDE, WIDTH, device="meta") for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


class Parallel(nn.Module):
    """Beside each MLP a Linear that reads the same activation: blocks as one make no fewer trips."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.beside = nn.ModuleList(nn.Linear(WIDTH, WIDTH, device="meta") for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for up, down, beside in zip(self.mlp.up, self.mlp.down, self.beside, strict=True):
            x = x + down(torch.relu(up(x))) + torch.softmax(beside(x), -1)
        return x


class Apart(Mlp):
    """The same Linears, no blocks: what lies between them mixes the columns."""

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.softmax(up(x), -1))
        return x


def plan(hardware: str, tokens: int = 1, model: Callable[[], nn.Module] = Mlp, **options: Any) -> Schedule:
    budget = int(0.3 * LAYERS * 2 * WIDTH * WIDE * 4) + (tokens - 1) * (64 << 10)
    x = torch.zeros(tokens, WIDTH, device="meta")
    given = {"hardware": hardware, "gpu_memory": budget, "print_schedule": False, **options}
    return hetegen_compile.plan(model(), x, options=given)


def cut(schedule: Schedule) -> int:
    return sum(row.placement == "block" for row in schedule.rows)


def slow_between(path: Path) -> str:
    """A machine whose host takes a millisecond for every operation between two Linears."""
    preset = files("hetegen_compile.cost_model").joinpath("presets/a10-xeon.json")
    profile = json.loads(preset.read_text())
    profile["host"]["launch_s"] = 1e-3
    changed = path / "slow.json"
    changed.write_text(json.dumps(profile))
    return str(changed)


@pytest.mark.parametrize("hardware", ["rtx4090-desktop", "a10-xeon"])
def test_a_saved_trip_shortens_the_step(hardware: str) -> None:
    apart, chosen = plan(hardware, pair_mlp=False), plan(hardware)
    assert cut(apart) == 0
    assert cut(chosen) >= 2
    assert chosen.predicted_step_s < apart.predicted_step_s


def test_not_where_the_host_takes_longer_between_the_linears_than_for_the_trip(tmp_path: Path) -> None:
    hardware = slow_between(tmp_path)
    apart, chosen, forced = (plan(hardware, pair_mlp=pair) for pair in (False, "auto", True))
    assert cut(chosen) == 0
    assert chosen.predicted_step_s == pytest.approx(apart.predicted_step_s)
    assert forced.predicted_step_s >= chosen.predicted_step_s


def test_not_for_a_long_prompt_which_is_streamed() -> None:
    assert cut(plan("h100-server", tokens=512)) == 0


def test_blocks_that_make_no_fewer_trips_are_cut_where_all_are_asked_for() -> None:
    assert cut(plan("rtx4090-desktop", model=Parallel, pair_mlp=True)) >= 2


def test_a_model_without_blocks_is_split_though_all_blocks_are_asked_for() -> None:
    found, usual = (plan("rtx4090-desktop", model=Apart, pair_mlp=pair) for pair in (True, "auto"))
    assert found.host_bytes == usual.host_bytes > 0
    assert "no Linears with nothing but pointwise operations between them" in found.explain()


def test_blocks_that_are_not_cut_as_one_are_told(tmp_path: Path) -> None:
    """Where the host takes far too long between the Linears, the step is shorter with nothing on the host."""
    found = plan(slow_between(tmp_path), pair_mlp=True)
    assert cut(found) == 0
    assert f"{LAYERS} of {LAYERS} blocks are not cut as one" in found.explain()
