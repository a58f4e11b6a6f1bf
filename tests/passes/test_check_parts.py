"""A part of a Linear that is missing, doubled or not what it says is an error of the verifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hetegen_compile import ir
from hetegen_compile.errors import ScheduleError
from hetegen_compile.passes.check_parts import check_parts
from tests.passes.graphs import Case, quarters, scheduled

UP, DOWN = nn.Linear(64, 128), nn.Linear(128, 64)


def mlp(x: Tensor) -> Any:
    return DOWN(F.relu(UP(x)))


def block() -> Case:
    return scheduled(mlp, torch.randn(1, 64), paired=0.25, ring_bytes=2**15)


def last(found: Case, target: Any) -> fx.Node:
    node: fx.Node = found.nodes(target)[-1]
    return node


def shorter_host_part(found: Case) -> None:
    last(found, ir.HOST_LINEAR).update_arg(4, 16)


def wider_host_part(found: Case) -> None:
    last(found, ir.HOST_LINEAR).update_arg(4, 48)


def other_rectangle(found: Case) -> None:
    last(found, ir.PREFETCH).update_arg(1, [0, 64, 64, 128])


def lost_rows(found: Case) -> None:
    last(found, ir.PREFETCH).update_arg(1, [0, 32, 32, 128])


def other_place(found: Case) -> None:
    last(found, ir.PAD).update_arg(2, [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorter_host_part, r"1024 elements of .* are used by no part"),
        (wider_host_part, r"uses elements of .* that .* uses as well"),
        (other_rectangle, r"is the part 32:128, but reads 64:128 of .*missing edge: a prefetch of 32:128"),
        (lost_rows, r"3072 elements of .* are used by no part"),
        (other_place, r"columns from 32 on, at column 0"),
    ],
)
def test_changed_blocks(change: Callable[[Case], None], message: str) -> None:
    found = block()
    check_parts(found.module.graph)
    change(found)
    with pytest.raises(ScheduleError, match=message):
        check_parts(found.module.graph)


def test_rows_in_all_places() -> None:
    found = scheduled(mlp, torch.randn(1, 64), plan=quarters, ring_bytes=2**15)
    check_parts(found.module.graph)
    last(found, ir.RESIDENT).update_arg(1, 40)
    with pytest.raises(ScheduleError, match="is the part 48:64, but reads 40:64"):
        check_parts(found.module.graph)
