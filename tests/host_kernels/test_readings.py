"""How each kernel reads weights: its instructions, and which rows are not read in tiles. Results hardly tell."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest
import torch

from hetegen_compile.host_kernels import TILED, TILED_THROUGH_L2, VECTORISED, HostKernel
from hetegen_compile.host_kernels.vectorised import Reading, library

MANGLED = {"float32": "f", "bfloat16": "N3c108BFloat16E", "float16": "N3c104HalfE"}
"""How C++ names have the dtypes."""


def instructions() -> dict[str, set[str]]:
    """By function, the ways to prefetch and the readings that its instructions name."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(library()._handle._name)]
    found: dict[str, set[str]] = {}
    function = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1].removesuffix(">:")
        else:
            found.setdefault(function, set()).update(re.findall(r"prefetcht\d|ReadingE\d", line))
    return found


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no disassembler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other instructions")
def test_tiles_are_prefetched_into_their_cache() -> None:
    found = instructions()
    for reading in Reading:
        for dtype, letters in MANGLED.items():
            for form in ("linear", "grouped_linear", "partial_linear"):
                assert f"ReadingE{int(reading)}" in found[f"{reading.prefix}_{form}_{dtype}"]
            for form in ("dot_", "(partial|axpy)_"):
                name = re.compile(rf"{form}[a-z]+I{letters}LNS_7ReadingE{int(reading)}E")
                hints = {hint for function, named in found.items() if name.search(function) for hint in named}
                assert ("prefetcht1" in hints) == (reading is Reading.TILES_THROUGH_L2), (form, dtype, reading)
                assert reading is not Reading.TILES or "prefetcht0" in hints


@pytest.mark.parametrize("tiled", [TILED, TILED_THROUGH_L2], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("columns", "cut", "tokens", "by_rows"),
    [(512, 512, 1, True), (576, 576, 1, False), (576, 512, 1, False), (512, 512, 2, False)],
)
def test_of_one_token_short_rows_without_gaps_are_one_stream(
    tiled: HostKernel, columns: int, cut: int, tokens: int, by_rows: bool
) -> None:
    """Then sums are made as of rows one by one, else otherwise."""
    torch.manual_seed(0)
    weight, x = torch.randn(200, columns)[:, :cut], torch.randn(tokens, cut)
    rows, tiles = (kernel.run(x, weight, None, 0, 200, 0) for kernel in (VECTORISED, tiled))
    assert torch.equal(rows, tiles) == by_rows
