"""Huge pages for weights: which ranges, when it ends, and that nothing but the pages changes."""

from __future__ import annotations

import errno
import mmap
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.host_memory import HostMemory, HugePages, huge_pages
from hetegen_compile.host_memory.huge_pages import _AT_ONCE_BYTES, HUGE_BYTES, _collapse
from hetegen_compile.runtime import Runtime
from tests.host_memory.driver import Driver, plenty
from tests.host_memory.files import mapped


class Collapses:
    """Notes what it is asked for; waits where it is told to."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.asked: list[tuple[int, int]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __call__(self, address: int, nbytes: int) -> int:
        self.begun.set()
        assert self.go_on.wait(10)
        self.asked.append((address, nbytes))
        return self.code


def finished(pages: HugePages) -> None:
    """All of it, as if compilation took long."""
    assert pages._thread is not None
    pages._thread.join(10)
    pages.end()


def test_whole_huge_pages_of_a_range_are_made_some_at_a_time() -> None:
    collapses = Collapses()
    pages = HugePages(collapses)
    pages.begin([(HUGE_BYTES + 1, _AT_ONCE_BYTES + 3 * HUGE_BYTES), (5, HUGE_BYTES)])
    finished(pages)
    first = 2 * HUGE_BYTES
    assert collapses.asked == [(first, _AT_ONCE_BYTES), (first + _AT_ONCE_BYTES, 2 * HUGE_BYTES)]
    assert pages.nbytes == _AT_ONCE_BYTES + 2 * HUGE_BYTES
    assert not pages.under_way


def test_what_is_refused_stays_as_it_is() -> None:
    collapses = Collapses(errno.EINVAL)
    pages = HugePages(collapses)
    pages.begin([(0, HUGE_BYTES), (HUGE_BYTES, HUGE_BYTES)])
    finished(pages)
    assert (len(collapses.asked), pages.nbytes) == (2, 0)


def test_the_end_comes_between_two_parts() -> None:
    collapses = Collapses()
    collapses.go_on.clear()
    pages = HugePages(collapses)
    pages.begin([(0, 100 * _AT_ONCE_BYTES)])
    assert collapses.begun.wait(10)
    assert pages.under_way
    threading.Timer(0.05, collapses.go_on.set).start()
    pages.end()
    assert len(collapses.asked) < 100
    assert not pages.under_way
    assert not any(thread.name == "hetegen-huge-pages" for thread in threading.enumerate())


def test_it_takes_some_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_LONGEST_S", 0.03)

    def slow(address: int, nbytes: int) -> int:
        time.sleep(0.02)
        return 0

    pages = HugePages(slow)
    pages.begin([(number * HUGE_BYTES, HUGE_BYTES) for number in range(50)])
    finished(pages)
    assert pages.nbytes == 2 * HUGE_BYTES
    pages.begin([(0, HUGE_BYTES)])
    assert not pages.under_way


def test_what_is_begun_later_comes_behind() -> None:
    """The weights of a second graph."""
    collapses = Collapses()
    collapses.go_on.clear()
    pages = HugePages(collapses)
    pages.begin([(0, HUGE_BYTES)])
    pages.begin([])
    pages.begin([(4 * HUGE_BYTES, HUGE_BYTES)])
    assert sum(thread.name == "hetegen-huge-pages" for thread in threading.enumerate()) == 1
    collapses.go_on.set()
    finished(pages)
    assert collapses.asked == [(0, HUGE_BYTES), (4 * HUGE_BYTES, HUGE_BYTES)]
    pages.begin([(0, HUGE_BYTES)])
    finished(pages)
    assert len(collapses.asked) == 3


def test_shared_memory_stays_as_it_is() -> None:
    collapses = Collapses()
    memory = HostMemory(Driver().pin, plenty, huge_pages=HugePages(collapses))
    shared = torch.zeros(2 * HUGE_BYTES).share_memory_()
    assert memory.staged({"w": shared}, {"w": shared}) == {}
    assert memory._huge_pages is not None
    assert not memory._huge_pages.under_way


def test_weights_that_will_be_pinned_are_asked_for_once_until_they_are(tmp_path: Path) -> None:
    collapses, driver = Collapses(), Driver()
    memory = HostMemory(driver.pin, plenty, huge_pages=HugePages(collapses))
    weight, other = torch.zeros(2 * HUGE_BYTES), torch.zeros(2 * HUGE_BYTES)
    on_file = mapped(tmp_path / "weights", torch.zeros(2 * HUGE_BYTES))
    for tensors in ({"w": weight, "f": on_file}, {"w": weight}, {"w": weight, "o": other}):
        memory.staged(tensors, tensors)
        assert memory._huge_pages is not None
        if memory._huge_pages.under_way:
            finished(memory._huge_pages)
    assert [_which((weight, other, on_file), *asked) for asked in collapses.asked] == [0, 1]


def _which(tensors: Sequence[torch.Tensor], address: int, nbytes: int) -> int:
    return next(
        index
        for index, tensor in enumerate(tensors)
        if tensor.data_ptr() <= address and address + nbytes <= tensor.data_ptr() + tensor.nbytes
    )


def test_nothing_is_moved_any_more_when_weights_are_pinned() -> None:
    collapses, log = Collapses(), list[str]()
    collapses.go_on.clear()
    pages = HugePages(collapses)

    def pin(owner: object, address: int, nbytes: int) -> int:
        log.append(f"pin, {'moving' if pages.under_way else 'still'}")
        return 0

    memory, weight = HostMemory(pin, plenty, huge_pages=pages), torch.zeros(2 * HUGE_BYTES)
    memory.staged({"w": weight}, {"w": weight})
    assert collapses.begun.wait(10)
    threading.Timer(0.05, collapses.go_on.set).start()
    assert memory.hold([weight], lambda: [weight])
    assert log == ["pin, still"]


def test_a_step_that_pins_nothing_ends_it_as_well() -> None:
    pages = HugePages(Collapses())
    memory, weight = HostMemory(Driver().pin, plenty, huge_pages=pages), torch.zeros(2 * HUGE_BYTES)
    memory.staged({"w": weight}, {"w": weight})
    assert pages.under_way
    memory.hold([], list)
    assert not pages.under_way


def test_only_a_device_has_them_made() -> None:
    accelerator = EmulatedAccelerator(1 << 20)
    assert Runtime(accelerator).host_memory._huge_pages is None
    accelerator.kind = "cuda"
    assert Runtime(accelerator).host_memory._huge_pages is not None


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_contents_stay() -> None:
    """Whether this system makes them or not."""
    values = torch.arange(HUGE_BYTES, dtype=torch.float32)
    start = -(-values.data_ptr() // HUGE_BYTES) * HUGE_BYTES
    code = _collapse(start, HUGE_BYTES)
    assert code in (0, errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY)
    assert torch.equal(values, torch.arange(HUGE_BYTES, dtype=torch.float32))
    assert _collapse(start + mmap.PAGESIZE // 2, HUGE_BYTES) == errno.EINVAL, "the system's answer, not ours"
