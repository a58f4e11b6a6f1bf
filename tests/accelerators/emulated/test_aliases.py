"""Races that are found when two operations run on the same memory, and memory that is somebody else's by then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hetegen_compile.accelerators.emulated.aliases import AliasChecks
from hetegen_compile.accelerators.emulated.clocks import COMPUTE, DOWN, Clocks
from hetegen_compile.errors import MissingWaitError


@pytest.mark.parametrize("write_first", [False, True])
def test_a_download_and_a_write_of_the_same_memory_need_an_order(write_first: bool) -> None:
    checks, clocks, memory = AliasChecks(), Clocks(), torch.zeros(8)
    read, write = clocks.issue(DOWN, "a download"), clocks.issue(COMPUTE, "a write")
    accesses: list[Callable[[], None]] = [
        lambda: checks.read(memory[2:4], read, clocks.now(DOWN)),
        lambda: checks.write(memory[3:], write, clocks.now(COMPUTE)),
    ]
    first, second = reversed(accesses) if write_first else accesses
    first()
    with pytest.raises(MissingWaitError, match="a write overwrites, through an alias, what a download"):
        second()


def test_memory_that_was_given_back_is_another_value() -> None:
    """With the worker compute may go on before anybody has waited for a download, which is over nevertheless."""
    memory = bytearray(32)
    checks, clocks = AliasChecks(), Clocks()
    read, write = clocks.issue(DOWN, "a download"), clocks.issue(COMPUTE, "a write")
    downloaded = torch.frombuffer(memory, dtype=torch.float32)
    checks.read(downloaded, read, clocks.now(DOWN))
    del downloaded
    checks.write(torch.frombuffer(memory, dtype=torch.float32), write, clocks.now(COMPUTE))
