"""Gates of steps that are issued ahead, over the fake of torch.cuda."""

from __future__ import annotations

import gc
import platform
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import CudaAccelerator, Op, StepFacts
from hetegen_compile.accelerators.cuda import ahead, gates
from hetegen_compile.accelerators.cuda.allocator import BLOCK_BYTES, Unclaimed
from hetegen_compile.accelerators.cuda.collection import NoCollection
from hetegen_compile.accelerators.cuda.gates import Gates
from hetegen_compile.accelerators.cuda.worker import Worker
from hetegen_compile.accelerators.switching import INTERVAL_S, QuickSwitching
from hetegen_compile.errors import AcceleratorError
from tests.accelerators import fake_cuda
from tests.accelerators.ahead_steps import LIKE, expected, run, step
from tests.accelerators.fake_cuda import LOG
from tests.accelerators.schedules import HOST_ROWS, WIDTH, make_weights


def gates_in_log() -> list[str]:
    return [entry for entry in LOG if entry.startswith("gate")]


def test_gates_are_closed_only_in_a_step_that_has_run(cuda: CudaAccelerator) -> None:
    run(cuda, again=False)
    assert not gates_in_log()
    run(cuda, again=True)
    assert [int(entry.split()[1]) for entry in gates_in_log()] == [5, 6, 7, 8]


@pytest.mark.parametrize(("needs_bytes", "closed"), [(0, 4), (1 << 29, 4), (1 << 30, 0)])
def test_no_gate_is_closed_where_the_allocator_may_have_to_wait(
    cuda: CudaAccelerator, needs_bytes: int, closed: int
) -> None:
    cuda.begin_step(facts=StepFacts(again=True, needs_bytes=needs_bytes))
    torch.testing.assert_close(step(cuda, make_weights(4), torch.ones(2, WIDTH)), expected())
    cuda.end_step()
    assert len(gates_in_log()) == closed


def test_no_gate_is_closed_in_a_step_that_takes_more_memory_than_it_was_to(cuda: CudaAccelerator) -> None:
    cuda.begin_step(facts=StepFacts(again=True))
    cuda.close_no_gates()
    torch.testing.assert_close(step(cuda, make_weights(4), torch.ones(2, WIDTH)), expected())
    cuda.end_step()
    assert not gates_in_log()


def test_a_limit_of_the_allocators_own_counts(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    unclaimed = Unclaimed(cuda.device)
    assert unclaimed.nbytes() == (1 << 30) - 2 * BLOCK_BYTES
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert unclaimed.nbytes() == (1 << 29) - fake_cuda.RESERVED["current"] - 2 * BLOCK_BYTES


def test_the_driver_is_asked_now_and_then_and_when_the_allocator_has_reserved(
    cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, now_s = iter([1 << 30, 1 << 29, 1 << 28]), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(left), 1 << 31))
    unclaimed = Unclaimed(cuda.device)
    assert {unclaimed.nbytes() for _ in range(50)} == {(1 << 30) - 2 * BLOCK_BYTES}
    now_s[0] += 1
    assert unclaimed.nbytes() == (1 << 29) - 2 * BLOCK_BYTES
    monkeypatch.setitem(fake_cuda.RESERVED, "current", 654_321)
    assert unclaimed.nbytes() == (1 << 28) - 2 * BLOCK_BYTES


def test_device_tensors_die_on_the_issuing_thread(cuda: CudaAccelerator) -> None:
    """The worker may hold the last reference to nothing of the device: torch's allocator could be waiting."""
    died: list[str] = []
    cuda.begin_step(facts=StepFacts(again=True))
    value = cuda.upload(Op("x"), torch.ones(2, WIDTH))
    weakref.finalize(value.untyped_storage(), lambda: died.append(threading.current_thread().name))
    received = cuda.receive(Op("r"), cuda.to_host(Op("d"), [value]))
    del value
    made = cuda.host_ahead(Op("h"), F.linear, (received[0], torch.ones(HOST_ROWS, WIDTH)), {})
    sent = cuda.deliver(Op("u"), [made], LIKE)
    cuda.wait(Op("w"), sent)
    assert not died
    cuda.caught_up(Op("c"), sent)
    assert died == [threading.current_thread().name]
    cuda.end_step()


def test_what_was_not_sent_is_read_as_zeros(cuda: CudaAccelerator) -> None:
    run(cuda, layers=1)  # the buffer has something in it now

    def fails(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    cuda.begin_step(facts=StepFacts(again=True))
    received = cuda.receive(Op("r"), cuda.to_host(Op("d"), [cuda.upload(Op("x"), torch.ones(2, WIDTH))]))
    made = cuda.host_ahead(Op("h"), fails, (received[0], torch.ones(HOST_ROWS, WIDTH)), {})
    (up,) = cuda.wait(Op("w"), cuda.deliver(Op("u"), [made], LIKE))
    assert torch.equal(up, torch.zeros(2, HOST_ROWS))
    with pytest.raises(ValueError, match="no"):
        cuda.end_step()
    cuda.abandon_step()


def test_every_gate_of_an_abandoned_step_opens(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(Gates, "open", lambda self, number: opened.append(number))
    go_on = threading.Event()
    cuda.begin_step(facts=StepFacts(again=False))
    received = cuda.receive(Op("r"), cuda.to_host(Op("d"), [cuda.upload(Op("x"), torch.ones(2, WIDTH))]))
    made = cuda.host_ahead(Op("h"), lambda x: go_on.wait(10), (received[0],), {})
    for name in ("u1", "u2"):
        cuda.deliver(Op(name), [made], LIKE)
    threading.Timer(0.05, go_on.set).start()
    cuda.abandon_step()
    assert opened == [1, 2]


def test_two_accelerators_with_steps_that_overlap_leave_the_interval_as_it_was() -> None:
    before, (first, second) = sys.getswitchinterval(), (QuickSwitching(), QuickSwitching())
    for one in (first, second):
        one.enter()
    first.leave()
    assert sys.getswitchinterval() == pytest.approx(INTERVAL_S)
    second.leave()
    assert sys.getswitchinterval() == before


def test_nothing_is_collected_on_the_worker(cuda: CudaAccelerator) -> None:
    """The finalizer of a pinned weight waits for the device, which may be waiting for the worker."""
    during: list[bool] = []

    def linear(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        during.append(gc.isenabled())
        return F.linear(x, rows)

    assert gc.isenabled()
    run(cuda, linear=linear)
    assert during == [False] * 4
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        run(cuda, linear=lambda x, rows: 1 / 0)
    cuda.abandon_step()
    assert gc.isenabled()


def test_an_accelerator_that_is_closed_within_a_step_leaves_everything_as_it_was(cuda: CudaAccelerator) -> None:
    interval = sys.getswitchinterval()
    cuda.begin_step()
    cuda.host_ahead(Op("h"), int, (), {})
    assert not gc.isenabled()
    cuda.close()
    assert gc.isenabled()
    assert sys.getswitchinterval() == interval


def test_the_worker_ends_with_a_step_that_has_no_use_for_it(cuda: CudaAccelerator) -> None:
    def workers() -> int:
        return sum(thread.name == "hetegen-worker" for thread in threading.enumerate())

    for _ in range(2):
        torch.testing.assert_close(run(cuda), expected())
        assert workers() == 1
        cuda.begin_step()
        assert workers() == 1
        cuda.end_step()
        assert workers() == 0
    run(cuda)
    cuda.begin_step(facts=StepFacts(in_turn=True))
    assert workers() == 0, "at once, where it is known"
    cuda.end_step()


def test_collection_stays_as_the_caller_has_it() -> None:
    first, second = NoCollection(), NoCollection()
    first.enter()
    second.enter()
    first.leave()
    assert not gc.isenabled()
    second.leave()
    assert gc.isenabled()
    gc.disable()
    try:
        first.enter()
        first.leave()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_worker_that_cannot_begin_says_so(cuda: CudaAccelerator) -> None:
    def fails() -> None:
        raise OSError("no such device")

    thread = Worker(fails)
    thread.begin()
    with pytest.raises(OSError, match="no such device"):
        thread.raise_failure()
    thread.close()


def test_numbers_of_gates_wrap_around(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def late() -> Gates:
        made = Gates()
        made._last = 2**32 - 3
        made.open(made._last)
        return made

    monkeypatch.setattr(ahead, "Gates", late)
    torch.testing.assert_close(run(cuda), expected())
    assert [int(entry.split()[1]) for entry in gates_in_log()] == [2**32 - 2, 2**32 - 1, 0, 1]


def test_every_gate_opens_though_the_work_before_it_failed(cuda: CudaAccelerator) -> None:
    def fails(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(cuda, layers=2, linear=fails)  # two gates are closed before anybody looks
    assert len(gates_in_log()) == 2
    cuda.abandon_step()


def test_a_refusal_of_the_driver_names_the_option(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_wait_function", lambda: lambda *arguments: 801)
    with pytest.raises(AcceleratorError, match=r"error 801.*'issue_ahead': False"):
        run(cuda)
    cuda.abandon_step()


def test_why_there_are_no_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: no such file")

    monkeypatch.setattr(gates, "_wait_function", missing)
    gates.why_no_gates.cache_clear()
    assert "no such file" in gates.why_no_gates()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    gates.why_no_gates.cache_clear()
    assert "aarch64" in gates.why_no_gates()
    gates.why_no_gates.cache_clear()
