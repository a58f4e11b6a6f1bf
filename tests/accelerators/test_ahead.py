"""Host parts on the worker, ahead of which the rest of a step is issued: emulated, and CUDA over the fake."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import Accelerator, CudaAccelerator, EmulatedAccelerator, Op, StepFacts
from hetegen_compile.errors import ScheduleError
from tests.accelerators import fake_cuda
from tests.accelerators.ahead_steps import LIKE, expected, run
from tests.accelerators.schedules import HOST_ROWS, WIDTH, make_weights


@pytest.fixture(params=["emulated", "cuda"])
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """One of each kind, closed afterwards."""
    if request.param == "cuda":
        fake_cuda.install(monkeypatch)
    opened: Accelerator = CudaAccelerator() if request.param == "cuda" else EmulatedAccelerator(1 << 28, seed=3)
    yield opened
    opened.close()
    gc.collect()


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
    accelerator.begin_step(facts=StepFacts(again=True))
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
        accelerator.begin_step(facts=StepFacts(again=True))
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
    accelerator.begin_step(facts=StepFacts(again=True))
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
