"""Failures, interrupts, the caller's modes, threads and the end of an emulated accelerator."""

import gc
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.errors import AcceleratorError, ScheduleError
from tests.accelerators.schedules import WIDTH, SplitLayers, make_weights, run_eager


def fail(_: torch.Tensor) -> torch.Tensor:
    raise ValueError("boom")


@pytest.mark.parametrize("surface", ["end_step", "synchronize", "wait_host", "download", "upload"])
def test_a_failed_launch_surfaces_and_the_next_step_works(surface: str) -> None:
    accelerator = EmulatedAccelerator(seed=1)
    interval = sys.getswitchinterval()
    weights = make_weights(3)
    layers = SplitLayers(accelerator, weights)
    accelerator.begin_step()
    value = accelerator.upload(Op("x"), torch.ones(2, WIDTH))
    bad = accelerator.launch(Op("segment_7"), fail, (value,))
    ran: list[bool] = []
    accelerator.launch(Op("after"), lambda t: ran.append(True), (bad,))
    down = accelerator.to_host(Op("down"), bad)
    calls: dict[str, Callable[[], object]] = {
        "end_step": accelerator.end_step,
        "synchronize": accelerator.synchronize,
        "wait_host": lambda: accelerator.wait_host(Op("arrived"), down),
        "download": lambda: accelerator.download(Op("out"), value),
        "upload": lambda: accelerator.upload(Op("y"), torch.ones(2)),
    }
    with pytest.raises(AcceleratorError, match=r"segment_7 .*ValueError: boom") as raised:
        calls[surface]()
    assert isinstance(raised.value.__cause__, ValueError)
    assert ran == []
    assert sys.getswitchinterval() == interval
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(layers.step(x), run_eager(weights, x))
    with pytest.raises(ScheduleError, match="segment_7"):
        accelerator.download(Op("late"), bad)
    with pytest.raises(ScheduleError, match=r"arrived .* down"):
        accelerator.wait_host(Op("arrived"), down)
    accelerator.close()


def test_an_interrupted_step_leaves_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = EmulatedAccelerator(seed=2)
    weights = make_weights(3)
    layers = SplitLayers(accelerator, weights)
    x = torch.randn(2, WIDTH)
    real = accelerator.wait_host
    calls = 0

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(accelerator, "wait_host", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layers.step(x)
    torch.testing.assert_close(layers.step(x), run_eager(weights, x))
    accelerator.close()


def test_a_wrong_number_of_outputs_names_the_node(accelerator: EmulatedAccelerator) -> None:
    accelerator.launch(Op("split"), lambda: (torch.ones(1), torch.ones(1)), (), outputs=3)
    with pytest.raises(AcceleratorError, match="split"):
        accelerator.synchronize()


def test_workers_reenter_the_callers_modes(accelerator: EmulatedAccelerator) -> None:
    def modes() -> tuple[bool, bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    def launch() -> object:
        future = accelerator.launch(Op("modes"), lambda: (modes(),), (), outputs=1)[0]
        accelerator.synchronize()
        return future.data

    assert launch() == (True, False, False)
    with torch.no_grad():
        assert launch() == (False, False, False)
    with torch.inference_mode(), torch.autocast("cpu"):
        assert launch() == (False, True, True)
    assert launch() == (True, False, False)


def test_autocast_computes_in_the_callers_dtype(accelerator: EmulatedAccelerator) -> None:
    x = accelerator.upload(Op("x"), torch.ones(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = accelerator.launch(Op("linear"), F.linear, (x, x))
    z = accelerator.launch(Op("after"), F.linear, (x, x))
    assert accelerator.download(Op("y"), y).dtype == torch.bfloat16
    assert accelerator.download(Op("z"), z).dtype == torch.float32


def test_what_a_failed_worker_left_does_not_touch_the_callers_state() -> None:
    accelerator = EmulatedAccelerator()
    accelerator.launch(Op("bad"), fail, (accelerator.upload(Op("x"), torch.ones(1)),))
    with pytest.raises(AcceleratorError) as raised:
        accelerator.synchronize()
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("hetegen-")]
    accelerator.close()
    for worker in workers:
        worker.join(10)
    cause = raised.value.__cause__
    assert cause is not None
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    held = [frame.f_locals["modes"] for frame in frames if "modes" in frame.f_locals]
    assert held, "the traceback no longer keeps the worker's modes"
    del raised, cause, frames, accelerator, workers
    with torch.autocast("cpu", dtype=torch.bfloat16):
        del held
        gc.collect()
        assert torch.is_autocast_enabled("cpu")


def test_copies_are_ordinary_tensors_without_graph(accelerator: EmulatedAccelerator) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    with torch.inference_mode():
        result = accelerator.download(Op("out"), accelerator.upload(Op("w"), weight))
    assert not result.is_inference()
    assert not result.requires_grad
    accelerator.reserve_ring(256)
    with torch.inference_mode():
        slot = accelerator.slot(0, (4,), torch.float32)
    fetched = accelerator.wait(Op("wait"), accelerator.prefetch(Op("fetch"), weight, slot, ()))
    assert not accelerator.download(Op("out"), fetched).requires_grad


def test_threads_of_others_keep_their_counts() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    accelerator = EmulatedAccelerator()
    inside = accelerator.launch(Op("count"), lambda: (torch.get_num_threads(),), (), outputs=1)[0]
    accelerator.synchronize()
    counts: list[int] = []
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (torch.get_num_threads(), counts, inside.data) == (2, [2], 1)
    torch.set_num_threads(threads)
    accelerator.close()


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("hetegen-")}


def test_close_ends_the_threads_and_forbids_use() -> None:
    before = workers()
    accelerator = EmulatedAccelerator()
    assert len(workers() - before) == 5
    accelerator.launch(Op("queued"), torch.ones, (1,))
    accelerator.close()
    accelerator.close()
    assert not workers() - before
    for use in (
        accelerator.begin_step,
        accelerator.end_step,
        lambda: accelerator.upload(Op("x"), torch.ones(1)),
    ):
        with pytest.raises(AcceleratorError, match="closed"):
            use()


def test_resting_ends_the_threads_until_there_is_work() -> None:
    """What was in flight is passed over; counters go on; rings are made again by whoever needs them."""
    before, weights, x = workers(), make_weights(3), torch.randn(2, WIDTH)
    accelerator = EmulatedAccelerator(seed=3)
    layers = SplitLayers(accelerator, weights)
    moved = 0
    for _ in range(3):
        torch.testing.assert_close(layers.step(x), run_eager(weights, x))
        assert sum(accelerator.counters.uploaded_bytes.values()) > moved
        moved = sum(accelerator.counters.uploaded_bytes.values())
        assert len(workers() - before) == 5
        length = accelerator.counters.held_bytes["slots"]
        assert length > 0
        accelerator.launch(Op("queued"), fail, (accelerator.upload(Op("y"), torch.ones(1)),))
        accelerator.prefetch_ahead(Op("ahead"), weights[0], accelerator.slot(0, weights[0].shape, torch.float32), ())
        accelerator.rest()
        accelerator.rest()
        assert not workers() - before
        assert accelerator.usable
        assert accelerator.counters.held_bytes["slots"] == 0
        accelerator.reserve_ring(length)
    accelerator.close()
    accelerator.rest()
    assert not accelerator.usable


def test_a_worker_may_send_it_to_rest() -> None:
    """A finalizer runs in the thread that lets go of the last reference, which may be a worker's."""
    before, weights, x, done = workers(), make_weights(3), torch.randn(2, WIDTH), threading.Event()
    accelerator = EmulatedAccelerator(seed=3)
    layers = SplitLayers(accelerator, weights)
    length = accelerator.counters.held_bytes["slots"]

    def rest() -> torch.Tensor:
        accelerator.rest()
        done.set()
        return torch.ones(1)

    accelerator.launch(Op("rest"), rest, ())
    assert done.wait(60)
    for worker in workers() - before:
        worker.join(60)
    accelerator.reserve_ring(length)
    torch.testing.assert_close(layers.step(x), run_eager(weights, x))
    accelerator.close()


def test_a_forgotten_accelerator_ends_its_threads() -> None:
    before = workers()
    accelerator = EmulatedAccelerator()
    accelerator.upload(Op("x"), torch.ones(1))
    del accelerator
    gc.collect()
    assert not workers() - before


def test_the_interpreter_exits_with_work_in_flight() -> None:
    script = (
        "import time; from hetegen_compile.accelerators import EmulatedAccelerator, Op\n"
        "accelerator = EmulatedAccelerator()\n"
        "accelerator.begin_step()\n"
        "for i in range(1000): accelerator.launch(Op('sleep'), lambda: time.sleep(0.1), ())\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=dict(os.environ))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_instead_of_hanging(
    accelerator: EmulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)
    with pytest.raises(AcceleratorError, match="fork"):
        accelerator.begin_step()


def test_steps_hand_the_interpreter_over_quickly(accelerator: EmulatedAccelerator) -> None:
    before = sys.getswitchinterval()
    accelerator.begin_step()
    assert sys.getswitchinterval() == pytest.approx(1e-5)
    accelerator.begin_step()  # the step before was aborted
    accelerator.end_step()
    assert sys.getswitchinterval() == before


def test_operations_only_enqueue(accelerator: EmulatedAccelerator) -> None:
    gate = threading.Event()
    accelerator.reserve_ring(256)
    slot = accelerator.slot(0, (4,), torch.float32)
    blocked = accelerator.launch(Op("blocked"), lambda: gate.wait(10) and torch.ones(2), ())
    fetched = accelerator.prefetch(Op("fetch"), torch.ones(4), slot, ())
    accelerator.wait(Op("wait"), fetched)
    accelerator.release(Op("release"), fetched)
    down = accelerator.to_host(Op("down"), blocked)
    assert down.done is not None
    assert not down.done.is_set()
    gate.set()
    assert accelerator.wait_host(Op("arrived"), down).tolist() == [1, 1]
