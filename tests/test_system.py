"""What /proc and /sys say, from folders made for the tests."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hetegen_compile.system import (
    FALLBACK_CACHE_BYTES,
    cpu_model,
    host_memory_bytes,
    last_level_cache_bytes,
    memory_limit_bytes,
    numa_nodes,
    physical_memory_bytes,
)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def add_cache(root: Path, cpu: int, index: int, level: int, size: str, shared: str) -> None:
    folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        write(root, f"{folder}/{name}", text)


def test_the_model_is_the_first_processors(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Fast: 3 GHz\nmodel name\t: Slow")
    assert cpu_model(tmp_path) == "Fast: 3 GHz"


def test_an_unknown_model_has_a_name(tmp_path: Path) -> None:
    assert cpu_model(tmp_path).strip()


def test_distinct_last_level_caches_add_up_and_shared_ones_count_once(tmp_path: Path) -> None:
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        add_cache(tmp_path, cpu, 0, 1, "64K", str(cpu))
        add_cache(tmp_path, cpu, 3, 3, "32M", shared)
    assert last_level_cache_bytes(tmp_path, {0, 1, 2, 3}) == 64 << 20
    assert last_level_cache_bytes(tmp_path, {0, 1}) == 32 << 20


def test_the_highest_level_counts_whatever_its_index(tmp_path: Path) -> None:
    add_cache(tmp_path, 0, 0, 2, "2048K", "0")
    add_cache(tmp_path, 0, 1, 1, "32K", "0")
    assert last_level_cache_bytes(tmp_path, {0}) == 2 << 20


def test_the_nodes_of_the_processors_that_may_be_used(tmp_path: Path) -> None:
    write(tmp_path, "sys/devices/system/node/node0/cpulist", "0-3,8")
    write(tmp_path, "sys/devices/system/node/node1/cpulist", "4-7,9-11")
    write(tmp_path, "sys/devices/system/node/node2/cpulist", "")  # memory without processors
    assert numa_nodes({0, 8, 10}, tmp_path) == (0, 1)
    assert numa_nodes({9}, tmp_path) == (1,)
    assert numa_nodes({0}, tmp_path / "nothing") == ()


@pytest.mark.parametrize("size", [None, "many", "0K"])
def test_an_unknown_cache_has_the_fallback_and_a_line(
    tmp_path: Path, size: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if size is not None:
        add_cache(tmp_path, 0, 3, 3, size, "0")
    with caplog.at_level(logging.WARNING, logger="hetegen_compile"):
        assert last_level_cache_bytes(tmp_path, {0}) == FALLBACK_CACHE_BYTES
    assert "64 MiB" in caplog.text


def test_the_tightest_limit_of_the_group_and_its_parents_counts(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/outer/inner")
    write(tmp_path, "sys/fs/cgroup/outer/memory.max", "1000")
    write(tmp_path, "sys/fs/cgroup/outer/inner/memory.max", "max")
    assert memory_limit_bytes(tmp_path) == 1000
    assert host_memory_bytes(tmp_path) == 1000


def test_version_1_groups_are_read(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:hugetlb,memory:/a")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    write(tmp_path, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2000")
    assert memory_limit_bytes(tmp_path) == 2000


@pytest.mark.parametrize("groups", [None, "0::/", "nonsense"])
def test_without_a_limit_all_of_main_memory_may_be_used(tmp_path: Path, groups: str | None) -> None:
    if groups is not None:
        write(tmp_path, "proc/self/cgroup", groups)
    assert memory_limit_bytes(tmp_path) is None
    assert host_memory_bytes(tmp_path) == physical_memory_bytes() > 0


def test_a_group_cannot_lead_out_of_its_mount(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/../../../secret")
    write(tmp_path, "secret/memory.max", "1")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    assert memory_limit_bytes(tmp_path) is None
