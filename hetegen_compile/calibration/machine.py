"""What this machine is: processor, caches, memory and its limits, GPU.

Everything is read from Linux's /proc and /sys; what is missing there is answered by a fallback or None. The
functions take the file system's root as an argument, for tests.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from hetegen_compile.cost_model import SCHEMA_VERSION
from hetegen_compile.host_kernels.vectorised import sources_digest

logger = logging.getLogger("hetegen_compile")

METHOD_VERSION = 7
"""Of what a calibration measures and how; a profile that an earlier method measured is measured anew. So is one of
other host kernels, by their sources."""

ROOT = Path("/")

FALLBACK_CACHE_BYTES = 64 << 20
"""Assumed last-level cache where the kernel does not say how large it is."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Machine:
    """What a measured profile depends on.

    Attributes:
        cpu: the processor's model.
        gpu: the CUDA device's name; None: none is used.
        torch_version: with its build ("2.13.0+cpu").
        threads: intra-op threads that torch computes with.
    """

    cpu: str
    gpu: str | None
    torch_version: str
    threads: int

    @property
    def key(self) -> str:
        """32 hexadecimal digits that differ whenever a profile must be measured anew."""
        identity = json.dumps([SCHEMA_VERSION, METHOD_VERSION, sources_digest(), *astuple(self)])
        return hashlib.sha256(identity.encode()).hexdigest()[:32]

    @property
    def profile_name(self) -> str:
        """Name of the profile that was measured here."""
        return f"calibrated-{self.key}"

    def __str__(self) -> str:
        return f"{self.cpu}, {self.threads} thread(s), GPU: {self.gpu or 'none'}, torch {self.torch_version}"


def this_machine(*, cuda: bool) -> Machine:
    """The machine that this process runs on, with the current CUDA device if ``cuda``."""
    gpu = torch.cuda.get_device_name(torch.cuda.current_device()) if cuda else None
    return Machine(cpu_model(), gpu, torch.__version__, torch.get_num_threads())


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


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """The tightest memory limit of this process's control groups (version 1 or 2); None: no limit."""
    limits: list[int] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, place = line.partition(":")
        controllers, _, group = place.partition(":")
        if controllers in ("", "memory"):
            limits += _limits(root / "sys/fs/cgroup" / controllers, group)
    return min(limits, default=None)


def host_memory_bytes(root: Path = ROOT) -> int:
    """Main memory that this process may use."""
    return min(physical_memory_bytes(), memory_limit_bytes(root) or physical_memory_bytes())


def _limits(mount: Path, group: str) -> list[int]:
    """Limits of a group and of all its parents; numbers near 2**63 are how version 1 says "none"."""
    parts = [part for part in group.split("/") if part not in ("", "..")]
    folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    texts = [_read(folder / name) for folder in folders for name in ("memory.max", "memory.limit_in_bytes")]
    return [int(text) for text in texts if text is not None and text.isdigit() and int(text) < 1 << 60]


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
