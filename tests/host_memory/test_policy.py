"""Pinning, adopting and refusing: each storage once, undone when it dies, by the driver's return code."""

from __future__ import annotations

import gc
import logging
import mmap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.host_memory import HostMemory, policy
from hetegen_compile.host_memory.arena import Arena, move
from hetegen_compile.host_memory.mappings import Kind, kind_of, read_mappings
from hetegen_compile.rows import Holding
from tests.host_memory.driver import Driver, little, plenty
from tests.host_memory.files import mapped, resident_pages

BYTES = 16 * mmap.PAGESIZE


def parameter(path: Path | None = None, fill: float = 1.0) -> nn.Parameter:
    """A parameter of 16 pages, anonymous or mapped from a file."""
    values = torch.full((4, BYTES // 16), fill)
    return nn.Parameter(values if path is None else mapped(path, values))


def held(memory: HostMemory, *tensors: Tensor) -> bool:
    return memory.hold(tensors, lambda: tensors)


def staged(memory: HostMemory, *tensors: Tensor) -> dict[str, str]:
    names = {f"w{i}": tensor for i, tensor in enumerate(tensors)}
    return memory.staged(names, names)


# ---- pinned in place ------------------------------------------------------------------------------------------


def test_anonymous_memory_is_pinned_once_where_it_is() -> None:
    driver, weight = Driver(), parameter()
    address, memory = weight.data_ptr(), HostMemory(driver.pin, little)
    assert staged(memory, weight) == {}
    for _ in range(3):
        assert held(memory, weight)
    assert weight.data_ptr() == address
    assert driver.log == [("register", address)]
    assert memory.holdings([weight, weight[1:]]) == (Holding("pinned in place", BYTES),)


def test_a_pin_ends_once_with_its_storage() -> None:
    driver, weight = Driver(), parameter()
    address, memory = weight.data_ptr(), HostMemory(driver.pin, plenty)
    assert held(memory, weight)
    view = weight.detach()[2:]
    del weight
    assert driver.ranges == {address: BYTES}
    del view
    driver.table.close()
    assert driver.log == [("register", address), ("unregister", address)]


def test_a_storage_in_the_place_of_a_dead_one_is_another() -> None:
    driver = Driver()
    memory = HostMemory(driver.pin, plenty)
    for _ in range(20):
        weight = parameter()
        assert memory.holding(weight) is None
        assert held(memory, weight)
        del weight
    assert driver.ranges == {}
    assert len(driver.log) == 40


def test_what_the_driver_refuses_is_staged_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    driver, one, two = Driver(limit=BYTES), parameter(), parameter()
    memory = HostMemory(driver.pin, little)
    assert staged(memory, one, two) == {}
    assert not held(memory, one, two)
    (reason,) = staged(memory, one, two).values()
    assert reason == ("cannot be pinned: the driver refused with error 2; RLIMIT_MEMLOCK leaves 64.00 KiB")
    assert not held(memory, one, two)
    assert held(memory, one)
    assert driver.log == [("register", one.data_ptr())]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "streaming 1 weights (64.00 KiB) through the pinned ring" in caplog.text


def test_inference_tensors_in_memory_are_pinned() -> None:
    with torch.inference_mode():
        weight = torch.ones(64)
    memory = HostMemory(Driver().pin, plenty)
    assert held(memory, weight)


def test_tensors_without_host_memory_are_left_alone() -> None:
    memory = HostMemory(Driver(limit=0).pin, little)
    tensors = [torch.empty(8, device="meta"), torch.empty(0)]
    assert staged(memory, *tensors) == {}
    assert held(memory, *tensors)
    assert memory.holdings(tensors) == ()


# ---- adopted --------------------------------------------------------------------------------------------------


def test_what_was_moved_is_told_also_if_the_user_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: dict[int, int] = {}
    memory = HostMemory(Driver().pin, plenty, places.update)
    first, second = (parameter(tmp_path / str(i)) for i in range(2))
    old = first.untyped_storage()

    def interrupted(tensors: Sequence[Tensor], target: torch.UntypedStorage) -> None:
        if any(tensor is second for tensor in tensors):
            raise KeyboardInterrupt
        move(tensors, target)

    monkeypatch.setattr(policy, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        held(memory, first, second)
    assert places == {old._cdata: first.untyped_storage()._cdata}


def test_mappings_are_adopted_into_one_arena(tmp_path: Path) -> None:
    driver = Driver()
    memory = HostMemory(driver.pin, plenty)
    weights = [parameter(tmp_path / str(i), fill=float(i)) for i in range(3)]
    versions = [weight._version for weight in weights]
    assert staged(memory, *weights) == {}
    assert held(memory, *weights)
    assert [weight.unique().tolist() for weight in weights] == [[0.0], [1.0], [2.0]]
    assert [weight._version for weight in weights] == versions
    mappings = read_mappings()
    assert all(kind_of(mappings, weight.data_ptr(), BYTES) is Kind.ANONYMOUS for weight in weights)
    assert not any(str(tmp_path) in mapping.path for mapping in mappings), "a mapping was kept"
    assert len(driver.ranges) == 1
    assert driver.table.covers(weights[0].data_ptr(), 3 * BYTES)
    assert memory.holdings(weights) == (Holding("adopted", BYTES),) * 3
    assert held(memory, *weights)
    assert len(driver.log) == 1


def test_an_arena_is_unpinned_once_before_it_is_unmapped(tmp_path: Path) -> None:
    driver = Driver()
    memory = HostMemory(driver.pin, plenty)
    weights = [parameter(tmp_path / str(i)) for i in range(2)]
    assert held(memory, *weights)
    (address,) = driver.ranges
    weights.pop()
    gc.collect()
    assert driver.ranges
    weights.pop()
    gc.collect()
    assert driver.log == [("register", address), ("unregister", address)]  # the driver checks that it is mapped
    assert kind_of(read_mappings(), address, 2 * BYTES) is not Kind.ANONYMOUS
    driver.table.close()
    assert len(driver.log) == 2


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    base = parameter(tmp_path / "w")
    tied, part = nn.Parameter(base.data), nn.Parameter(base.data[1:3])
    memory = HostMemory(Driver().pin, plenty)
    assert memory.hold([part], lambda: [base, tied, part])
    with torch.no_grad():
        base.fill_(7.0)
    assert part.unique().tolist() == tied.unique().tolist() == [7.0]
    assert part.shape == (2, BYTES // 16)
    assert len({tensor.untyped_storage()._cdata for tensor in (base, tied, part)}) == 1


def test_pages_that_were_written_come_along(tmp_path: Path) -> None:
    weight = parameter(tmp_path / "w")
    with torch.no_grad():
        weight[2, 5] = 9.0
    expected = weight.detach().clone()
    assert held(HostMemory(Driver().pin, plenty), weight)
    assert torch.equal(weight, expected)


def test_memory_is_not_doubled_on_the_way(tmp_path: Path) -> None:
    """When the arena is pinned, which makes its pages resident, none of the mapping's is."""
    weights = [parameter(tmp_path / str(i)) for i in range(2)]
    places = [(weight.data_ptr(), BYTES) for weight in weights]
    assert all(int(weight.sum()) > 0 for weight in weights)  # reads every page
    assert [resident_pages(*place) for place in places] == [16, 16]
    while_pinning: list[int] = []

    def pin(owner: object, address: int, nbytes: int) -> int:
        assert isinstance(owner, Arena)
        while_pinning.append(sum(resident_pages(*place) for place in places))
        return 0

    assert held(HostMemory(pin, plenty), *weights)
    assert while_pinning == [0]


def test_pages_of_what_has_moved_are_dropped_before_the_next_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight at a time is in memory twice, however many there are."""
    weights = [parameter(tmp_path / str(i)) for i in range(3)]
    places = [(weight.data_ptr(), BYTES) for weight in weights]
    twice: list[int] = []

    def moved(tensors: Sequence[Tensor], storage: torch.UntypedStorage) -> None:
        twice.append(sum(resident_pages(*place) for place in places))
        move(tensors, storage)

    monkeypatch.setattr(policy, "move", moved)
    assert held(HostMemory(Driver().pin, plenty), *weights)
    assert twice == [0, 0, 0]


# ---- staged ---------------------------------------------------------------------------------------------------


def test_mappings_beyond_the_room_are_staged_where_they_are(tmp_path: Path) -> None:
    driver, weight = Driver(), parameter(tmp_path / "w")
    memory, address = HostMemory(driver.pin, little), weight.data_ptr()
    assert "the host memory left, 1.00 MiB (test limit)" in staged(memory, weight)["w0"]
    assert weight.data_ptr() == address
    assert driver.log == []


def test_room_that_went_away_after_planning_is_noticed(tmp_path: Path) -> None:
    limits = [plenty(), little(), plenty()]
    memory, weight = HostMemory(Driver().pin, lambda: limits.pop(0)), parameter(tmp_path / "w")
    assert staged(memory, weight) == {}
    assert not held(memory, weight)
    assert "exceeds the host memory left" in staged(memory, weight)["w0"]  # the decision stays


def test_a_refused_arena_leaves_the_mapping(tmp_path: Path) -> None:
    driver, weight = Driver(limit=BYTES - 1), parameter(tmp_path / "w", fill=3.0)
    memory, address = HostMemory(driver.pin, plenty), weight.data_ptr()
    assert not held(memory, weight)
    assert weight.data_ptr() == address
    assert weight.unique().tolist() == [3.0]
    assert "the driver refused with error 2" in staged(memory, weight)["w0"]


def test_no_address_range_for_the_arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Arena, lengths: list[int]) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(Arena, "__init__", refuse)
    memory, weight = HostMemory(Driver().pin, plenty), parameter(tmp_path / "w")
    assert not held(memory, weight)
    assert "cannot be adopted: [Errno 12]" in staged(memory, weight)["w0"]


@pytest.mark.parametrize("how", ["a state dict", "a buffer", "inference mode"])
def test_mappings_that_others_see_are_staged(how: str, tmp_path: Path) -> None:
    driver, tensor = Driver(), mapped(tmp_path / "w", torch.ones(64))
    memory = HostMemory(driver.pin, plenty)
    if how == "inference mode":
        with torch.inference_mode():
            weight: Tensor = nn.Parameter(mapped(tmp_path / "w", torch.ones(64)), requires_grad=False)
    else:
        weight = nn.Parameter(tensor) if how == "a state dict" else tensor
    (reason,) = staged(memory, weight).values()
    assert reason.startswith("lies in a private file mapping: it ")
    assert not held(memory, weight)
    assert driver.log == []


def test_shared_mappings_are_staged(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(BYTES))
    weight = nn.Parameter(torch.from_file(str(tmp_path / "w"), shared=True, size=BYTES // 4))
    memory = HostMemory(Driver().pin, plenty)
    assert "a shared file mapping" in staged(memory, weight)["w0"]
    assert not held(memory, weight)
