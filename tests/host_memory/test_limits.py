"""Limits on host memory: the files and the process's own limits, each the tightest in its turn."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from hetegen_compile.host_memory.limits import HostLimits, Room, read_limits

MIB = 2**20


def write(root: Path, **files: str) -> None:
    """Files by their path, with ``__`` for ``/`` and ``_DOT_`` for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 4 GiB available, no cgroup and a process without limits."""
    write(
        tmp_path,
        proc__meminfo="MemTotal:       1024 kB\nMemAvailable:    4194304 kB\n",
        proc__self__status="VmSize:\t  2048 kB\nVmLck:\t     4 kB\nVmData:\t  1024 kB\n",
    )
    set_limits(monkeypatch)
    return tmp_path


def set_limits(monkeypatch: pytest.MonkeyPatch, **soft: int) -> None:
    """Soft limits of the process by name."""
    known = {getattr(resource, name): value for name, value in soft.items()}
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (known.get(which, resource.RLIM_INFINITY), resource.RLIM_INFINITY)
    )


def rooms(root: Path) -> list[Room]:
    return list(read_limits(root).rooms)


def test_available_memory_counts_and_the_total_does_not(root: Path) -> None:
    assert read_limits(root) == HostLimits((Room(4 << 30, "memory available"),))


def test_a_system_that_tells_nothing_has_no_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, RLIMIT_AS=1)
    assert read_limits(tmp_path) == HostLimits()
    assert HostLimits().room() is None


def test_cgroup_v2_counts_page_cache_as_free(root: Path) -> None:
    write(
        root,
        proc__self__cgroup="0::/user/app\n",
        sys__fs__cgroup__user__app__memory_DOT_max=f"{100 * MIB}\n",
        sys__fs__cgroup__user__app__memory_DOT_current=f"{70 * MIB}\n",
        sys__fs__cgroup__user__app__memory_DOT_stat=f"anon 5\nactive_file {10 * MIB}\ninactive_file {20 * MIB}\n",
        sys__fs__cgroup__user__memory_DOT_max="max\n",
        sys__fs__cgroup__user__memory_DOT_current=f"{80 * MIB}\n",
    )
    assert rooms(root) == [Room(4 << 30, "memory available"), Room(60 * MIB, "cgroup memory limit")]
    assert read_limits(root).room() == Room(60 * MIB, "cgroup memory limit")


def test_the_limit_of_a_group_above_counts_too(root: Path) -> None:
    write(
        root,
        proc__self__cgroup="0::/user/app\n",
        sys__fs__cgroup__user__memory_DOT_max=str(10 * MIB),
        sys__fs__cgroup__user__memory_DOT_current=str(50 * MIB),
    )
    assert read_limits(root).room() == Room(0, "cgroup memory limit")


def test_in_a_container_the_mount_is_the_group(root: Path) -> None:
    write(
        root,
        proc__self__cgroup="0::/../outside/the/container\n",
        sys__fs__cgroup__memory_DOT_max=str(10 * MIB),
        sys__fs__cgroup__memory_DOT_current=str(4 * MIB),
    )
    assert read_limits(root).room() == Room(6 * MIB, "cgroup memory limit")


def test_cgroup_v1(root: Path) -> None:
    write(
        root,
        proc__self__cgroup="5:cpu:/\n4:hugetlb,memory:/job\n0::/\n",
        sys__fs__cgroup__memory__job__memory_DOT_limit_in_bytes=str(64 * MIB),
        sys__fs__cgroup__memory__job__memory_DOT_usage_in_bytes=str(32 * MIB),
        sys__fs__cgroup__memory__job__memory_DOT_stat=f"cache 1\ntotal_inactive_file {8 * MIB}\n",
        sys__fs__cgroup__memory__memory_DOT_limit_in_bytes="9223372036854771712",
        sys__fs__cgroup__memory__memory_DOT_usage_in_bytes=str(32 * MIB),
    )
    assert rooms(root)[1:] == [Room(40 * MIB, "cgroup memory limit")]


def test_limits_of_the_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, RLIMIT_AS=10 * MIB, RLIMIT_DATA=3 * MIB, RLIMIT_MEMLOCK=64 * 1024)
    found = read_limits(root)
    assert found.rooms[1:] == (Room(8 * MIB, "RLIMIT_AS"), Room(2 * MIB, "RLIMIT_DATA"))
    assert found.room() == Room(2 * MIB, "RLIMIT_DATA")
    assert found.locked == Room(60 * 1024, "RLIMIT_MEMLOCK")


def test_this_machine_has_memory_left() -> None:
    room = read_limits().room()
    assert room is not None
    assert room.nbytes > MIB
