"""Every kernel computes what ``F.linear`` computes: odd shapes, slices, strides, biases, both layouts of a weight."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.errors import HostKernelUnavailableError
from hetegen_compile.host_kernels import (
    INT8PACK,
    KERNELS,
    LINEAR,
    TILED,
    TILED_THROUGH_L2,
    VECTORISED,
    HostKernel,
    HostLinear,
    kernels_for,
    vectorised,
)
from hetegen_compile.host_kernels import kernels as kernels_module
from hetegen_compile.host_kernels.program import HostProgram, Place, Step
from hetegen_compile.host_kernels.vectorised import DTYPES, library

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest difference, relative to the largest result: half a unit of the result's type, and sums in float32."""

SHAPES = [(1, 1), (7, 5), (64, 100), (77, 1003), (256, 512)]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
OURS = [VECTORISED, TILED, TILED_THROUGH_L2]
kernels = pytest.mark.parametrize("kernel", [LINEAR, *OURS], ids=lambda kernel: kernel.name)


def assert_close(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    assert result.shape == exact.shape
    error = (result.double() - exact).abs().max() / exact.abs().max().clamp(min=1.0)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2g}"


@kernels
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 17])
def test_rows_of_a_larger_weight_give_columns_of_the_result(
    kernel: HostKernel, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    torch.manual_seed(0)
    rows, width = shape
    weight, bias = torch.randn(rows + 9, width).to(dtype), torch.randn(rows + 9).to(dtype)
    x = torch.randn(tokens, width).to(dtype)
    lo, hi = 4, 4 + rows
    exact = F.linear(x.double(), weight[lo:hi].double(), bias[lo:hi].double())
    assert_close(kernel.run(x, weight[lo:hi], bias, lo, hi, 0), exact, dtype)
    assert_close(kernel.run(x, weight[lo:hi], None, lo, hi, 0), exact - bias[lo:hi].double(), dtype)


@kernels
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 8])
def test_rows_of_an_in_out_weight_give_a_partial_sum(
    kernel: HostKernel, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    torch.manual_seed(0)
    rows, out = shape
    weight, bias = torch.randn(rows + 9, out).to(dtype), torch.randn(out).to(dtype)
    x = torch.randn(tokens, rows + 9).to(dtype)
    lo, hi = 5, 5 + rows
    exact = x[:, lo:hi].double() @ weight[lo:hi].double()
    assert_close(kernel.run(x, weight[lo:hi], None, lo, hi, 1), exact, dtype)
    assert_close(kernel.run(x, weight[lo:hi], bias, lo, hi, 1), exact + bias.double(), dtype)


@kernels
@dtypes
def test_activations_may_have_any_shape_and_strides(kernel: HostKernel, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 40).to(dtype)
    wide, tall = torch.randn(2, 3, 90).to(dtype), torch.randn(40, 5).to(dtype)
    for x in (wide[..., 7:47], wide[..., ::2][..., :40], tall.t(), torch.randn(40).to(dtype), wide[:, :1, :40]):
        exact = F.linear(x.double(), weight.double())
        assert_close(kernel.run(x, weight, None, 0, 24, 0), exact, dtype)
        exact = x[..., 3:27].double() @ weight.double()
        assert_close(kernel.run(x, weight, None, 3, 27, 1), exact, dtype)


@kernels
@dtypes
def test_a_weight_whose_rows_lie_apart(kernel: HostKernel, dtype: torch.dtype) -> None:
    weight, x = torch.randn(50, 64).to(dtype)[::2, 3:40], torch.randn(4, 37).to(dtype)
    assert weight.stride() == (128, 1)
    assert_close(kernel.run(x, weight, None, 0, 25, 0), F.linear(x.double(), weight.double()), dtype)
    x = torch.randn(3, 25).to(dtype)
    assert_close(kernel.run(x, weight, None, 0, 25, 1), x.double() @ weight.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1])
def test_sums_are_float32(dtype: torch.dtype, dim: int) -> None:
    """4096 ones and a 1 more: 4097 is no 16-bit number, but 4096 - 4095 is 1 only if no sum was rounded."""
    x = torch.ones(1, 8192, dtype=dtype)
    x[0, 4097:] = -1.0
    weight = torch.ones(1, 8192, dtype=dtype) if dim == 0 else torch.ones(8192, 1, dtype=dtype)
    result = VECTORISED.run(x, weight, None, 0, weight.shape[0], dim)
    assert result.item() == 4097 - 4095


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_threads_do_not_change_the_result(kernel: HostKernel, tokens: int, dim: int) -> None:
    weight, x = torch.randn(1500, 300), torch.randn(tokens, 300 if dim == 0 else 1500)
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(kernel.run(x, weight, None, 0, 1500, dim))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@dtypes
@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("rows", [999, 3001])
def test_blocks_of_rows_are_added_up(kernel: HostKernel, dtype: torch.dtype, tokens: int, rows: int) -> None:
    torch.manual_seed(0)
    out = 130
    assert library().partial_blocks(tokens, out, rows) > 1
    weight, bias, x = (torch.randn(*shape).to(dtype) for shape in ((rows, out), (out,), (tokens, rows)))
    exact = x.double() @ weight.double() + bias.double()
    assert_close(kernel.run(x, weight, bias, 0, rows, 1), exact, dtype)


@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("tokens", "out", "rows"), [(64, 2001, 300), (9, 1030, 150), (1, 2001, 70)])
def test_few_blocks_are_cut_for_more_threads(kernel: HostKernel, tokens: int, out: int, rows: int) -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    assert library().partial_blocks(tokens, out, rows) <= 5
    weight, bias, x = torch.randn(rows, out), torch.randn(out), torch.randn(tokens, rows)
    try:
        torch.set_num_threads(8)
        found = kernel.run(x, weight, bias, 0, rows, 1)
    finally:
        torch.set_num_threads(threads)
    assert_close(found, x.double() @ weight.double() + bias.double(), torch.float32)


@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.name)
def test_no_tokens(kernel: HostKernel) -> None:
    for dim, columns in ((0, 48), (1, 1500)):
        assert kernel.run(torch.ones(0, 1500 if dim == 0 else 48), torch.ones(48, 1500), None, 0, 48, dim).shape == (
            0,
            columns,
        )


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="threads are on all processors"
)
def test_a_thread_that_has_one_processor_makes_the_same_blocks() -> None:
    """Who makes room for sums and who computes them may be threads with other processors."""
    found: list[int] = []

    def count() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread
        found.append(library().partial_blocks(1, 4096, 4900))

    expected = library().partial_blocks(1, 4096, 4900)
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    assert found == [expected]


def test_what_one_thread_computes_is_one_block() -> None:
    assert library().partial_blocks(1, 64, 1000) == 1
    assert library().partial_blocks(4, 64, 1000) > 1


@pytest.mark.parametrize(("tokens", "out", "rows"), [(1, 16384, 53248), (16, 8192, 28672), (3, 5000, 100_001)])
def test_sums_of_all_blocks_are_16_mib_at_most(tokens: int, out: int, rows: int) -> None:
    blocks = library().partial_blocks(tokens, out, rows)
    assert blocks > 1
    assert 4 * blocks * tokens * out <= 16 << 20


def test_nothing_of_the_weights_is_kept() -> None:
    weight, x = torch.randn(64, 64), torch.randn(1, 64)
    VECTORISED.run(x, weight, None, 0, 64, 0)
    weight.zero_()
    assert VECTORISED.run(x, weight, None, 0, 64, 0).abs().max() == 0


def test_the_gil_is_released_while_it_runs() -> None:
    """A long call: were the GIL held, the other thread could not count until it had ended."""
    weight, x = torch.ones(4096, 4096), torch.ones(64, 4096)
    VECTORISED.prepare()
    running, counted = threading.Event(), 0

    def compute() -> None:
        running.set()
        VECTORISED.run(x, weight, None, 0, 4096, 0)

    thread = threading.Thread(target=compute)
    thread.start()
    running.wait()
    while thread.is_alive():
        counted += 1
        time.sleep(1e-4)
    assert counted > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_weights_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    weight = torch.randint(-127, 127, (48, 64), dtype=torch.int8)
    x, bias = torch.randn(2, 3, 64).to(dtype), torch.randn(80).to(dtype)
    exact = F.linear(x.double(), weight[8:40].double())
    assert_close(INT8PACK.run(x, weight[8:40], None, 8, 40, 0), exact, dtype)
    result = INT8PACK.run(x, weight[8:40], bias, 8, 40, 0)
    torch.testing.assert_close(result.double(), exact + bias[8:40].double(), rtol=2e-2, atol=2.0)
    with pytest.raises(HostKernelUnavailableError, match=r"\[out, in\]"):
        INT8PACK.run(x, weight[8:40], None, 8, 40, 1)
    with pytest.raises(HostKernelUnavailableError, match="multiple of 16 columns, not 63"):
        INT8PACK.run(x[..., :63], weight[:, :63].contiguous(), None, 0, 48, 0)
    assert "63 columns" in (INT8PACK.refusal(weight[:, :63].contiguous()) or "")
    assert "gaps between the rows" in (INT8PACK.refusal(weight[:, :32]) or "")


@pytest.mark.parametrize("tiled", [TILED, TILED_THROUGH_L2], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 130])
def test_tiles_for_one_token_and_the_rows_that_are_left(rows: int, dtype: torch.dtype, tiled: HostKernel) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, 1003), (rows,)))
    x = torch.randn(1, 1003, generator=generator).to(dtype)
    found = tiled.run(x, weight, bias, 0, rows, 0)
    expected = VECTORISED.run(x, weight, bias, 0, rows, 0)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    wide = torch.randn(rows, 2000, generator=generator).to(dtype)[:, 500:1503]  # lines with gaps between them
    torch.testing.assert_close(
        tiled.run(x, wide, None, 0, rows, 0), VECTORISED.run(x, wide, None, 0, rows, 0), rtol=TOLERANCE[dtype],
        atol=10 * TOLERANCE[dtype],
    )  # fmt: skip


@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.name)
@dtypes
@pytest.mark.parametrize("columns", [7, 300, 700, 1030, 2100, 4500])
@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_with_gaps_between_them(kernel: HostKernel, dtype: torch.dtype, columns: int, tokens: int) -> None:
    """Sums come in three pieces, by what is prefetched meanwhile: of rows shorter and longer than the ways ahead."""
    torch.manual_seed(0)
    weight, x = torch.randn(61, 5000).to(dtype)[:, 11 : 11 + columns], torch.randn(tokens, columns).to(dtype)
    exact = F.linear(x.double(), weight.double())
    assert_close(kernel.run(x, weight, None, 0, 61, 0), exact, dtype)


def test_the_registry() -> None:
    assert {name: kernel.name for name, kernel in KERNELS.items()} == {name: name for name in KERNELS}
    assert kernels_for(torch.bfloat16) == (LINEAR, *OURS)
    assert kernels_for(torch.float64) == (LINEAR,)
    assert kernels_for(torch.int8) == (INT8PACK,)
    assert kernels_for(torch.complex64) == ()


def test_a_kernel_says_what_it_cannot() -> None:
    assert VECTORISED.refusal(torch.ones(4, 4)) is None
    assert "torch.float64" in (VECTORISED.refusal(torch.ones(4, 4, dtype=torch.float64)) or "")
    assert "strides (1, 4)" in (VECTORISED.refusal(torch.ones(4, 4).t()) or "")
    assert LINEAR.refusal(torch.ones(4, 4).t()) is None


def test_a_compiler_that_fails_with_programs_still_builds_the_linears(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.codecache import CppCodeCache

    load = CppCodeCache.load

    def fail(source: str) -> Any:
        if "run_trip" in source:
            raise RuntimeError("internal compiler error\nin a long trace")
        return load(source)

    monkeypatch.setattr(CppCodeCache, "load", fail)
    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # without optimisation, which takes half a minute
    for function in (vectorised.library, vectorised._build):
        function.cache_clear()
    try:
        linear = HostLinear(0, 8, 0, ((float("inf"), VECTORISED),))
        step = Step(linear, (0, 1, None), (Place(0), Place(1), None), {})
        program, x, rows = HostProgram([step], 2, (2,)), torch.randn(1, 16), torch.randn(8, 16)
        assert program.form((x, rows)) is None
        torch.testing.assert_close(program(x, rows)[0], torch.nn.functional.linear(x, rows))
        assert VECTORISED.refusal(rows) is None
        assert caplog.text.count("host programs cannot be built") == 1
        assert "internal compiler error" in caplog.text
        assert "long trace" not in caplog.text
    finally:
        for function in (vectorised.library, vectorised._build):
            function.cache_clear()


def test_a_library_that_a_killed_compiler_left_is_built_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch takes a file in its cache for a whole one."""
    from torch._inductor.codecache import CppCodeCache

    load, asked = CppCodeCache.load, list[str]()

    def short(source: str) -> Any:
        asked.append(source)
        if len(asked) == 1:
            raise ImportError("main.so: file too short")
        return load(asked[0])

    monkeypatch.setattr(CppCodeCache, "load", short)
    for function in (vectorised.library, vectorised._build):
        function.cache_clear()
    try:
        assert VECTORISED.refusal(torch.ones(4, 4)) is None
        assert asked[1] == f"{asked[0]}\n// built anew\n"
        assert "main.so: file too short" in caplog.text
    finally:
        for function in (vectorised.library, vectorised._build):
            function.cache_clear()


def test_without_a_compiler_the_reason_is_given_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codecache import CppCodeCache

    attempts: list[str] = []

    def fail(source: str) -> None:
        attempts.append(source)
        raise RuntimeError("no g++ here\nand a long trace")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    for function in (vectorised.library, vectorised._build):
        function.cache_clear()
    try:
        reasons = {VECTORISED.refusal(torch.ones(4, 4)) for _ in range(2)}
        assert len(attempts) == 2, "with host programs and without"
        (reason,) = reasons
        assert reason is not None
        assert reason.endswith("no g++ here")
        assert "install a C++ compiler" in reason
    finally:
        vectorised._build.cache_clear()


def test_torchs_own_linear_is_given_usual_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token behind attention has others, with which it takes up to 60 times as long in bfloat16."""
    seen: list[tuple[int, ...]] = []

    def linear_rows(x: Tensor, rows: Tensor, *more: Any) -> Tensor:
        seen.append(x.stride())
        return F.linear(x, rows)

    monkeypatch.setattr(kernels_module, "linear_rows", linear_rows)
    odd = torch.randn(64).as_strided((1, 1, 64), (64, 8, 1))
    LINEAR.run(odd, torch.randn(3, 64), None, 0, 3, 0)
    assert seen == [(64, 64, 1)]
