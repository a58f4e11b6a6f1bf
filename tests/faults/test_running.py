"""Faults while a step runs: an error that names the node, no hang, and the next call or compilation works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile import schedules
from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.accelerators.emulated.streams import Stream, Task
from hetegen_compile.accelerators.emulated.work import DeviceWork
from hetegen_compile.errors import AcceleratorError
from tests.backend.modules import BUDGET, Mlp, around, plain, random
from tests.models.harness import RecordingBackend, emulated


def _compiled(model: nn.Module, **options: Any) -> RecordingBackend:
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(**{"gpu_memory": BUDGET, **options}))
    return backend


def _assert_like_eager(model: nn.Module, x: Tensor) -> None:
    """The compiled model gives what eager gives, and its weights are split."""
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    assert schedules()[-1].host_bytes > 0
    assert schedules()[-1].streamed_bytes > 0


# ---- a host operation raises -----------------------------------------------------------------------------------


class _Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mlp = nn.Embedding(1000, 64), Mlp(4)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.mlp(self.table(ids))
        return result


def test_a_host_operation_that_raises_names_its_node_and_the_next_call_works() -> None:
    torch.manual_seed(0)
    model = _Lookup().eval()
    _compiled(model)
    good, bad = torch.tensor([[3, 7]]), torch.tensor([[3, 1000]])
    _assert_like_eager(model, good)
    with pytest.raises(IndexError) as caught, torch.no_grad():
        model(bad)
    assert any("embedding" in note and "host operation" in note for note in caught.value.__notes__)
    _assert_like_eager(model, good)


def test_work_of_a_stream_that_raises_names_its_node_and_the_next_call_works() -> None:
    failing: list[bool] = []

    def compile_segment(segment: Any, examples: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if failing and failing.pop():
                raise ValueError("boom")
            return segment.forward(*args)

        return run

    def compiler(mode: Any) -> Any:
        return compile_segment

    model, backend = around(plain), RecordingBackend(compiler)
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
    _assert_like_eager(model, random(3, 64))
    failing.append(True)
    with torch.no_grad(), pytest.raises(AcceleratorError, match=r"segment_\d+ failed on the .*ValueError: boom"):
        model(random(3, 64))
    assert not failing
    _assert_like_eager(model, random(3, 64))
    assert len(backend.graphs) == 1


def _call_twice(model: nn.Module) -> None:
    with torch.no_grad():
        for _ in range(2):
            model(random(3, 64))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_copy_that_fails_names_its_node_and_the_next_call_works(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's own copy, or one that it has started for the next, whose wait then tells."""
    model = around(plain)
    backend = _compiled(model)
    for _ in range(steps):
        _assert_like_eager(model, random(3, 64))
    failed: list[str] = []
    copy = DeviceWork.fill_slot

    def fail(self: DeviceWork, op: Op, *args: Any) -> None:
        if not failed:
            failed.append(op.name)
            raise ValueError("a link that is down")
        copy(self, op, *args)

    monkeypatch.setattr(DeviceWork, "fill_slot", fail)
    with pytest.raises(AcceleratorError, match="a link that is down") as caught:
        _call_twice(model)
    nodes = {part for row in backend.graphs[0].plans[0].schedule.rows for part in row.parts}
    assert failed[0] in nodes
    assert failed[0] in str(caught.value)
    _assert_like_eager(model, random(3, 64))
    assert len(backend.graphs) == 1


# ---- a worker thread dies ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stream", ["accelerator", "up", "down"])
def test_a_dead_worker_is_an_error_of_the_call_and_a_new_compilation_works(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = around(plain)
    _compiled(model)
    _assert_like_eager(model, random(3, 64))
    finish = Stream._finish

    def die(self: Stream, task: Task, modes: Any) -> None:
        if self.thread.name == f"hetegen-{stream}":
            sys.exit()  # ends the thread without a trace
        finish(self, task, modes)

    monkeypatch.setattr(Stream, "_finish", die)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(AcceleratorError, match=f"{stream} has died: compile the model again"):
            model(random(3, 64))
    monkeypatch.undo()
    torch._dynamo.reset()
    _assert_like_eager(model, random(3, 64))


# ---- interrupts ----------------------------------------------------------------------------------------------------


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C after some seconds, as the terminal sends it; the block has to be interrupted by it."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.join()


def test_ctrl_c_while_the_host_waits() -> None:
    model = around(plain)
    backend = _compiled(model)
    _assert_like_eager(model, random(3, 64))
    (graph,) = backend.graphs
    accelerator = graph.runtime.accelerator
    assert isinstance(accelerator, EmulatedAccelerator)
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(60)

    accelerator.begin_step()
    accelerator.launch(Op("hold"), hold, (), outputs=0)  # what is issued to the stream next waits behind it
    assert held.wait(60)
    with _interrupted_after(0.2), torch.no_grad():
        threading.Timer(0.4, go_on.set).start()
        accelerator.end_step()
    _assert_like_eager(model, random(3, 64))


@pytest.mark.parametrize("steps", [1, 3])
def test_ctrl_c_while_the_step_waits_for_a_prefetch(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy takes long, the accelerator waits for it and the host for the accelerator: of the step's own copies, or
    (after some steps) with copies that the step before has started."""
    model = around(plain)
    _compiled(model)
    for _ in range(steps):
        _assert_like_eager(model, random(3, 64))
    go_on, copy = threading.Event(), DeviceWork.fill_slot

    def slow(self: DeviceWork, *args: Any) -> None:
        go_on.wait(60)
        copy(self, *args)

    monkeypatch.setattr(DeviceWork, "fill_slot", slow)
    with _interrupted_after(0.2), torch.no_grad():
        threading.Timer(0.4, go_on.set).start()
        model(random(3, 64))
    for _ in range(2):
        _assert_like_eager(model, random(3, 64))


IN_TURN = ("begin_step", "upload", "prefetch", "wait_host", "host", "to_host", "end_step")
AHEAD = ("receive", "host_ahead", "deliver", "caught_up", "wait")


@pytest.mark.parametrize(
    ("method", "ahead"), [*((method, False) for method in IN_TURN), *((method, True) for method in AHEAD)]
)
def test_an_interrupt_anywhere_in_a_step(method: str, monkeypatch: pytest.MonkeyPatch, *, ahead: bool) -> None:
    """Before any operation; what the step had begun is passed over by the next."""
    model, interval = around(plain), sys.getswitchinterval()
    _compiled(model, issue_ahead=ahead)
    real = getattr(EmulatedAccelerator, method)
    calls: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(EmulatedAccelerator, method, interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(random(3, 64))
    assert len(calls) == 1
    assert sys.getswitchinterval() == interval, "a step's setting stayed"
    _assert_like_eager(model, random(3, 64))
    _assert_like_eager(model, random(3, 64, seed=2))


# ---- forks ---------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, threading
import torch
import hetegen_compile
from hetegen_compile.errors import AcceleratorError
from tests.backend.modules import BUDGET, Mlp, random
from tests.models.harness import RecordingBackend, emulated

torch.set_num_threads(1)
model, backend = Mlp(4).eval(), RecordingBackend()
model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
x = random(3, 64)

def like_eager():
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward(x), rtol=1e-4, atol=1e-5)
    assert hetegen_compile.schedules()[-1].host_bytes > 0

like_eager()
lock, taken, done = backend.graphs[0].runtime.lock, threading.Event(), threading.Event()

def hold():  # another thread is in the middle of a step
    with lock:
        taken.set()
        done.wait()

threading.Thread(target=hold, daemon=True).start()
taken.wait()
child = os.fork()
if child == 0:
    try:
        like_eager()
    except AcceleratorError as error:
        assert "forked" in str(error) and "compile the model again" in str(error), error
    else:
        sys.exit("no error")
    torch._dynamo.reset()
    like_eager()
    sys.exit(0)
_, status = os.waitpid(child, 0)
done.set()
like_eager()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_an_error_and_may_compile_again() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
