"""How much more host memory this process may use: what is available, the cgroup's limit, the process's own limits.

The size of main memory is not among them: on some virtual machines it grows with use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hetegen_compile.options import format_bytes
from hetegen_compile.system import memory_groups

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_USED = {1: "memory.usage_in_bytes", 2: "memory.current"}
_CACHED = {1: ("total_active_file", "total_inactive_file"), 2: ("active_file", "inactive_file")}
"""By the version of control groups."""


@dataclass(frozen=True)
class Room:
    """Bytes that may still be used, and what says so."""

    nbytes: int
    by: str

    def __str__(self) -> str:
        return f"{format_bytes(self.nbytes)} ({self.by})"


@dataclass(frozen=True)
class HostLimits:
    """Each limit that is known; ``locked`` is what the system lets the process lock (the driver may differ)."""

    rooms: tuple[Room, ...] = ()
    locked: Room | None = None

    def room(self) -> Room | None:
        """The tightest limit on more memory; None if none is known."""
        return min(self.rooms, key=lambda room: room.nbytes, default=None)


def read_limits(root: Path = Path("/")) -> HostLimits:
    """The limits as they are now; ``root`` is the folder that holds ``proc`` and ``sys``."""
    status = _fields(root / "proc/self/status")
    rooms = [_available(root), *_cgroup_rooms(root)]
    locked = None
    if resource is not None:
        rooms.append(_process_room("RLIMIT_AS", status.get("VmSize")))
        rooms.append(_process_room("RLIMIT_DATA", status.get("VmData")))
        locked = _process_room("RLIMIT_MEMLOCK", status.get("VmLck"))
    return HostLimits(tuple(room for room in rooms if room is not None), locked)


def _available(root: Path) -> Room | None:
    nbytes = _fields(root / "proc/meminfo").get("MemAvailable")
    return None if nbytes is None else Room(nbytes, "memory available")


def _process_room(limit: str, used_bytes: int | None) -> Room | None:
    soft, _ = resource.getrlimit(getattr(resource, limit))
    if soft == resource.RLIM_INFINITY or used_bytes is None:
        return None
    return Room(max(0, soft - used_bytes), limit)


def _cgroup_rooms(root: Path) -> Iterator[Room]:
    """What each memory cgroup that the process is in leaves it; page cache counts as free."""
    for group in memory_groups(root):
        used = _number(group.folder / _USED[group.version])
        if group.limit_bytes is not None and used is not None:
            cache = _fields(group.folder / "memory.stat")
            cached = sum(cache.get(name, 0) for name in _CACHED[group.version])
            yield Room(max(0, group.limit_bytes - max(0, used - cached)), "cgroup memory limit")


def _number(path: Path) -> int | None:
    """A file's number; None if there is none (``max``, no such file)."""
    text = next(iter(_lines(path)), "max").strip()
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """Lines such as ``VmData:  1024 kB`` or ``active_file 4096`` as bytes by name."""
    found = {}
    for line in _lines(path):
        name, *values = line.replace(":", " ").split() or [""]
        if values and values[0].isdigit():
            found[name] = int(values[0]) * (1024 if values[-1] == "kB" else 1)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # this system, or this kind of cgroup, does not have it
        return []
