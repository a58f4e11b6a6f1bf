"""benchmarks.host_experts measures the same product each way, and counts the experts that have tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import host_experts
from benchmarks.host_experts import Stack
from benchmarks.host_linear import Reader

STACK = Stack(experts=6, per_token=2, inputs=64, outputs=48)


@pytest.mark.parametrize("out_in", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ways_compute_the_same(dtype: str, out_in: bool) -> None:
    torch.manual_seed(0)
    stack = Stack(6, 2, 64, 48, out_in)
    stored = torch.randn(6, 48, 64) if out_in else torch.randn(6, 64, 48)
    matrices = stored.to(host_experts.DTYPES[dtype])
    matrices = matrices.transpose(1, 2) if out_in else matrices
    ends = host_experts._routed(stack, 3, seed=1)
    assert ends[-1] == 6
    x = torch.randn(6, 64).to(matrices.dtype)
    results = {way: product(x, matrices, ends) for way, product in host_experts._ways(dtype, matrices)}
    assert set(results) == {"vectorised", "vectorised, tiled", "vectorised, tiled through L2", "torch", "gathered"}
    tolerance = 1e-5 if dtype == "float32" else 4e-2
    for result in results.values():
        torch.testing.assert_close(result, results["gathered"], rtol=tolerance, atol=tolerance)


def test_each_token_has_experts_of_its_own_number_and_others_in_other_calls() -> None:
    for tokens in (1, 4):
        drawn = [host_experts._routed(STACK, tokens, seed) for seed in range(8)]
        for ends in drawn:
            counts = host_experts._counts(ends)
            assert counts.sum() == tokens * STACK.per_token
            assert counts.max() <= tokens, "no token goes to an expert twice"
        assert len({tuple(ends.tolist()) for ends in drawn}) > 1


def test_figures_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(host_experts.STACKS, "tiny", STACK)
    monkeypatch.setattr(host_experts, "fastest_reader", _reader)
    out = tmp_path / "out.json"
    fast = ["--threads", "1", "--rounds", "1", "--budget", "0.005", "--tokens", "1", "2"]
    assert host_experts.main([*fast, "--stacks", "tiny", "--dtypes", "float32", "--json", str(out)]) == 0
    figures: list[dict[str, Any]] = json.loads(out.read_text())["figures"]
    ways = ["vectorised", "vectorised, tiled", "vectorised, tiled through L2", "torch", "gathered"]
    assert [(one["way"], one["tokens"]) for one in figures] == [(way, tokens) for tokens in (1, 2) for way in ways]
    assert all(one["bytes_per_s"] > 0 and one["read_share"] > 0 for one in figures)
    assert "GB/s (of read)" in capsys.readouterr().out


def _reader(effort: Any) -> Reader:
    memory = torch.ones(1 << 18)
    return Reader("sum", 1e9, lambda index: memory.sum(), memory.nbytes)
