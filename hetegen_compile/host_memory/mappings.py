"""What kind of memory an address range is, from ``/proc/self/maps``."""

from __future__ import annotations

import enum
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ \S+ (\d+) *(.*)")
_MEMORY_FILES = ("/dev/shm/", "/memfd:", "/dev/zero", "/anon_hugepage", "/SYSV")


class Kind(enum.Enum):
    """What lies behind an address range."""

    ANONYMOUS = "anonymous memory"
    SHARED_MEMORY = "shared memory"
    PRIVATE_FILE = "a private file mapping"
    SHARED_FILE = "a shared file mapping"
    UNKNOWN = "memory of unknown kind"


@dataclass(frozen=True)
class Mapping:
    """One mapping of the process: addresses, what is mapped, and how much of it was written privately.

    ``modified_bytes`` is None where only ``maps`` was read, not ``smaps``.
    """

    start: int
    end: int
    shared: bool
    path: str
    modified_bytes: int | None = None

    @property
    def kind(self) -> Kind:
        """What is mapped, by its path; memory files and pseudo paths such as ``[heap]`` are no files."""
        if not self.path.startswith("/") or self.path.startswith(_MEMORY_FILES):
            return Kind.SHARED_MEMORY if self.shared else Kind.ANONYMOUS
        return Kind.SHARED_FILE if self.shared else Kind.PRIVATE_FILE


def parse_mappings(lines: Iterable[str]) -> list[Mapping]:
    """The mappings that ``maps`` or ``smaps`` lists, in the order of their addresses."""
    found: list[Mapping] = []
    for line in lines:
        header = _HEADER.match(line)
        if header is not None:
            start, end, flags, inode, path = header.groups()
            name = path.rstrip("\n") if int(inode) else ""
            found.append(Mapping(int(start, 16), int(end, 16), flags[3] == "s", name))
        elif line.startswith(("Anonymous:", "Swap:")):  # written pages, in memory and swapped out
            modified = int(line.split()[1]) * 1024 + (found[-1].modified_bytes or 0)
            found[-1] = replace(found[-1], modified_bytes=modified)
    return found


def read_mappings(*, details: bool = False, process: Path = Path("/proc/self")) -> list[Mapping]:
    """The process's mappings, empty where there is no ``/proc``; ``details`` counts what was modified (slower)."""
    try:
        with (process / ("smaps" if details else "maps")).open() as lines:
            return parse_mappings(lines)
    except FileNotFoundError:
        return []


def overlapping(mappings: Sequence[Mapping], address: int, nbytes: int) -> list[Mapping]:
    """The mappings that a range lies in; empty if a part of it is in none."""
    first = max(0, bisect_right(mappings, address, key=lambda mapping: mapping.start) - 1)
    found: list[Mapping] = []
    for mapping in mappings[first:]:
        if mapping.start >= address + nbytes:
            break
        found.append(mapping)
    covered = sum(min(m.end, address + nbytes) - max(m.start, address) for m in found if m.end > address)
    return found if covered == nbytes else []


def kind_of(mappings: Sequence[Mapping], address: int, nbytes: int) -> Kind:
    """What a range is; a file if any part of it is one."""
    kinds = {mapping.kind for mapping in overlapping(mappings, address, nbytes)}
    for kind in (Kind.SHARED_FILE, Kind.PRIVATE_FILE, Kind.SHARED_MEMORY, Kind.ANONYMOUS):
        if kind in kinds:
            return kind
    return Kind.UNKNOWN
