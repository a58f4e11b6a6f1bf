"""Host parts on the worker, ahead of which the rest of a step is issued: emulated, and CUDA over the fake."""

from __future__ import annotations

import gc
import platform
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import Accelerator, CudaAccelerator, EmulatedAccelerator, Op
from hetegen_compile.accelerators.cuda import ahead, gates
from hetegen_compile.accelerators.cuda.allocator import BLOCK_BYTES, unclaimed_bytes
from hetegen_compile.accelerators.cuda.gates import Gates
from hetegen_compile.accelerators.cuda.worker import Worker
from hetegen_compile.accelerators.promises import Promise, kept_in
from hetegen_compile.accelerators.switching import INTERVAL_S, QuickSwitching
from hetegen_compile.errors import AcceleratorError, MissingWaitError, ScheduleError
from tests.accelerators import fake_cuda
from tests.accelerators.fake_cuda import LOG
from tests.accelerators.schedules import HOST_ROWS, WIDTH, make_weights, run_eager

LIKE = [torch.empty(2, HOST_ROWS, device="meta")]


@pytest.fixture(params=["emulated", "cuda"])
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """One of each kind, closed afterwards."""
    if request.param == "cuda":
        fake_cuda.install(monkeypatch)
    opened: Accelerator = CudaAccelerator() if request.param == "cuda" else EmulatedAccelerator(1 << 28, seed=3)
    yield opened
    opened.close()
    gc.collect()


def join(host: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A layer's output."""
    return torch.tanh(torch.cat([host, part], dim=-1))


def step(acc: Accelerator, weights: list[torch.Tensor], x: torch.Tensor, linear: Any = F.linear) -> torch.Tensor:
    """Every layer split; the host's rows are the worker's."""
    value = acc.upload(Op("x"), x)
    sent: list[Any] = []
    for i, weight in enumerate(weights):
        down = acc.to_host(Op(f"xh{i}"), [value])
        if i >= 2:
            acc.caught_up(Op(f"c{i}"), sent[i - 2])
        received = acc.receive(Op(f"wx{i}"), down)
        part_of_host = acc.host_ahead(Op(f"yh{i}"), linear, (received[0], weight[:HOST_ROWS]), {})
        sent.append(acc.deliver(Op(f"ya{i}"), [part_of_host], LIKE))
        rows = acc.upload(Op(f"w{i}"), weight[HOST_ROWS:])
        part = acc.launch(Op(f"yd{i}"), F.linear, (value, rows))
        (up,) = acc.wait(Op(f"wy{i}"), sent[i])
        value = acc.launch(Op(f"y{i}"), join, (up, part))
    return acc.download(Op("out"), value)


def run(acc: Accelerator, layers: int = 4, *, again: bool = True, **options: Any) -> torch.Tensor:
    acc.begin_step(again=again)
    result = step(acc, make_weights(layers), torch.ones(2, WIDTH), **options)
    acc.end_step()
    return result


def expected(layers: int = 4) -> torch.Tensor:
    return run_eager(make_weights(layers), torch.ones(2, WIDTH))


def test_a_step_with_everything_on_the_worker_equals_eager(accelerator: Accelerator) -> None:
    threads: set[str] = set()

    def linear(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        return F.linear(x, rows)

    for again in (False, True, True):
        torch.testing.assert_close(run(accelerator, again=again, linear=linear), expected())
    assert threads == {"hetegen-worker"}
    assert accelerator.counters.trips_down >= accelerator.counters.trips_up == 3 * 4
    assert accelerator.counters.uploaded_bytes["activations"] >= 3 * 4 * 2 * HOST_ROWS * 4


@pytest.mark.parametrize("again", [False, True])
def test_an_error_on_the_worker_is_raised_as_it_is_with_the_nodes_name(
    accelerator: Accelerator, *, again: bool
) -> None:
    calls: list[int] = []

    def linear(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("lost")
        return F.linear(x, rows)

    run(accelerator, again=False)
    with pytest.raises(KeyError, match="lost") as raised:
        run(accelerator, again=again, linear=linear)
    assert any("host operation yh1" in note for note in raised.value.__notes__)
    assert len(calls) == 2, "what was queued behind is not done"
    accelerator.abandon_step()
    torch.testing.assert_close(run(accelerator), expected())


def test_a_step_that_is_left_in_the_middle_leaves_the_next_one_working(accelerator: Accelerator) -> None:
    held, begun = threading.Event(), threading.Event()

    def slow(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        begun.set()
        held.wait(10)
        return F.linear(x, rows)

    weights = make_weights(1)
    accelerator.begin_step(again=True)
    value = accelerator.upload(Op("x"), torch.ones(2, WIDTH))
    received = accelerator.receive(Op("r"), accelerator.to_host(Op("d"), [value]))
    first = accelerator.host_ahead(Op("h"), slow, (received[0], weights[0][:HOST_ROWS]), {})
    never: list[int] = []
    accelerator.host_ahead(Op("h2"), never.append, (first,), {})
    sent = accelerator.deliver(Op("u"), [first], LIKE)
    begun.wait(10)
    threading.Timer(0.05, held.set).start()
    accelerator.abandon_step()
    assert not never, "what was queued is passed over"
    del sent, received, first, value
    torch.testing.assert_close(run(accelerator, again=False), expected())


def test_a_result_of_another_shape_is_refused(accelerator: Accelerator) -> None:
    with pytest.raises(ScheduleError, match=r"ya0 sends .* in the place of \(2, 16\)"):
        run(accelerator, linear=lambda x, rows: F.linear(x, rows)[:1])
    accelerator.abandon_step()


def test_only_what_the_worker_sends_can_be_caught_up_with(accelerator: Accelerator) -> None:
    accelerator.begin_step()
    transfer = accelerator.to_accelerator(Op("u"), [torch.ones(2)])
    with pytest.raises(ScheduleError, match="c waits for u, which the worker does not send"):
        accelerator.caught_up(Op("c"), transfer)
    with pytest.raises(ScheduleError, match="r waits for u, which is a to_accelerator"):
        accelerator.receive(Op("r"), transfer)
    accelerator.abandon_step()


def test_the_worker_computes_in_the_modes_of_the_step(accelerator: Accelerator) -> None:
    dtypes: list[torch.dtype] = []

    def linear(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        result = F.linear(x, rows)
        dtypes.append(result.dtype)
        assert not result.requires_grad
        return result.float()

    parameter = torch.nn.Parameter(torch.ones(HOST_ROWS, WIDTH))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        accelerator.begin_step(again=True)
        value = accelerator.upload(Op("x"), torch.ones(2, WIDTH))
        received = accelerator.receive(Op("r"), accelerator.to_host(Op("d"), [value]))
        made = accelerator.host_ahead(Op("h"), linear, (received[0], parameter), {})
        accelerator.wait(Op("w"), accelerator.deliver(Op("u"), [made], LIKE))
        accelerator.end_step()
    assert dtypes == [torch.bfloat16]


def test_steps_leave_the_interpreters_interval_and_the_number_of_threads_as_they_were(
    accelerator: Accelerator,
) -> None:
    torch.set_num_threads(3)
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    run(accelerator, again=False)
    run(accelerator)
    seen: list[int] = []
    threading.Thread(target=lambda: seen.append(torch.get_num_threads())).start()
    assert (torch.get_num_threads(), sys.getswitchinterval()) == (threads, interval)
    assert seen == [threads], "of threads to come"


def test_a_download_may_be_waited_for_by_both_threads(accelerator: Accelerator) -> None:
    accelerator.begin_step(again=True)
    value = accelerator.upload(Op("x"), torch.ones(2, WIDTH))
    down = accelerator.to_host(Op("d"), [value])
    received = accelerator.receive(Op("r"), down)
    made = accelerator.host_ahead(Op("h"), F.linear, (received[0], torch.ones(HOST_ROWS, WIDTH)), {})
    sent = accelerator.deliver(Op("u"), [made], LIKE)
    (here,) = accelerator.wait_host(Op("w"), down)
    assert torch.equal(here, torch.ones(2, WIDTH))
    (up,) = accelerator.wait(Op("wu"), sent)
    assert torch.equal(accelerator.download(Op("o"), up), torch.full((2, HOST_ROWS), float(WIDTH)))
    accelerator.end_step()


# ---- emulated: rules ---------------------------------------------------------------------------------------


def test_a_promise_is_no_tensor_for_anybody_else() -> None:
    acc = EmulatedAccelerator()
    acc.begin_step()
    received: Any = acc.receive(Op("r"), acc.to_host(Op("d"), [acc.upload(Op("x"), torch.ones(2))]))
    uses: list[Callable[[], Any]] = [
        lambda: acc.host(Op("h"), torch.neg, (received[0],), {}),
        lambda: acc.launch(Op("l"), torch.neg, (received[0],)),
        lambda: torch.neg(received[0]),
        lambda: acc.to_accelerator(Op("u"), [received[0]]),
    ]
    for use in uses:
        with pytest.raises((MissingWaitError, ScheduleError)):
            use()
    value = acc.upload(Op("y"), torch.ones(2))
    with pytest.raises(MissingWaitError, match="h2 uses y without the wait"):
        acc.host_ahead(Op("h2"), torch.neg, (value,), {})
    acc.close()


def test_what_a_download_reads_is_not_written_before_the_worker_has_it() -> None:
    acc = EmulatedAccelerator()
    acc.begin_step()
    value = acc.launch(Op("x"), torch.ones, (2,))
    down = acc.to_host(Op("d"), [value])
    received = acc.receive(Op("r"), down)
    sent = acc.deliver(Op("u"), [received[0]], [torch.empty(2, device="meta")])
    with pytest.raises(MissingWaitError, match="add overwrites what d is still copying"):
        acc.launch(Op("add"), torch.Tensor.add_, (value, 1), mutates=(0,))
    acc.wait(Op("w"), sent)
    acc.launch(Op("add"), torch.Tensor.add_, (value, 1), mutates=(0,))
    acc.end_step()
    acc.close()


@pytest.mark.parametrize("caught_up", [False, True])
def test_nothing_runs_for_the_first_time_at_its_sizes_behind_a_gate(*, caught_up: bool) -> None:
    """The emulated accelerator refuses what would load code where a GPU's driver waits for the gate."""
    acc = EmulatedAccelerator()
    for tokens, again in ((3, False), (3, True), (4, True)):
        acc.begin_step(again=again)
        value = acc.upload(Op("x"), torch.ones(2, WIDTH))
        received = acc.receive(Op("r"), acc.to_host(Op("d"), [value]))
        made = acc.host_ahead(Op("h"), F.linear, (received[0], torch.ones(HOST_ROWS, WIDTH)), {})
        sent = acc.deliver(Op("u"), [made], LIKE)
        keys = acc.upload(Op("k"), torch.ones(tokens, HOST_ROWS))
        (query,) = acc.wait(Op("w"), sent)
        if caught_up:
            acc.caught_up(Op("c"), sent)
        acc.launch(Op("attention"), F.linear, (query, keys))
        if tokens == 3 or caught_up:
            acc.end_step()
        else:
            with pytest.raises(ScheduleError, match="attention runs for the first time at sizes .*4, 16.* gate"):
                acc.end_step()
    acc.close()


# ---- CUDA over the fake: gates and the thread --------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaAccelerator]:
    """CUDA over the fake, closed afterwards."""
    fake_cuda.install(monkeypatch)
    opened = CudaAccelerator()
    yield opened
    opened.close()


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
    cuda.begin_step(again=True, needs_bytes=needs_bytes)
    torch.testing.assert_close(step(cuda, make_weights(4), torch.ones(2, WIDTH)), expected())
    cuda.end_step()
    assert len(gates_in_log()) == closed


def test_a_limit_of_the_allocators_own_counts(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unclaimed_bytes(cuda.device) == (1 << 30) - 2 * BLOCK_BYTES
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert unclaimed_bytes(cuda.device) == (1 << 29) - fake_cuda.RESERVED["current"] - 2 * BLOCK_BYTES


def test_device_tensors_die_on_the_issuing_thread(cuda: CudaAccelerator) -> None:
    """The worker may hold the last reference to nothing of the device: torch's allocator could be waiting."""
    died: list[str] = []
    cuda.begin_step(again=True)
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

    cuda.begin_step(again=True)
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
    cuda.begin_step(again=False)
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


@pytest.mark.parametrize(("threads", "worker"), [(1, 1), (2, 2), (3, 2)])
def test_the_worker_leaves_a_processor_to_the_issuing_thread(threads: int, worker: int) -> None:
    found: list[int] = []
    thread = Worker(lambda: None)
    torch.set_num_threads(threads)
    thread.begin()
    thread.submit(lambda: found.append(torch.get_num_threads()))
    thread.drain()
    assert (found, torch.get_num_threads()) == ([worker], threads)
    thread.close()


def test_a_worker_that_was_ended_is_started_again() -> None:
    found: list[int] = []
    thread = Worker(lambda: None)
    torch.set_num_threads(3)
    for _ in range(2):
        thread.begin()
        thread.submit(lambda: found.append(torch.get_num_threads()))
        thread.drain()
        thread.close()
    assert found == [2, 2]


def test_a_worker_may_end_itself() -> None:
    thread = Worker(lambda: None)
    thread.begin()
    first = thread._thread._thread
    assert first is not None
    thread.submit(thread.close)
    first.join(10)
    assert not first.is_alive()
    found: list[str] = []
    thread.begin()
    thread.submit(lambda: found.append(threading.current_thread().name))
    thread.drain()
    assert found == ["hetegen-worker"]
    thread.close()


def test_a_worker_ends_when_its_owner_is_gone() -> None:
    owner = Worker(lambda: None)
    owner.begin()
    thread = owner._thread._thread
    assert thread is not None
    del owner
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_promises_in_an_argument() -> None:
    promise = Promise("p")
    promise.keep([1, 2])
    given = ([promise[1]], {"a": promise}, slice(1, promise[1]), 3)
    assert kept_in(given) == ([2], {"a": [1, 2]}, slice(1, 2), 3)
