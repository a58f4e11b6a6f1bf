"""Spreading memory over NUMA nodes, as far as a machine with one of them shows it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import platform
from pathlib import Path

import pytest

from hetegen_compile.host_memory import memory_nodes
from hetegen_compile.host_memory.memory_nodes import interleave

NBYTES = 4 * mmap.PAGESIZE


def pages() -> tuple[mmap.mmap, int]:
    """A mapping that nothing has touched, and its address."""
    memory = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.skipif(platform.machine() not in memory_nodes._MBIND, reason="its system call is not known")
def test_the_system_spreads_it_or_the_refusal_is_told(caplog: pytest.LogCaptureFixture) -> None:
    memory, address = pages()
    caplog.set_level(logging.WARNING, "hetegen_compile")
    if interleave(address, NBYTES, [0, 1]):
        policies = Path("/proc/self/numa_maps").read_text().splitlines()
        assert any(line.startswith(f"{address:x} interleave:") for line in policies)
        assert not caplog.records
    else:  # containers may forbid the call
        assert "not spread over memory nodes [0, 1]: mbind says" in caplog.text
    del memory


@pytest.mark.skipif(platform.machine() not in memory_nodes._MBIND, reason="its system call is not known")
def test_a_refusal_says_why(caplog: pytest.LogCaptureFixture) -> None:
    memory, address = pages()
    assert not interleave(address + 1, NBYTES, [0, 1])
    assert "not spread over memory nodes [0, 1]: mbind says" in caplog.text
    del memory


def test_one_node_needs_no_call(caplog: pytest.LogCaptureFixture) -> None:
    assert not interleave(1, NBYTES, [0])  # the address would be refused
    assert not caplog.records
