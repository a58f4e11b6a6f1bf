"""Arenas: identities, alignment, life; moving tensors; dropping a mapping's pages."""

from __future__ import annotations

import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from hetegen_compile.host_memory import arena as arena_module
from hetegen_compile.host_memory.arena import ALIGNMENT_BYTES, Arena, drop_pages, move
from hetegen_compile.host_memory.mappings import Kind, kind_of, read_mappings
from tests.host_memory.files import mapped, resident_pages


def test_storages_lie_apart_in_one_anonymous_mapping() -> None:
    arena = Arena([100, 64, 1])
    storages = [arena.storage(index) for index in range(3)]
    assert [storage.nbytes() for storage in storages] == [100, 64, 1]
    assert [storage.data_ptr() - arena.address for storage in storages] == [0, 128, 192]
    assert arena.nbytes == 256
    assert all(storage.data_ptr() % ALIGNMENT_BYTES == 0 for storage in storages)
    assert len({storage._cdata for storage in storages}) == 3
    assert kind_of(read_mappings(), arena.address, arena.nbytes) is Kind.ANONYMOUS


def test_an_arena_is_spread_over_memory_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    spread: list[tuple[int, int, tuple[int, ...]]] = []
    monkeypatch.setattr(arena_module, "numa_nodes", lambda cpus: (0, 1))
    monkeypatch.setattr(arena_module, "interleave", lambda *call: spread.append(call))
    arena = Arena([1 << 20])
    assert spread == [(arena.address, 1 << 20, (0, 1))]
    assert resident_pages(arena.address, arena.nbytes) == 0  # nothing was written before


def test_an_arena_lives_as_long_as_a_storage_of_it() -> None:
    arena = Arena([1 << 22, 1 << 22])
    address, life = arena.address, weakref.ref(arena)
    view = torch.empty(0).set_(arena.storage(1))
    arena.storage(0)
    del arena
    assert life() is not None
    view.fill_(1)
    mappings = len(read_mappings())
    del view
    gc.collect()
    assert life() is None
    assert len(read_mappings()) <= mappings
    assert not any(mapping.start == address for mapping in read_mappings())


def test_what_is_tied_to_an_arena_ends_before_its_memory() -> None:
    arena = Arena([1 << 22])
    storage = arena.storage(0)
    mapped_at_the_end: list[Kind] = []
    address = arena.address
    weakref.finalize(arena, lambda: mapped_at_the_end.append(kind_of(read_mappings(), address, 1 << 22)))
    del arena, storage
    gc.collect()
    assert mapped_at_the_end == [Kind.ANONYMOUS]


def test_no_memory_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="memory"):
        Arena([1 << 62])


def test_tensors_move_together_and_keep_what_they_are() -> None:
    base = nn.Parameter(torch.arange(24.0).view(4, 6))
    view = nn.Parameter(base.data[1:, ::2])
    typed = nn.Parameter(base.data.view(torch.int32), requires_grad=False)
    with torch.no_grad():
        base.mul_(2)
    before = [(t.data.clone(), t.stride(), t.storage_offset(), t._version, t.dtype) for t in (base, view, typed)]
    arena = Arena([base.untyped_storage().nbytes()])
    with torch.no_grad():
        move([base, view, typed], arena.storage(0))
    for tensor, (data, *geometry) in zip((base, view, typed), before, strict=True):
        assert torch.equal(tensor, data)
        assert [tensor.stride(), tensor.storage_offset(), tensor._version, tensor.dtype] == geometry
        assert tensor.untyped_storage().data_ptr() == arena.address
    with torch.no_grad():
        base.zero_()
    assert not view.any()


def test_pages_of_a_mapping_are_dropped_and_can_be_read_again(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "weights", torch.arange(4 * mmap.PAGESIZE, dtype=torch.uint8))
    assert int(tensor.sum()) > 0
    address = tensor.data_ptr()
    assert resident_pages(address, tensor.nbytes) == 4
    drop_pages(read_mappings(details=True), address + 1, tensor.nbytes - 2)  # the two in the middle
    assert resident_pages(address, tensor.nbytes) == 2
    assert torch.equal(tensor, torch.arange(4 * mmap.PAGESIZE, dtype=torch.uint8))


def test_pages_that_were_written_are_kept(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "weights", torch.zeros(4 * mmap.PAGESIZE, dtype=torch.uint8))
    tensor[5] = 7
    drop_pages(read_mappings(details=True), tensor.data_ptr(), tensor.nbytes)
    assert int(tensor[5]) == 7


def test_without_details_nothing_is_dropped(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "weights", torch.ones(2 * mmap.PAGESIZE, dtype=torch.uint8))
    assert int(tensor.sum()) == tensor.nbytes
    drop_pages(read_mappings(), tensor.data_ptr(), tensor.nbytes)
    assert resident_pages(tensor.data_ptr(), tensor.nbytes) == 2
