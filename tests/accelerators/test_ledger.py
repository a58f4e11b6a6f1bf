"""The books of held bytes, and the table of pinned ranges with a driver that may refuse."""

import threading

import pytest
import torch

from hetegen_compile.accelerators.counters import Counters
from hetegen_compile.accelerators.ledger import MemoryLedger, PinTable
from tests.test_locks import INTERRUPTS, interrupts

REFUSED = 712


class Driver:
    """Records what is registered; refuses what overlaps or is larger than ``limit``."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.ranges: dict[int, int] = {}
        self.calls = 0

    def register(self, address: int, nbytes: int) -> int:
        self.calls += 1
        overlaps = any(address < end and start < address + nbytes for start, end in self.ranges.items())
        if overlaps or nbytes > self.limit:
            return REFUSED
        self.ranges[address] = address + nbytes
        return 0

    def unregister(self, address: int) -> None:
        del self.ranges[address]


def pin(table: PinTable, tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return table.pin(storage, storage.data_ptr(), storage.nbytes())


def test_ranges_are_registered_once_and_end_with_their_storage() -> None:
    driver = Driver()
    table = PinTable(driver.register, driver.unregister)
    weight = torch.ones(256)
    assert pin(table, weight[16:]) == 0
    assert pin(table, weight.view(16, 16)) == 0
    assert driver.calls == 1
    assert table.covers(weight.data_ptr(), 1024)
    assert not table.covers(weight.data_ptr(), 1025)
    del weight
    assert driver.ranges == {}
    assert table.pinned_bytes == 0


def test_refusals_are_reported_and_nothing_is_recorded() -> None:
    driver = Driver(limit=16)
    table = PinTable(driver.register, driver.unregister)
    assert pin(table, torch.ones(256)) == REFUSED
    assert table.pinned_bytes == 0


def test_what_others_registered_is_not_taken_for_pinned() -> None:
    driver = Driver()
    weight = torch.ones(256)
    driver.register(weight.data_ptr(), 16)
    table = PinTable(driver.register, driver.unregister)
    assert pin(table, weight) == REFUSED


def test_empty_tensors_need_no_pinning() -> None:
    driver = Driver()
    assert pin(PinTable(driver.register, driver.unregister), torch.empty(0)) == 0
    assert driver.calls == 0


def test_close_unpins_everything() -> None:
    driver = Driver()
    table = PinTable(driver.register, driver.unregister)
    kept = [torch.ones(256) for _ in range(3)]
    assert not any(pin(table, tensor) for tensor in kept)
    table.close()
    assert driver.ranges == {}
    kept.clear()  # their finalizers have nothing left to do
    assert table.pinned_bytes == 0


def test_storages_that_die_while_the_books_are_open_are_settled_afterwards() -> None:
    counters = Counters()
    ledger = MemoryLedger(counters, 1 << 20)
    first, second = torch.ones(4), torch.ones(8)
    ledger.hold(first, "weights")
    ledger.hold(second, "weights")
    kept = [first]
    del first

    def collect() -> None:
        kept.clear()  # as the garbage collector may do at any point inside
        assert counters.held_bytes == {"weights": 48}

    ledger._on_books(collect)
    assert counters.held_bytes == {"weights": 32}


def test_threads_that_hold_and_drop_keep_the_books_exact() -> None:
    counters = Counters()
    ledger = MemoryLedger(counters, 1 << 20)

    def churn() -> None:
        for _ in range(300):
            ledger.hold(torch.ones(4), "activations")
            ledger.uploaded("activations", 1)

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.held_bytes == {"activations": 0}
    assert counters.uploaded_bytes == {"activations": 1200}
    assert 16 <= counters.peak_bytes <= 64 * 16


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_interrupt_leaves_the_books_locked_or_wrong() -> None:
    counters = Counters()
    ledger = MemoryLedger(counters, 1 << 20)
    held, interrupted = torch.ones(4), 0
    ledger.hold(held, "weights")
    with interrupts() as interrupt_soon:
        for _ in range(INTERRUPTS):
            try:
                interrupt_soon()
                while ledger.held_bytes >= 16:
                    ledger._settle()
                    ledger._drop(0)  # of a storage that is not on the books
            except KeyboardInterrupt:
                interrupted += 1
            assert not ledger._lock.locked()
    assert interrupted == INTERRUPTS
    assert ledger.held_bytes == 16
    del held
    assert counters.held_bytes == {"weights": 0}
