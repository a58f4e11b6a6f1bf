"""Seconds from work: which bound counts, and what a dtype without a figure costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.cost_model import (
    AcceleratorProfile,
    HardwareProfile,
    HostProfile,
    LinkDirection,
    LinkProfile,
    RateCurve,
    RateTable,
    accelerator_linear_s,
    accelerator_op_s,
    arithmetic_rate,
    download_s,
    host_linear_s,
    host_op_s,
    item_bytes,
    linear_rate,
    link_lost_s,
    load_profile,
    operation_s,
    preset_names,
    read_up_s,
    upload_s,
)

UP = LinkDirection(RateCurve(((1e3, 1e9), (1e6, 10e9))), RateCurve.constant(4e9), latency_s=2e-6)
DOWN = LinkDirection(RateCurve.constant(8e9), RateCurve.constant(2e9), latency_s=1e-6)
PROFILE = HardwareProfile(
    schema_version=1,
    name="round-numbers",
    description="figures that are easy to divide by",
    host=HostProfile(
        name="host",
        cores=4,
        flops_per_s={"float32": 1e12},
        memory_bytes_per_s=100e9,
        linear_bytes_per_s={"float32": RateTable.of(RateCurve(((1.0, 50e9), (4.0, 20e9))))},
        launch_s=1e-6,
        contention=0.5,
        memory_bytes=2**34,
    ),
    accelerator=AcceleratorProfile("device", {"float32": 1e13}, 1e12, launch_s=1e-5, memory_bytes=2**33),
    link=LinkProfile(UP, DOWN, view_s=3e-5),
    synchronise_s=1e-5,
    fixed_s_per_split=1e-4,
    pin_bytes_per_s=1e10,
    sources={"host": "made up"},
    inferred=(),
)


def test_an_operation_takes_the_longer_bound_and_its_fixed_cost() -> None:
    assert operation_s(100.0, 1.0, 10.0, 1.0, 0.5) == 10.5
    assert operation_s(10.0, 30.0, 10.0, 1.0, 0.5) == 30.5
    assert operation_s(0.0, 0.0, 10.0, 1.0, 0.5) == 0.5


def test_a_host_linear_is_bound_by_its_measured_rate_at_few_tokens() -> None:
    assert host_linear_s(PROFILE, "float32", 1, 50e9, 1e6, contended=False) == pytest.approx(1.0 + 1e-6)
    assert host_linear_s(PROFILE, "float32", 4, 50e9, 1e6, contended=False) == pytest.approx(2.5 + 1e-6)


def test_a_host_linear_is_bound_by_arithmetic_at_many_tokens() -> None:
    assert host_linear_s(PROFILE, "float32", 4096, 4e9, 8e12) == pytest.approx(8.0 + 1e-6)


def test_uploads_leave_a_share_of_the_memorys_rate_not_of_a_slower_linears() -> None:
    alone = host_linear_s(PROFILE, "float32", 4, 50e9, 0.0, contended=False)
    assert host_linear_s(PROFILE, "float32", 4, 50e9, 0.0) == alone  # 20 GB/s, and 25 of 50 are left
    between = host_linear_s(PROFILE, "float32", 2, 50e9, 0.0)
    assert between == pytest.approx(50e9 / 25e9 + 1e-6)


def test_contention_slows_the_measured_rate_only() -> None:
    alone = host_linear_s(PROFILE, "float32", 1, 50e9, 0.0, contended=False)
    assert host_linear_s(PROFILE, "float32", 1, 50e9, 0.0) == pytest.approx(2 * alone, rel=1e-5)
    bound = host_linear_s(PROFILE, "float32", 1, 1.0, 1e12)
    assert bound == host_linear_s(PROFILE, "float32", 1, 1.0, 1e12, contended=False)


def test_an_accelerator_linear_reads_its_weights_and_activations() -> None:
    weight_bytes = 4 * 1000 * 1000
    assert accelerator_linear_s(PROFILE, "float32", 0, weight_bytes, 0.0) == pytest.approx(1e-5 + 4e-6)
    assert accelerator_linear_s(PROFILE, "float32", 1000, weight_bytes, 0.0) == pytest.approx(1e-5 + 12e-6)
    assert accelerator_linear_s(PROFILE, "float32", 1, weight_bytes, 1e13) == pytest.approx(1.00001)


def test_other_operations_use_their_own_sides_rates() -> None:
    assert host_op_s(PROFILE, "float32", 1e12, 1.0) == pytest.approx(1.0 + 1e-6)
    assert host_op_s(PROFILE, "float32", 1.0, 100e9) == pytest.approx(1.0 + 1e-6)
    assert accelerator_op_s(PROFILE, "float32", 1e13, 1.0) == pytest.approx(1.0 + 1e-5)
    assert accelerator_op_s(PROFILE, "float32", 1.0, 1e12) == pytest.approx(1.0 + 1e-5)


def test_a_transfer_takes_its_direction_and_kind_of_memory() -> None:
    assert upload_s(PROFILE, 1e6) == pytest.approx(1e-4)
    assert upload_s(PROFILE, 1e6, pinned=False) == pytest.approx(2.5e-4)
    assert download_s(PROFILE, 1e6) == pytest.approx(1.25e-4)
    assert download_s(PROFILE, 1e6, pinned=False) == pytest.approx(5e-4)


@pytest.mark.parametrize(("dtype", "read_s"), [("float32", 1e6 / 25e9), ("float16", 1e6 / 12.5e9)])
def test_the_link_loses_a_share_of_the_time_in_which_the_host_reads(dtype: str, read_s: float) -> None:
    """At half of 50 GB/s beside the link; float16 has no table and is read as so many elements of float32."""
    profile = replace(PROFILE, link=replace(PROFILE.link, contention=0.8))
    assert link_lost_s(profile, dtype, 1e6) == pytest.approx(0.2 * read_s)
    assert read_s <= host_linear_s(profile, dtype, 1, 1e6, 0.0)
    assert link_lost_s(PROFILE, dtype, 1e6) == 0.0


def test_a_kernel_that_reads_host_memory_takes_its_start_and_the_bytes_at_the_links_best_rate() -> None:
    assert read_up_s(PROFILE, 0) == 3e-5
    assert read_up_s(PROFILE, 1e6) == pytest.approx(3e-5 + 1e6 / UP.pinned.points[-1][1])


def test_the_latency_is_the_floor_of_a_transfer_and_nothing_costs_nothing() -> None:
    assert upload_s(PROFILE, 1) == 2e-6
    assert download_s(PROFILE, 1) == 1e-6
    assert upload_s(PROFILE, 0) == download_s(PROFILE, 0) == 0.0


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("float32", 4),
        ("bfloat16", 2),
        ("float64", 8),
        ("int8", 1),
        ("int4", 0.5),
        ("complex64", 8),
        ("float8_e4m3fn", 1),
        ("bool", 1),
        ("odd", 4),
    ],
)
def test_the_width_of_a_dtype(dtype: str, width: float) -> None:
    assert item_bytes(dtype) == width


def test_a_dtype_without_a_figure_is_computed_as_float32() -> None:
    rates = {"float32": 8e12, "float16": 60e12}
    assert arithmetic_rate(rates, "float16") == 60e12
    assert arithmetic_rate(rates, "bfloat16") == arithmetic_rate(rates, "int8") == 8e12
    assert arithmetic_rate(rates, "float64") == 4e12
    assert arithmetic_rate({"int8": 2.0, "float16": 1.0}, "bfloat16") == 1.0


def constant(rate: float) -> RateTable:
    return RateTable.of(RateCurve.constant(rate))


def test_a_linear_without_a_figure_consumes_float32s_elements() -> None:
    tables = {"float32": constant(40e9), "int8": constant(30e9)}
    assert linear_rate(tables, "int8", 1, 1e6) == 30e9
    assert linear_rate(tables, "float16", 1, 1e6) == 20e9
    assert linear_rate(tables, "float64", 1, 1e6) == 40e9
    without = {"int8": constant(30e9), "float16": constant(20e9)}
    assert linear_rate(without, "float64", 1, 1e6) == 20e9


def test_a_linear_without_a_figure_is_as_large_as_its_float32_form() -> None:
    small, large = RateCurve.constant(10e9), RateCurve.constant(40e9)
    tables = {"float32": RateTable(((1e6, small), (4e6, large)))}
    assert linear_rate(tables, "float16", 1, 2e6) == 20e9
    assert linear_rate(tables, "float32", 1, 2e6) == pytest.approx(20e9)


def test_a_small_weight_has_its_own_rate() -> None:
    table = RateTable(((1e6, RateCurve.constant(10e9)), (1e8, RateCurve.constant(50e9))))
    profile = replace(PROFILE, host=replace(PROFILE.host, linear_bytes_per_s={"float32": table}))
    assert host_linear_s(profile, "float32", 1, 1e6, 0.0, contended=False) == pytest.approx(1e6 / 10e9 + 1e-6)
    assert host_linear_s(profile, "float32", 1, 1e9, 0.0, contended=False) == pytest.approx(1e9 / 50e9 + 1e-6)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int4", "float8_e4m3fn", "bool", "odd", "complex64"])
@pytest.mark.parametrize("name", preset_names())
def test_every_dtype_has_a_price_on_every_preset(name: str, dtype: str) -> None:
    profile = load_profile(name)
    assert 0.0 < host_linear_s(profile, dtype, 1, 1e6, 1e6) < 1.0
    assert 0.0 < accelerator_linear_s(profile, dtype, 1, 1e6, 1e6) < 1.0


@given(st.floats(1.0, 1e5), st.floats(1.0, 1e10), st.floats(0.0, 1e15))
def test_more_work_never_takes_less_time(tokens: float, nbytes: float, flops: float) -> None:
    for price in (host_linear_s, accelerator_linear_s):
        cost_s = price(PROFILE, "float32", tokens, nbytes, flops)
        assert cost_s <= price(PROFILE, "float32", tokens * 2, nbytes, flops)
        assert cost_s <= price(PROFILE, "float32", tokens, nbytes * 2, flops)
        assert cost_s <= price(PROFILE, "float32", tokens, nbytes, flops * 2)


def test_a_faster_host_is_faster() -> None:
    host = replace(PROFILE.host, linear_bytes_per_s={"float32": constant(100e9)})
    faster = replace(PROFILE, host=host)
    assert host_linear_s(faster, "float32", 1, 50e9, 0.0) < host_linear_s(PROFILE, "float32", 1, 50e9, 0.0)
