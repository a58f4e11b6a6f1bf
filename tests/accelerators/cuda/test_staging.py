"""The pin thread of CudaAccelerator on the fake of torch.cuda: order of copies and waits, failures, the end.

It says nothing about a GPU.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hetegen_compile.accelerators import CudaAccelerator, Op
from hetegen_compile.accelerators.cuda import prefetches
from hetegen_compile.accelerators.cuda.staging import PinThread
from hetegen_compile.errors import AcceleratorError, ScheduleError, SlotInUseError
from tests.accelerators import fake_cuda
from tests.accelerators.fake_cuda import LOG


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> CudaAccelerator:
    fake_cuda.install(monkeypatch)
    accelerator = CudaAccelerator()
    accelerator.reserve_ring(4096)
    accelerator.reserve_pinned(1024)
    LOG.clear()
    return accelerator


def slots(accelerator: CudaAccelerator, index: int) -> tuple[Any, Any]:
    """A pinned slot and one on the device."""
    offset = 256 * index
    return (
        accelerator.pinned_slot(offset, (4,), torch.float32),
        accelerator.slot(offset, (4,), torch.float32),
    )


def pin_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hetegen-pin"]


def test_rows_go_through_the_pinned_ring(accelerator: CudaAccelerator) -> None:
    pinned, slot = slots(accelerator, 0)
    results = []
    after: list[Any] = []
    tokens: list[Any] = []
    for i in range(3):
        rows = torch.full((4,), float(i))
        stage = accelerator.stage(Op(f"s{i}", category="weights"), rows, pinned, after)
        fetched = accelerator.prefetch(Op(f"w{i}", category="weights"), stage, slot, tokens)
        results.append(accelerator.wait(Op(f"a{i}"), fetched).tolist())
        after, tokens = [fetched], [accelerator.release(Op(f"r{i}"), fetched)]
    accelerator.end_step()
    assert results == [[float(i)] * 4 for i in range(3)]
    assert accelerator.counters.staged_bytes == accelerator.counters.uploaded_bytes == {"weights": 48}
    assert accelerator.pinned_bytes == 1024
    uploads = [line for line in LOG if line.startswith(("on up", "host waits up@", "up waits compute@"))]
    assert uploads[:4] == ["on up", "host waits up@0", "up waits compute@0", "on up"]  # then the next pair


def test_a_prefetch_is_started_by_the_pin_thread_once_its_rows_are_there(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_copy, copied_by = threading.Event(), []

    def slow_copy(target: torch.Tensor, source: torch.Tensor) -> None:
        may_copy.wait(10)
        copied_by.append(threading.current_thread().name)
        target.copy_(source)

    monkeypatch.setattr(prefetches, "copy_rows", slow_copy)
    pinned, slot = slots(accelerator, 0)
    stage = accelerator.stage(Op("s"), torch.ones(4), pinned, ())
    fetched = accelerator.prefetch(Op("w"), stage, slot, ())
    assert fetched.event is None, "the upload was started before its rows had arrived"
    may_copy.set()
    assert accelerator.wait(Op("a"), fetched).tolist() == [1.0] * 4
    assert fetched.event is not None
    assert copied_by == ["hetegen-pin"]


def test_a_stage_is_read_once_and_only_by_a_prefetch(accelerator: CudaAccelerator) -> None:
    pinned, slot = slots(accelerator, 0)
    stage = accelerator.stage(Op("s"), torch.ones(4), pinned, ())
    accelerator.prefetch(Op("one"), stage, slot, ())
    with pytest.raises(SlotInUseError, match="two reads s, which one reads already"):
        accelerator.prefetch(Op("two"), stage, slot, ())
    with pytest.raises(ScheduleError, match="a waits for s, which is a stage"):
        accelerator.wait(Op("a"), stage)
    with pytest.raises(ScheduleError, match="s2 waits for s, which is a stage"):
        accelerator.stage(Op("s2"), torch.ones(4), pinned, [stage])
    with pytest.raises(ScheduleError, match="s3 copies"):
        accelerator.stage(Op("s3"), torch.ones(5), pinned, ())


def test_a_failed_copy_names_its_node_where_it_is_waited_for(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(target: torch.Tensor, source: torch.Tensor) -> None:
        raise MemoryError("cannot read the file")

    pinned, slot = slots(accelerator, 0)
    with monkeypatch.context() as patch:
        patch.setattr(prefetches, "copy_rows", fail)
        fetched = accelerator.prefetch(Op("w"), accelerator.stage(Op("s"), torch.ones(4), pinned, ()), slot, ())
        with pytest.raises(AcceleratorError, match=r"^s failed on the pin thread: cannot read the file"):
            accelerator.wait(Op("a"), fetched)
        with pytest.raises(AcceleratorError, match="s failed on the pin thread"):
            accelerator.end_step()
    accelerator.begin_step()
    fetched = accelerator.prefetch(Op("w"), accelerator.stage(Op("s"), torch.ones(4), pinned, ()), slot, ())
    assert accelerator.wait(Op("a"), fetched).tolist() == [1.0] * 4
    accelerator.end_step()


def test_close_ends_the_pin_thread(accelerator: CudaAccelerator) -> None:
    before = pin_threads()
    pinned, _ = slots(accelerator, 0)
    accelerator.stage(Op("s"), torch.ones(4), pinned, ())
    (own,) = [thread for thread in pin_threads() if thread not in before]
    accelerator.close()
    assert not own.is_alive()
    assert accelerator.pinned_bytes == 0


def test_memory_that_others_pinned_needs_no_registration(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.ones(1 << 14)
    storage = weight.untyped_storage()
    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *arguments: fake_cuda.ALREADY_REGISTERED)
    assert accelerator.pin(storage, storage.data_ptr(), storage.nbytes()) == fake_cuda.ALREADY_REGISTERED
    pinned = range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    assert accelerator.pin(storage, storage.data_ptr(), storage.nbytes()) == 0
    assert accelerator.pin(storage, storage.data_ptr(), storage.nbytes() + 1) == fake_cuda.ALREADY_REGISTERED


def test_spans_of_the_pin_thread(accelerator: CudaAccelerator) -> None:
    accelerator.trace(True)
    pinned, slot = slots(accelerator, 0)
    fetched = accelerator.prefetch(Op("w"), accelerator.stage(Op("s"), torch.ones(4), pinned, ()), slot, ())
    accelerator.wait(Op("a"), fetched)
    assert {span.name: span.resource for span in accelerator.trace(False)} == {"s": "pin", "w": "up"}


def test_the_pin_thread_may_end_itself_and_is_started_again() -> None:
    """A finalizer runs where the last reference goes, which may be a job of the thread."""
    ran: list[str] = []
    thread = PinThread(lambda: ran.append("prepared"))
    thread.submit("first", thread.close).result()
    thread.submit("second", lambda: ran.append("second")).result()
    thread.close()
    thread.close()
    assert ran == ["prepared", "prepared", "second"]
