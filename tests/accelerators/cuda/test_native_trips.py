"""A worker's trip as one native call, over the fake of torch.cuda."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hetegen_compile.accelerators import CudaAccelerator, Op, StepFacts
from hetegen_compile.accelerators.cuda import native_trips
from hetegen_compile.accelerators.cuda.gates import Gates
from hetegen_compile.host_kernels import VECTORISED, HostLinear
from hetegen_compile.host_kernels.program import NO_WAIT, HostProgram, Place, Step, Wait
from tests.accelerators.fake_cuda import LOG, FakeEvent

WIDTH, ROWS = 48, 64
HANDLE = 4321


@pytest.fixture
def cuda(cuda: CudaAccelerator) -> CudaAccelerator:
    """In a step that closes gates."""
    cuda.begin_step(facts=StepFacts(again=True))
    return cuda


def program(*, results: int = 1) -> HostProgram:
    """relu(x @ rows.T), and before it without relu where there are two results."""
    linear = HostLinear(0, ROWS, 0, ((float("inf"), VECTORISED),))
    first = Step(linear, (0, 1, None), (Place(0), Place(1), None), {})
    return HostProgram([first, Step(F.relu, (2,), (Place(2),), {}, "relu")], 2, (2, 3)[-results:])


def rows() -> Tensor:
    return torch.arange(ROWS * WIDTH).view(ROWS, WIDTH).remainder(7.0) - 3.0


X = torch.linspace(-1, 1, WIDTH).view(1, WIDTH)


def address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def like(count: int = 1) -> list[Tensor]:
    return [torch.empty((1, ROWS), device="meta") for _ in range(count)]


def receive(cuda: CudaAccelerator, x: Tensor = X) -> Any:
    return cuda.receive(Op("r"), cuda.to_host(Op("d"), [cuda.upload(Op("x"), x)]))[0]


def expected() -> Tensor:
    return F.relu(F.linear(X, rows()))


def test_a_trip_of_one_program_is_one_native_call(cuda: CudaAccelerator) -> None:
    made = cuda.host_ahead(Op("h"), program(), (receive(cuda), rows()), {})
    (up,) = cuda.wait(Op("w"), cuda.deliver(Op("u"), [made[0]], like()))
    torch.testing.assert_close(up, expected())
    cuda.end_step()
    assert cuda.counters.native_trips == cuda.counters.trips_up == 1
    assert "gate 1 closed" in LOG or "gate 1 is open" in LOG


def test_all_results_go_up_in_their_order(cuda: CudaAccelerator) -> None:
    made = cuda.host_ahead(Op("h"), program(results=2), (receive(cuda), rows()), {})
    first, second = cuda.wait(Op("w"), cuda.deliver(Op("u"), [made[0], made[1]], like(2)))
    torch.testing.assert_close(first, F.linear(X, rows()))
    torch.testing.assert_close(second, expected())
    assert cuda.counters.native_trips == 1


def test_a_program_may_be_in_two_trips_at_a_time(cuda: CudaAccelerator) -> None:
    """As in calibration's small step, whose layers are alike; the worker is behind."""
    computed, weights, sent = program(), [rows(), -rows()], []
    for weight in weights:
        x = receive(cuda)
        cuda._ahead.pause(0.05)
        made = cuda.host_ahead(Op("h"), computed, (x, weight), {})
        sent.append(cuda.deliver(Op("u"), [made[0]], like()))
    cuda.end_step()
    for transfer, weight in zip(sent, weights, strict=True):
        torch.testing.assert_close(transfer.value[0], F.relu(F.linear(X, weight)))
    assert cuda.counters.native_trips == 2


def swapped(cuda: CudaAccelerator) -> tuple[Any, list[Tensor]]:
    made = cuda.host_ahead(Op("h"), program(results=2), (receive(cuda), rows()), {})
    return cuda.deliver(Op("u"), [made[1], made[0]], like(2)), [expected(), F.linear(X, rows())]


def one_of_two(cuda: CudaAccelerator) -> tuple[Any, list[Tensor]]:
    made = cuda.host_ahead(Op("h"), program(results=2), (receive(cuda), rows()), {})
    return cuda.deliver(Op("u"), [made[1]], like()), [expected()]


def with_more_behind(cuda: CudaAccelerator) -> tuple[Any, list[Tensor]]:
    made = cuda.host_ahead(Op("h"), program(), (receive(cuda), rows()), {})
    more = cuda.host_ahead(Op("m"), torch.neg, (made[0],), {})
    return cuda.deliver(Op("u"), [more], like()), [-expected()]


def behind_something_else(cuda: CudaAccelerator) -> tuple[Any, list[Tensor]]:
    x = cuda.host_ahead(Op("m"), torch.neg, (receive(cuda),), {})
    made = cuda.host_ahead(Op("h"), program(), (x, rows()), {})
    return cuda.deliver(Op("u"), [made[0]], like()), [F.relu(F.linear(-X, rows()))]


def of_what_is_not_known_yet(cuda: CudaAccelerator) -> tuple[Any, list[Tensor]]:
    go_on = threading.Event()
    weights = cuda.host_ahead(Op("m"), lambda: rows() if go_on.wait(10) else None, (), {})
    made = cuda.host_ahead(Op("h"), program(), (receive(cuda), weights), {})
    sent = cuda.deliver(Op("u"), [made[0]], like())
    go_on.set()
    return sent, [expected()]


def into_lines_with_gaps(cuda: CudaAccelerator) -> tuple[Any, list[Tensor]]:
    made = cuda.host_ahead(Op("h"), program(), (receive(cuda, X.repeat(2, 1)), rows()), {})
    gaps = torch.empty((2, 2 * ROWS), device="meta")[:, :ROWS]
    return cuda.deliver(Op("u"), [made[0]], [gaps]), [expected().repeat(2, 1)]


@pytest.mark.parametrize(
    "trip",
    [swapped, one_of_two, with_more_behind, behind_something_else, of_what_is_not_known_yet, into_lines_with_gaps],
)
def test_every_other_trip_is_made_operation_by_operation(
    cuda: CudaAccelerator, trip: Callable[[CudaAccelerator], tuple[Any, list[Tensor]]]
) -> None:
    sent, values = trip(cuda)
    for found, value in zip(cuda.wait(Op("w"), sent), values, strict=True):
        torch.testing.assert_close(found, value)
    cuda.end_step()
    assert cuda.counters.native_trips == 0


def test_a_traced_trip_has_a_span_for_each_operation(cuda: CudaAccelerator) -> None:
    cuda.trace(True)
    computed = program()
    op = Op("h", parts=("linear", "relu"), shares=computed.shares)
    made = cuda.host_ahead(op, computed, (receive(cuda), rows()), {})
    (up,) = cuda.wait(Op("w"), cuda.deliver(Op("u"), [made[0]], like()))
    torch.testing.assert_close(up, expected())
    cuda.end_step()
    assert cuda.counters.native_trips == 0
    assert [span.name for span in cuda.trace(False) if span.resource == "worker"] == ["linear", "relu"]


def test_what_is_received_and_not_computed_with_is_waited_for(cuda: CudaAccelerator) -> None:
    receive(cuda)
    cuda.end_step()
    assert "host waits down@0" in LOG


def test_what_is_computed_and_not_sent_is_computed(cuda: CudaAccelerator) -> None:
    made = cuda.host_ahead(Op("h"), program(), (receive(cuda), rows()), {})
    cuda.end_step()
    torch.testing.assert_close(made[0].kept(), expected())


def test_an_abandoned_step_forgets_what_was_kept_back(cuda: CudaAccelerator) -> None:
    receive(cuda)
    cuda.abandon_step()
    cuda.begin_step(facts=StepFacts(again=True))
    made = cuda.host_ahead(Op("h"), program(), (X, rows()), {})
    cuda.end_step()
    torch.testing.assert_close(made.kept()[0], expected())
    assert "host waits down@0" not in LOG


def test_a_failed_download_is_raised_and_read_as_zeros(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(event: FakeEvent) -> None:
        raise RuntimeError("an illegal address")

    made = cuda.host_ahead(Op("h"), program(), (receive(cuda), rows()), {})
    with monkeypatch.context() as failing:
        failing.setattr(FakeEvent, "synchronize", fail)
        (up,) = cuda.wait(Op("w"), cuda.deliver(Op("u"), [made[0]], like()))
        assert torch.equal(up, torch.zeros(1, ROWS))
        with pytest.raises(RuntimeError, match="u failed .*an illegal address"):
            cuda.end_step()
    cuda.abandon_step()
    assert cuda.counters.native_trips == 1


@pytest.mark.parametrize("code", [0, 700])
def test_the_driver_is_asked_to_wait_and_torch_for_the_reason(
    cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    waited: list[int | None] = []

    def wait(handle: int | None) -> int:
        waited.append(handle)
        return code

    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(wait)
    monkeypatch.setattr(native_trips, "driver_wait", lambda: Wait(address(function)))
    monkeypatch.setattr(FakeEvent, "cuda_event", HANDLE, raising=False)
    made = cuda.host_ahead(Op("h"), program(), (receive(cuda), rows()), {})
    (up,) = cuda.wait(Op("w"), cuda.deliver(Op("u"), [made[0]], like()))
    torch.testing.assert_close(up, expected())
    cuda.end_step()
    assert waited == [HANDLE]
    assert ("host waits down@0" in LOG) == bool(code)


def test_the_native_call_opens_the_gate(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what is done finally, which comes when the interpreter is free."""
    opened: list[int] = []
    monkeypatch.setattr(Gates, "open", lambda self, number: opened.append(number))
    made = cuda.host_ahead(Op("h"), program(), (receive(cuda), rows()), {})
    cuda.wait(Op("w"), cuda.deliver(Op("u"), [made[0]], like()))
    assert "gate 1 closed" in LOG or "gate 1 is open" in LOG
    cuda.end_step()
    assert opened == [1]


def test_without_a_driver_there_is_nowhere_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> ctypes.CDLL:
        raise OSError("no libcuda")

    monkeypatch.setattr(native_trips, "cuda_library", missing)
    assert native_trips.driver_wait.__wrapped__() == NO_WAIT


def test_the_drivers_functions_wait_and_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda handle: 0) for _ in range(2)]
    driver = SimpleNamespace(cuEventSynchronize=functions[0], cuEventQuery=functions[1])
    monkeypatch.setattr(native_trips, "cuda_library", lambda: driver)
    assert native_trips.driver_wait.__wrapped__() == Wait(address(functions[0]), address(functions[1]), 600)


def test_weights_are_read_ahead_while_the_driver_has_nothing(
    cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def query(handle: int | None) -> int:
        asked.append(handle)
        return 600 if len(asked) < 3 else 0

    functions = [ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(one) for one in (lambda handle: 0, query)]
    monkeypatch.setattr(native_trips, "driver_wait", lambda: Wait(address(functions[0]), address(functions[1]), 600))
    monkeypatch.setattr(FakeEvent, "cuda_event", HANDLE, raising=False)
    weights = torch.linspace(-1, 1, 4096 * WIDTH).view(4096, WIDTH)
    linear = HostLinear(0, 4096, 0, ((float("inf"), VECTORISED),))
    step = Step(linear, (0, 1, None), (Place(0), Place(1), None), {})
    made = cuda.host_ahead(Op("h"), HostProgram([step], 2, (2,), 1 << 30), (receive(cuda), weights), {})
    (up,) = cuda.wait(Op("w"), cuda.deliver(Op("u"), [made[0]], [torch.empty((1, 4096), device="meta")]))
    torch.testing.assert_close(up, F.linear(X, weights))
    cuda.end_step()
    assert asked == [HANDLE] * 3
    assert 0 < cuda.counters.read_ahead_bytes < weights.nbytes
