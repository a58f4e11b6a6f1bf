"""What a schedule occupies: never less than what is there when it runs, and right at other sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from hetegen_compile import ir
from hetegen_compile.ir import PARTIAL_LINEAR, info
from hetegen_compile.passes.findings import MemoryNeed
from hetegen_compile.passes.measure_memory import measure_memory
from tests.passes.graphs import Case, quarters, resident, scheduled

ROW = 256 * 4
LINEAR, OTHER = nn.Linear(256, 256), nn.Linear(256, 256)


def measured(found: Case) -> MemoryNeed:
    return measure_memory(found.module, found.context)


def peak(found: Case) -> int:
    return measured(found).peak_bytes(found.context.number)


def test_a_value_lives_until_its_last_reader() -> None:
    found = scheduled(lambda x: OTHER(LINEAR(x)), torch.randn(8, 256), plan=resident)
    assert peak(found) == 2 * 8 * ROW  # the second Linear's part beside what it reads, and then beside its join


def test_on_a_gpu_the_largest_value_counts_once_more() -> None:
    found = scheduled(lambda x: OTHER(LINEAR(x)), torch.randn(8, 256), plan=resident)
    alone = peak(found)
    found.context = replace(found.context, device=torch.device("cuda:0"))
    assert peak(found) == alone + 8 * ROW


def test_what_the_links_queue_brings_up_counts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocator keeps its memory for the stream that it came up on."""

    def twice(x: Tensor) -> Any:
        return OTHER(torch.relu(LINEAR(x)).repeat(1, 1).cos())

    monkeypatch.setattr(ir, "VIEWED_UPLOAD_BYTES", 0)
    found = scheduled(twice, torch.randn(8, 256))
    one, part = measured(found), 8 * ROW // 2
    monkeypatch.setattr(ir, "SMALL_UPLOAD_BYTES", part - 1)
    assert measured(found) == one, "what is alive is all that counts without a GPU"
    found.context = replace(found.context, device=torch.device("cuda:0"))
    monkeypatch.setattr(ir, "SMALL_UPLOAD_BYTES", part)
    assert measured(found).uploads == ()
    monkeypatch.setattr(ir, "SMALL_UPLOAD_BYTES", part - 1)
    queued = measured(found)
    assert [size for _, _, size in queued.uploads] == [part, part], "the host's halves of two results"
    assert sorted(map(str, (*queued.lives, *queued.uploads))) == sorted(map(str, one.lives))
    alone = replace(queued, uploads=()).peak_bytes(float)
    assert queued.peak_bytes(float) == alone + part
    assert alone - 8 * ROW <= one.peak_bytes(float) <= alone + part


def test_what_goes_down_at_the_end_lives_until_then() -> None:
    def kept(x: Tensor) -> tuple[Tensor, Tensor]:
        early = LINEAR(x)
        return OTHER(torch.relu(early)), early

    def dropped(x: Tensor) -> Any:
        return OTHER(torch.relu(LINEAR(x)))

    made, part = 8 * ROW, 8 * ROW // 2  # half of a Linear's rows are the host's
    assert peak(scheduled(dropped, torch.randn(8, 256))) == 2 * made  # around the relu
    assert peak(scheduled(kept, torch.randn(8, 256))) == 2 * made + part  # the second Linear's, before its join


def test_inner_values_of_a_segment_count_while_it_runs() -> None:
    def wide(x: Tensor) -> Any:
        y = LINEAR(x)
        return OTHER(torch.cat([y] * 10, dim=-1).view(-1, 10, 256).sum(1))

    narrow = scheduled(lambda x: OTHER(torch.relu(LINEAR(x))), torch.randn(8, 256))
    found = scheduled(wide, torch.randn(8, 256))
    assert peak(found) >= peak(narrow) + 9 * 8 * ROW
    workspace = [found.context.number(sympy.sympify(size)) for size in measured(found).workspace.values()]
    assert max(workspace) >= 80 * ROW


def test_what_an_operation_makes_beside_its_result_counts() -> None:
    """``rms_norm`` is several operations of ATen, one of which makes as much as the result."""

    def normed(x: Tensor) -> Any:
        return OTHER(nn.functional.rms_norm(LINEAR(x), (256,)))

    plain = scheduled(lambda x: OTHER(torch.relu(LINEAR(x))), torch.randn(8, 256))
    assert peak(scheduled(normed, torch.randn(8, 256))) >= peak(plain) + 8 * ROW


def test_a_small_view_of_something_large_counts_as_the_large_one() -> None:
    def last(x: Tensor) -> Any:
        return OTHER((LINEAR(x) + 1)[-1:])

    assert peak(scheduled(last, torch.randn(64, 256))) >= 64 * ROW + 64 * ROW


def test_partial_sums_of_in_out_weights_count_their_columns_and_sums() -> None:
    weight, bias = nn.Parameter(torch.randn(256, 256)), nn.Parameter(torch.randn(256))
    found = scheduled(lambda x: torch.addmm(bias, x, weight), torch.randn(8, 256), plan=quarters)
    need = measured(found)
    parts = [node for node in found.nodes(PARTIAL_LINEAR) if info(node).side == "accelerator"]
    columns = [int(found.context.number(sympy.sympify(need.workspace[node]))) for node in parts]
    assert set(columns) <= {8 * ROW // 4, 8 * ROW // 4 + 8 * ROW}
    assert len(columns) == 3


@pytest.mark.parametrize("function", [lambda x: OTHER(torch.relu(LINEAR(x))), lambda x: LINEAR(x).cumsum(0) @ x.t()])
def test_bytes_at_other_sizes(function: Callable[..., Any]) -> None:
    small, large = (scheduled(function, torch.randn(n, 256), dynamic=True) for n in (5, 50))
    (symbol,) = small.context.sizes
    there = measured(small).peak_bytes(lambda size: float(size.xreplace({symbol: sympy.Integer(50)})))
    assert there == measured(large).peak_bytes(large.context.number)
    assert measured(small).peak_bytes(small.context.number) < there
