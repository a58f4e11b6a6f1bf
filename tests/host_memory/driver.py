"""A driver that pins ranges, refuses beyond a limit, and checks that what it unpins is still mapped."""

from __future__ import annotations

from hetegen_compile.accelerators.ledger import PinTable
from hetegen_compile.host_memory.limits import HostLimits, Room
from hetegen_compile.host_memory.mappings import Kind, kind_of, read_mappings

OUT_OF_MEMORY = 2


class Driver:
    """Registers ranges of at most ``limit`` bytes together; keeps what was registered and ended, in order."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit = limit
        self.ranges: dict[int, int] = {}
        self.log: list[tuple[str, int]] = []
        self.table = PinTable(self._register, self._unregister)
        self.pin = self.table.pin

    def _register(self, address: int, nbytes: int) -> int:
        if sum(self.ranges.values()) + nbytes > self.limit:
            return OUT_OF_MEMORY
        assert kind_of(read_mappings(), address, nbytes) is not Kind.UNKNOWN, "registers memory that is not there"
        self.ranges[address] = nbytes
        self.log.append(("register", address))
        return 0

    def _unregister(self, address: int) -> None:
        nbytes = self.ranges.pop(address)
        assert kind_of(read_mappings(), address, nbytes) is not Kind.UNKNOWN, "unregisters memory that is gone"
        self.log.append(("unregister", address))


def little() -> HostLimits:
    """Limits that no mapping fits."""
    return HostLimits((Room(1 << 20, "test limit"),), Room(1 << 16, "RLIMIT_MEMLOCK"))


def plenty() -> HostLimits:
    """Limits that everything fits."""
    return HostLimits((Room(1 << 50, "test limit"),))
