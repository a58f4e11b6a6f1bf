"""Runs of the host in compiled models: one native call for the host's share of a block, and eager's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile.calibration import write_profile
from hetegen_compile.cost_model import KernelChoice, load_profile
from hetegen_compile.host_kernels.program import HostProgram
from hetegen_compile.reports.schedule import Schedule
from tests.backend.modules import random
from tests.models.harness import RecordingBackend, emulated, new_schedules

WIDTH, HIDDEN = 64, 256


class Gated(nn.Module):
    """The MLP of llamas: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


def plain_mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)).eval()


def gated_mlp() -> nn.Module:
    torch.manual_seed(0)
    return Gated().eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "native" or "plain", call by call of a host program."""
    seen: list[str] = []
    call, plain = HostProgram.__call__, HostProgram.plain

    def spied_call(self: HostProgram, *arguments: Tensor | None) -> list[Tensor]:
        seen.append("native")
        return call(self, *arguments)

    def spied_plain(self: HostProgram, arguments: Sequence[Tensor | None]) -> list[Tensor]:
        seen[-1] = "plain"
        return plain(self, arguments)

    monkeypatch.setattr(HostProgram, "__call__", spied_call)
    monkeypatch.setattr(HostProgram, "plain", spied_plain)
    return seen


Hardware = Callable[..., str]


@pytest.fixture
def hardware(tmp_path: Path) -> Hardware:
    """A function (*points) -> path of a profile with these kernels."""

    def write(*points: tuple[float, str]) -> str:
        preset = load_profile("cpu-emulated")
        names = ("float32", "bfloat16", "float16")
        host = replace(preset.host, linear_kernels=dict.fromkeys(names, KernelChoice(points)))
        path = tmp_path / "profile.json"
        assert write_profile(path, replace(preset, name="with-kernels", host=host))
        return str(path)

    return write


@dataclass(frozen=True)
class Found:
    """A compiled model's schedule and the text of its step; ``model`` is there so that it is alive."""

    schedule: Schedule
    source: str
    model: nn.Module


STEPS = 3


def compiled(
    model: nn.Module, hardware: str, tokens: int = 2, dtype: torch.dtype = torch.float32, **more: Any
) -> Found:
    """Half of the block's columns on the host, some steps of it, each as eager's."""
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    model = model.to(dtype)
    options = emulated(hardware=hardware, gpu_memory="1MiB", pair_mlp=True, **more)
    function = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        for seed in range(STEPS):
            x = random(tokens, WIDTH, seed=seed).to(dtype)
            assert_close(function(x), model(x))
    (schedule,) = new_schedules(known)
    assert schedule.host_bytes > 0
    assert schedule.streamed_bytes > 0
    return Found(schedule, backend.graphs[0].plans[0].bound.source, model)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """As usual, and in 16 bits to 1 % of the largest: sums of parts are rounded more than once."""
    loose = None if expected.dtype == torch.float32 else 1e-2 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=loose and 0.0, atol=loose)


@pytest.mark.parametrize("make", [plain_mlp, gated_mlp])
@pytest.mark.parametrize(("issue_ahead", "call"), [(False, "host"), (True, "host_ahead")])
def test_the_hosts_share_of_a_block_is_one_native_call(
    calls: list[str], hardware: Hardware, make: Callable[[], nn.Module], call: str, *, issue_ahead: bool
) -> None:
    found = compiled(make(), hardware((1.0, "vectorised")), issue_ahead=issue_ahead)
    assert calls == ["native"] * STEPS
    (line,) = (line for line in found.source.splitlines() if "_program_" in line)
    assert line.strip().startswith("_run_")
    assert f" = {call}(" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_blocks(calls: list[str], hardware: Hardware, dtype: torch.dtype) -> None:
    compiled(gated_mlp(), hardware((1.0, "vectorised, tiled")), tokens=1, dtype=dtype)
    assert calls == ["native"] * STEPS


def test_many_tokens_are_computed_operation_by_operation(calls: list[str], hardware: Hardware) -> None:
    found = compiled(plain_mlp(), hardware((1.0, "vectorised"), (4.0, "F.linear")), tokens=4)
    assert "_run_" in found.source, "the plan serves fewer, too"
    assert calls == ["plain"] * STEPS


def test_torchs_kernels_alone_make_no_run(calls: list[str], hardware: Hardware) -> None:
    found = compiled(plain_mlp(), hardware((1.0, "F.linear")))
    assert "_run_" not in found.source
    assert calls == []


def test_parts_of_a_run_are_measured_and_traced_each(hardware: Hardware, tmp_path: Path) -> None:
    schedule = compiled(plain_mlp(), hardware((1.0, "vectorised"))).schedule
    rows = {row.op: row for row in schedule.rows if row.placement in ("host", "block")}
    assert rows.keys() == {"linear", "relu"}
    assert all(row.measured_s is not None and row.measured_s > 0 for row in rows.values())
    schedule.save_trace(tmp_path / "step.json")
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    host = [event["name"] for event in events if (event["pid"], event["tid"]) == ("measured", "host")]
    parts = {name for row in schedule.rows for name in row.parts if name.startswith(("host_linear", "input"))}
    assert len(parts) == 3
    assert parts <= set(host)
    assert len(host) == len(set(host)), "each once"
