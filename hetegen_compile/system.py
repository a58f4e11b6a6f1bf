"""What the operating system says of this machine: processor, caches, memory nodes, memory and its limits.

Everything is read from Linux's /proc and /sys; what is missing there is answered by a fallback or None. The
functions take the file system's root as an argument, for tests. A leaf.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("hetegen_compile")

ROOT = Path("/")

FALLBACK_CACHE_BYTES = 64 << 20
"""Assumed last-level cache where the kernel does not say how large it is."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

_UNLIMITED_BYTES = 1 << 60
"""Version 1 of control groups writes "no limit" as a number near 2**63."""


class MemoryGroup(NamedTuple):
    """A control group that limits this process's memory: its limit (None: it has none) and where to read more."""

    folder: Path
    version: int
    limit_bytes: int | None


def cpu_model(root: Path = ROOT) -> str:
    """Model name of the first processor."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def last_level_cache_bytes(root: Path = ROOT, cpus: set[int] | None = None) -> int:
    """Bytes of all distinct last-level caches of the processors this process may use (or of ``cpus``).

    Falls back to 64 MiB, with a line in the log, where /sys does not say.
    """
    sizes: dict[str, int] = {}
    for cpu in usable_cpus() if cpus is None else cpus:
        caches = sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"), key=_cache_level)
        nbytes = _size(_read(caches[-1] / "size")) if caches else None
        if nbytes:
            sizes[_read(caches[-1] / "shared_cpu_list") or f"cpu {cpu}"] = nbytes
    if not sizes:
        logger.warning("the size of the last-level cache is unknown; assuming %d MiB", FALLBACK_CACHE_BYTES >> 20)
    return sum(sizes.values()) or FALLBACK_CACHE_BYTES


def usable_cpus() -> set[int]:
    """Numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def numa_nodes(cpus: set[int], root: Path = ROOT) -> tuple[int, ...]:
    """Memory nodes that these logical processors belong to; empty where the system does not tell."""
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    near = {int(folder.name.removeprefix("node")): _numbers(_read(folder / "cpulist")) for folder in folders}
    return tuple(sorted(node for node, own in near.items() if own & cpus))


def _numbers(text: str | None) -> set[int]:
    """The numbers of a list as Linux writes it: 0-3,8."""
    ranges = [part.partition("-") for part in (text or "").split(",") if part]
    return {number for lo, _, hi in ranges for number in range(int(lo), int(hi or lo) + 1)}


def physical_memory_bytes() -> int:
    """Main memory of the machine, whatever limits this process has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_groups(root: Path = ROOT) -> Iterator[MemoryGroup]:
    """The control groups (version 1 or 2) that this process's memory counts in, from its own up to the mount, which in
    a container may be the group itself."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, place = line.partition(":")
        controllers, _, group = place.partition(":")
        if controllers == "":
            yield from _upwards(root / "sys/fs/cgroup", group, 2, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _upwards(root / "sys/fs/cgroup/memory", group, 1, "memory.limit_in_bytes")


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """The tightest memory limit of this process's control groups; None: no limit."""
    return min((one.limit_bytes for one in memory_groups(root) if one.limit_bytes is not None), default=None)


def host_memory_bytes(root: Path = ROOT) -> int:
    """Main memory that this process may use."""
    return min(physical_memory_bytes(), memory_limit_bytes(root) or physical_memory_bytes())


def _upwards(mount: Path, group: str, version: int, name: str) -> Iterator[MemoryGroup]:
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        text = _read(folder / name) or ""
        limited = text.isdigit() and int(text) < _UNLIMITED_BYTES
        yield MemoryGroup(folder, version, int(text) if limited else None)


def _cache_level(folder: Path) -> int:
    level = _read(folder / "level") or ""
    return int(level) if level.isdigit() else 0


def _size(text: str | None) -> int | None:
    match = re.fullmatch(r"(\d+)([KMG]?)", text or "")
    return int(match[1]) * _UNITS[match[2]] if match else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
