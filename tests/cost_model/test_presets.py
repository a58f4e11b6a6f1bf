"""The presets: complete, sourced, plausible, and the paper's machine gives the paper's figures."""

from __future__ import annotations

from functools import lru_cache

import pytest

from hetegen_compile.cost_model import (
    HardwareProfile,
    SplitProblem,
    accelerator_linear_s,
    host_linear_s,
    load_profile,
    preset_names,
    row_granularity,
    solve_split,
    unsourced_fields,
    upload_s,
)

EXPECTED = (
    "a10-xeon",
    "cpu-emulated",
    "h100-server",
    "h200-server",
    "rtx3060-laptop",
    "rtx4090-desktop",
    "t4-xeon",
)
presets = pytest.mark.parametrize("name", EXPECTED)


def test_these_are_the_presets() -> None:
    assert preset_names() == EXPECTED


@presets
def test_every_figure_has_a_source(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert unsourced_fields(profile) == ()


@presets
def test_what_a_source_calls_inferred_is_listed(name: str) -> None:
    profile = load_profile(name)
    for path, source in profile.sources.items():
        if source.startswith(("inferred", "fitted", "fictitious")):
            assert any(path == item or path.startswith(f"{item}.") for item in profile.inferred), path


def test_the_stand_in_says_that_it_is_fictitious() -> None:
    profile = load_profile("cpu-emulated")
    assert "fictitious" in profile.description
    assert profile.accelerator.memory_bytes == 8 * 2**30


@presets
def test_figures_are_consistent(name: str) -> None:
    profile = load_profile(name)
    up, host, device = profile.link.up, profile.host, profile.accelerator
    half = 0.05 if any(path.startswith("link") for path in profile.inferred) else 0.25  # measured ones differ
    assert up.pinned.at(0.25e6) == pytest.approx(up.pinned.at(16e6) / 2, rel=half)
    assert up.pageable.at(16e6) < up.pinned.at(16e6) < host.memory_bytes_per_s < device.memory_bytes_per_s
    for dtype, table in host.linear_bytes_per_s.items():
        for _, curve in table.curves:
            rates = [rate for _, rate in curve.points]
            assert rates == sorted(rates, reverse=True), f"{dtype}: the rate falls with the number of tokens"
        assert table.peak * host.contention + up.pinned.at(64e6) <= host.memory_bytes_per_s, "DRAM bounds the sum"
    for curve in (up.pinned, up.pageable, profile.link.down.pinned, profile.link.down.pageable):
        rates = [rate for _, rate in curve.points]
        assert rates == sorted(rates), "the rate rises with the size of a transfer"


@presets
def test_splitting_a_large_linear_beats_streaming_it_and_the_host_alone(name: str) -> None:
    profile = load_profile(name)
    streamed_s = upload_s(profile, 4096 * 14336 * 2)
    host_s = host_linear_s(profile, "bfloat16", 1, 4096 * 14336 * 2, 2 * 4096 * 14336, contended=False)
    assert linear_s(profile, 14336, 4096, "bfloat16") < min(streamed_s, host_s)


@lru_cache
def linear_s(profile: HardwareProfile, rows: int, columns: int, dtype: str) -> float:
    """Seconds of one split Linear of 16-bit weights at one token."""
    weight_bytes, flops = rows * columns * 2, 2 * rows * columns
    problem = SplitProblem(
        rows=rows,
        host_fixed_s=profile.fixed_s_per_split,
        host_s_per_row=host_linear_s(profile, dtype, 1, weight_bytes, flops) / rows,
        link_s_per_row=upload_s(profile, weight_bytes) / rows,
        accelerator_s_per_row=accelerator_linear_s(profile, dtype, 1, weight_bytes, flops) / rows,
    )
    return solve_split(problem, row_granularity(rows)).makespan_s
