"""What goes up together: siblings that one node needs, unless waiting for the last of them costs more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile import ir
from hetegen_compile.cost_model import HardwareProfile, RateCurve
from hetegen_compile.ir import HOST_LINEAR, TO_ACCELERATOR, TO_HOST
from hetegen_compile.passes.node_work import transfer_up_s
from hetegen_compile.passes.predict_step import predict_step
from tests.passes.graphs import PROFILE, Case, assert_equal_to_eager, halves, on_host, scheduled

Q, K, V, OUT = (nn.Linear(64, 64) for _ in range(4))
TABLE = nn.Embedding(64, 64)


def attention(x: Tensor) -> Any:
    """Three siblings, one reader of all of them."""
    x = x + 1
    return OUT(Q(x) + K(x) * V(x))


def two_readers(x: Tensor) -> Any:
    """OUT needs Q and K; their sibling V is needed only behind OUT."""
    x = x + 1
    return OUT(Q(x) + K(x)) + V(x)


def moved(found: Case) -> list[int]:
    """How many values each transfer brings up, in the order of issue."""
    return [len(up.args[0]) for up in found.nodes(TO_ACCELERATOR)]


def with_slow_host(seconds: float, fixed_s: float = PROFILE.fixed_s_per_split) -> HardwareProfile:
    """A host on which every operation takes so long, and trips that cost ``fixed_s``."""
    return replace(PROFILE, host=replace(PROFILE.host, launch_s=seconds), fixed_s_per_split=fixed_s)


def test_siblings_go_up_in_one_transfer() -> None:
    found = scheduled(attention, torch.randn(1, 64))
    assert moved(found) == [3, 1]
    assert len(found.nodes(HOST_LINEAR)) == 4
    assert_equal_to_eager(attention, torch.randn(1, 64))


def test_what_another_node_needs_first_goes_up_by_itself() -> None:
    found = scheduled(two_readers, torch.randn(1, 64))
    assert len(found.nodes(TO_HOST)) == 3  # all three siblings come down in one, then OUT's input, then the result
    assert moved(found) in ([2, 1, 1], [1, 2, 1])
    assert_equal_to_eager(two_readers, torch.randn(1, 64))


def test_large_results_go_up_while_the_host_computes_the_next() -> None:
    """What a copy of one result takes is longer than a trip, and the host works longer than that."""
    rows = 2 * ir.SMALL_UPLOAD_BYTES // 256
    x = torch.randn(rows, 64)
    slow_link = replace(PROFILE.link, up=replace(PROFILE.link.up, pinned=RateCurve.constant(1e9)))
    busy = replace(with_slow_host(0.1), link=slow_link)
    assert moved(scheduled(attention, x, plan=on_host, profile=busy)) == [1, 1, 1, 1]
    idle = replace(with_slow_host(1e-9), link=slow_link, fixed_s_per_split=1.0)
    assert moved(scheduled(attention, x, plan=on_host, profile=idle)) == [3, 1]


def test_results_stay_small_enough_to_be_read_where_they_lie() -> None:
    rows = ir.SMALL_UPLOAD_BYTES // 256 * 2 // 5  # two fit, three do not
    assert moved(scheduled(attention, torch.randn(rows, 64), plan=on_host)) == [2, 1, 1]


@pytest.mark.parametrize("fixed_s", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("host_s", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("rows", [1, 512])
def test_the_choice_is_as_good_as_any_in_the_simulation(rows: int, host_s: float, fixed_s: float) -> None:
    """Compared with all together and each alone; what one cut more or less may cost is one transfer."""
    x, profile = torch.randn(rows, 64), with_slow_host(host_s, fixed_s)

    def step_s(**changes: Any) -> float:
        found = scheduled(attention, x, plan=halves, profile=profile, **changes)
        return predict_step(found.module, found.context).step_s

    chosen = step_s()
    assert chosen <= step_s(share_trips=False) + transfer_up_s(scheduled(attention, x, profile=profile).context)


def test_values_that_the_host_computes_share_a_transfer_too() -> None:
    def function(ids: Tensor, more: Tensor) -> Any:
        return (TABLE(ids) * TABLE(more)).relu() + 1.0

    found = scheduled(function, torch.tensor([2]), torch.tensor([3]))
    assert moved(found) == [2]


@pytest.mark.parametrize("function", [attention, two_readers])
def test_equal_to_eager_with_transfers_of_their_own(function: Callable[[Tensor], Any]) -> None:
    found = assert_equal_to_eager(function, torch.randn(1, 64), share_trips=False)
    assert moved(found) == [1] * len(found.nodes(HOST_LINEAR))
