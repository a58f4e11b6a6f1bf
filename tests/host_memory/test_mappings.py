"""What memory a range is: parsing, ranges over several mappings, and this process's own memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from hetegen_compile.host_memory.mappings import Kind, Mapping, kind_of, overlapping, parse_mappings, read_mappings

MAPS = """\
1000-3000 rw-p 00000000 fe:00 77                         /models/a b/model.safetensors
3000-4000 r--s 00000000 fe:00 78                         /models/other.bin (deleted)
4000-6000 rw-p 00000000 00:00 0
6000-7000 rw-p 00000000 00:00 0                          [heap]
7000-8000 rw-s 00000000 00:01 99                         /dev/shm/torch_1 (deleted)
9000-a000 rw-p 00000000 00:00 0                          [anon: own name]
""".splitlines(keepends=True)


def test_every_line_is_a_mapping() -> None:
    found = parse_mappings(MAPS)
    assert found[0] == Mapping(0x1000, 0x3000, shared=False, path="/models/a b/model.safetensors")
    assert [mapping.kind for mapping in found] == [
        Kind.PRIVATE_FILE, Kind.SHARED_FILE, Kind.ANONYMOUS, Kind.ANONYMOUS, Kind.SHARED_MEMORY, Kind.ANONYMOUS,
    ]  # fmt: skip


def test_smaps_tell_what_was_written_privately() -> None:
    details = ["Size:  8 kB\n", "Anonymous:             4 kB\n", "Swap:        8 kB\n", "SwapPss:     8 kB\n"]
    found = parse_mappings([MAPS[0], *details, MAPS[2]])
    assert [mapping.modified_bytes for mapping in found] == [4096 + 8192, None]


@pytest.mark.parametrize(
    ("address", "nbytes", "kind"),
    [
        (0x1000, 0x2000, Kind.PRIVATE_FILE),
        (0x1800, 16, Kind.PRIVATE_FILE),
        (0x2FFF, 2, Kind.SHARED_FILE),  # a file wins over everything else
        (0x4000, 0x3000, Kind.ANONYMOUS),  # two mappings
        (0x7000, 0x1000, Kind.SHARED_MEMORY),
        (0x6000, 0x2000, Kind.SHARED_MEMORY),
        (0x7800, 0x2000, Kind.UNKNOWN),  # a hole
        (0x100, 16, Kind.UNKNOWN),
        (0xA000, 1, Kind.UNKNOWN),
    ],
)
def test_kinds_of_ranges(address: int, nbytes: int, kind: Kind) -> None:
    assert kind_of(parse_mappings(MAPS), address, nbytes) is kind


def test_a_range_lies_in_the_mappings_that_it_touches() -> None:
    assert [mapping.start for mapping in overlapping(parse_mappings(MAPS), 0x2000, 0x2800)] == [0x1000, 0x3000, 0x4000]


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    assert read_mappings(process=tmp_path) == []
    assert kind_of([], 0x1000, 16) is Kind.UNKNOWN


def test_this_process(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(3 * mmap.PAGESIZE))
    private = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=3 * mmap.PAGESIZE)
    shared = torch.UntypedStorage.from_file(str(file), shared=True, nbytes=3 * mmap.PAGESIZE)
    plain = torch.ones(1 << 20)
    mappings = read_mappings()
    assert kind_of(mappings, private.data_ptr(), private.nbytes()) is Kind.PRIVATE_FILE
    assert kind_of(mappings, shared.data_ptr(), shared.nbytes()) is Kind.SHARED_FILE
    assert kind_of(mappings, plain.data_ptr(), plain.nbytes) is Kind.ANONYMOUS


def test_this_process_in_detail(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(4 * mmap.PAGESIZE))
    storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=4 * mmap.PAGESIZE)
    storage[mmap.PAGESIZE] = 1  # makes one page of the process's own
    (mapping,) = overlapping(read_mappings(details=True), storage.data_ptr(), storage.nbytes())
    assert mapping.modified_bytes == mmap.PAGESIZE
