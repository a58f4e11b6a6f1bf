"""Whether a profile says that gates pay, over the fake of torch.cuda: nothing is faster there, so times are made up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hetegen_compile.accelerators import Accelerator, CudaAccelerator
from hetegen_compile.accelerators.cuda import gates
from hetegen_compile.calibration import gating
from hetegen_compile.calibration.gating import Answer, SmallModel, answer, ask, step_ahead, step_in_turn
from tests.accelerators import fake_cuda
from tests.accelerators.fake_cuda import LOG

HOST = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake, a small model, and one thread."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(gating, "WIDTH", 128)
    monkeypatch.setattr(gating, "ROWS", 256)
    monkeypatch.setattr(gating, "LAYERS", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timed_as(monkeypatch: pytest.MonkeyPatch, seconds: dict[Callable[..., Any], float]) -> None:
    """Steps run as they do and are said to take this long."""
    real = gating._timed

    def timed(accelerator: Accelerator, model: SmallModel, step: gating.OneStep) -> tuple[list[torch.Tensor], float]:
        return real(accelerator, model, step)[0], seconds[step]

    monkeypatch.setattr(gating, "_timed", timed)


def closing(opened: list[int]) -> gates.Gates:
    """Gates that close at once: the fake would wait."""

    class Closing(gates.Gates):
        def close(self, number: int, stream: torch.cuda.Stream) -> None:
            pass

        def open(self, number: int) -> None:
            opened.append(number)

    return Closing()


def test_both_ways_give_the_same_bits_and_the_second_closes_gates() -> None:
    accelerator, model = CudaAccelerator(), SmallModel(HOST)
    (first, *others), _ = gating._timed(accelerator, model, step_in_turn)
    assert not any(entry.startswith("gate") for entry in LOG)
    ahead, _ = gating._timed(accelerator, model, step_ahead)
    assert sum(entry.startswith("gate") for entry in LOG) == 4 * (gating._ROUNDS - 1)
    assert all(torch.equal(first, other) for other in (*others, *ahead))
    assert first.abs().sum() > 0
    accelerator.close()


def test_what_a_gate_costs_is_stated_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    timed_as(monkeypatch, {step_in_turn: 2e-3, step_ahead: 1e-3})
    monkeypatch.setattr(gating, "Gates", lambda: closing(opened))
    found = answer(HOST, CudaAccelerator)
    assert 0 < found.gate_s < 1
    assert not found.reason
    assert found.source == "measured; a small step takes 1.00 ms with it, 2.00 ms without"
    assert opened == [*range(1, gating._ROUNDS + 1)]


@pytest.mark.parametrize(
    ("ahead_s", "told"), [(2e-3, "a small step takes 2.00 ms with it, 1.00 ms without"), (0.5e-3, "")]
)
def test_it_has_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ahead_s: float, told: str
) -> None:
    timed_as(monkeypatch, {step_in_turn: 1e-3, step_ahead: ahead_s})
    accelerator = CudaAccelerator()
    assert gating._tried(accelerator, SmallModel(HOST)).why_not == told
    accelerator.close()


def test_other_load_during_one_try_does_not_rule_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = [gating.BothWays(1e-3, 2e-3, same=True), gating.BothWays(2e-3, 1e-3, same=True)]
    monkeypatch.setattr(gating, "both_ways", lambda accelerator, model: tries.pop(0))
    accelerator = CudaAccelerator()
    found = gating._tried(accelerator, SmallModel(HOST))
    assert (found.why_not, found.times) == ("", "a small step takes 1.00 ms with it, 2.00 ms without")
    accelerator.close()


def test_another_result_rules_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_as(monkeypatch, {step_in_turn: 2e-3, step_ahead: 1e-3})
    accelerator, model = CudaAccelerator(), SmallModel(HOST)
    host_ahead = accelerator.host_ahead

    def wrong(op: Any, function: Any, args: Any, kwargs: Any) -> Any:
        return host_ahead(op, lambda *one: [part + 1 for part in function(*one)], args, kwargs)

    monkeypatch.setattr(accelerator, "host_ahead", wrong)
    assert gating._tried(accelerator, model).why_not == "a step on the worker gave another result"
    accelerator.close()


def test_a_driver_that_refuses_rules_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_wait_function", lambda: lambda *arguments: 801)
    found = answer(HOST, CudaAccelerator)
    assert found.gate_s == 0
    assert "error 801" in found.reason


def test_an_accelerator_without_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaAccelerator, "cannot_issue_ahead", "no such driver")
    assert answer(HOST, CudaAccelerator) == Answer(0.0, "no such driver")


# ---- the other process -------------------------------------------------------------------------------------

SCRIPTS = {
    'print(\'{"gate_s": 4e-06, "reason": ""}\')': (4e-6, ""),
    'print(\'{"gate_s": 0.0, "reason": "no faster"}\')': (0.0, "no faster"),
    'print("welcome"); print(\'{"gate_s": 4e-06, "reason": ""}\')': (4e-6, ""),
    'print("welcome")': (0.0, "trying it printed no answer: 'welcome'"),
    'print("[]")': (0.0, "trying it printed no answer: '[]'"),
    "pass": (0.0, "trying it printed no answer: ''"),
    'import sys; sys.exit("CUDA error: unspecified launch failure")': (0.0, "trying it failed: CUDA error"),
    "import time; time.sleep(60)": (0.0, "trying it took more than 1 s"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_answer_of_another_process(
    script: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, asked = subprocess.run, list[list[str]]()

    def instead(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return run([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "run", instead)
    monkeypatch.setattr(gating, "why_no_gates", lambda: "")
    monkeypatch.setattr(gating, "LIMIT_S", 1.0 if "sleep" in script else 60.0)
    seconds, told = SCRIPTS[script]
    found = ask(torch.device("cuda", 1))
    assert found.gate_s == seconds
    assert told in found.source
    assert asked == [[sys.executable, "-m", "hetegen_compile.calibration.gating", "1"]]
    assert told in caplog.text


def test_without_gates_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(gating, "why_no_gates", lambda: "no such driver")
    monkeypatch.setattr(subprocess, "run", None)
    assert ask(torch.device("cuda", 0)) == Answer(0.0, "no such driver")
    assert "no such driver" in caplog.text


def test_the_program_ends_with_an_error_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hetegen_compile.calibration.gating", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Error" in done.stderr
